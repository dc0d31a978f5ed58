"""ONNX Runtime's graph of an encoder against transformers: batches of any lengths, every break seen."""

import numpy as np
import onnx_ir as ir
import pytest

from gemma_deploy.backends.onnxruntime import decoder, encoder
from gemma_deploy.backends.onnxruntime.encoder import build_encoder
from gemma_deploy.backends.onnxruntime.options import Kernels
from gemma_deploy.backends.spec import embedding_scale
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.params import build_plan, write_params
from gemma_deploy.runtime.session import open_graph
from tests.encoders import FIRST, SECOND, VOCABULARY, stock_states, stock_vector, texts, write_encoder

CONTEXT = 64
OUTPUTS = ["last_hidden_state", "sentence_embedding"]


@pytest.fixture(scope="module", params=[FIRST, SECOND])
def folder(request, tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("encoder") / "checkpoint", which=request.param)


@pytest.fixture(scope="module")
def file(folder):
    """The parameter file, and its rows."""
    checkpoint = Checkpoint.open(folder, encoder=True)
    plan = build_plan(checkpoint.config, "fp32", CONTEXT)
    out = folder.parent / "params.safetensors"
    return out, write_params(checkpoint, plan, out, journal=folder.parent / "params.journal").rows


@pytest.fixture(scope="module")
def expected(folder):
    """Hidden states and vector of each text, alone."""
    return [(stock_states(folder, text), stock_vector(folder, text)) for text in texts()]


@pytest.fixture
def run(folder, file):
    """Run texts in one batch on a graph that is built now."""
    out, rows = file
    config = Checkpoint.open(folder, encoder=True).config

    def made(batch, left=False, change=lambda model: None):
        scale = embedding_scale(config.hidden_size, "exact")
        model = build_encoder(config, Kernels(), rows, location=out.name, embed_scale=scale)
        change(model)
        session = open_graph(model, out.parent)
        length = max(map(len, batch))
        ids, mask = (np.zeros((len(batch), length), np.int64) for _ in range(2))
        for row, text in enumerate(batch):
            at = slice(length - len(text), None) if left else slice(0, len(text))
            ids[row, at], mask[row, at] = text, 1
        states, vectors = session.run(OUTPUTS, {"input_ids": ids, "attention_mask": mask})
        return [states[row][mask[row] == 1] for row in range(len(batch))], vectors

    return made


def errors(found, expected):
    """Largest error of hidden states, relative to the largest; largest 1 - cosine."""
    states, vectors = found
    largest = max(np.abs(one).max() for one, _ in expected)
    state = max(np.abs(one - other).max() for one, (other, _) in zip(states, expected, strict=True)) / largest
    return state, max(1 - float(one @ other) for one, (_, other) in zip(vectors, expected, strict=True))


@pytest.mark.parametrize("left", [False, True], ids=["padded right", "padded left"])
def test_a_batch_of_texts_is_transformers_one_by_one(run, expected, left):
    """Measured 1.0e-6 and 5e-7, the vectors in float32 (cosines of float64 2e-13)."""
    state, distance = errors(run(texts(), left), expected)
    assert state < 5e-6
    assert distance < 2e-6


def test_a_text_alone_is_what_it_is_in_company(run):
    together, vectors = run(texts())
    for row, text in enumerate(texts()):
        states, vector = run([text])
        np.testing.assert_allclose(states[0], together[row], atol=3e-5)  # of values up to 11; 7e-6 seen
        np.testing.assert_allclose(vector[0], vectors[row], atol=1e-6)


def test_a_row_of_padding_alone_is_a_vector_of_zeros(run, folder, file):
    out, rows = file
    config = Checkpoint.open(folder, encoder=True).config
    model = build_encoder(config, Kernels(), rows, location=out.name, embed_scale=8.0)
    session = open_graph(model, out.parent)
    feeds = {"input_ids": np.array([[5, 6], [0, 0]]), "attention_mask": np.array([[1, 1], [0, 0]])}
    states, vectors = session.run(OUTPUTS, feeds)
    assert np.isfinite(states).all()
    assert np.linalg.norm(vectors[0]) == pytest.approx(1)
    assert not vectors[1].any()


def causal(monkeypatch):
    seen = encoder._Encoder._seen

    def masks(self, places, mask):
        nodes = self.nodes
        column, row = (nodes.one("Unsqueeze", [places, nodes.numbers(axis)], f"broken.{axis}") for axis in (1, 0))
        before = nodes.one("LessOrEqual", [row, column], "broken.before")
        return {
            kind: nodes.one("And", [value, before], f"broken.{kind}")
            for kind, value in seen(self, places, mask).items()
        }

    monkeypatch.setattr(encoder._Encoder, "_seen", masks)


def another_reach(by):
    def change(monkeypatch):
        seen = encoder._Encoder._seen

        def masks(self, places, mask):
            kept = self.config
            shifted = [ShiftedWindow(layer, by) for layer in kept.templates]
            self.config = Templates(shifted)
            made = seen(self, places, mask)
            self.config = kept
            return made

        monkeypatch.setattr(encoder._Encoder, "_seen", masks)

    return change


class ShiftedWindow:
    def __init__(self, layer, by):
        self.kind, self.window = layer.kind, layer.window and layer.window + 2 * by


class Templates:
    def __init__(self, templates):
        self.templates = templates


def padding_seen(monkeypatch):
    seen = encoder._Encoder._seen

    def masks(self, places, mask):
        real, true = self.nodes.one("Cast", [mask], "broken", to=9), self.nodes.constant(np.True_, "true")
        ones = self.nodes.one("Or", [real, true], "every")
        return seen(self, places, self.nodes.one("Cast", [ones], "all.ones", to=7))

    monkeypatch.setattr(encoder._Encoder, "_seen", masks)


def padding_pooled(monkeypatch):
    vectors = encoder._Encoder._vectors

    def made(self, states, mask):
        nodes = self.nodes
        return vectors(self, states, nodes.one("Max", [mask, nodes.constant(np.int64(1), "int64.scalar.1")], "every"))

    monkeypatch.setattr(encoder._Encoder, "_vectors", made)


@pytest.mark.parametrize(
    ("what", "seen_in"),
    [
        (causal, "states"),
        (another_reach(-1), "states"),
        (another_reach(1), "states"),
        (padding_seen, "states"),
        (padding_pooled, "vectors"),
    ],
    ids=["causal", "a radius of one less", "a radius of one more", "padding seen", "padding pooled"],
)
def test_a_wrong_graph_is_seen(run, expected, what, seen_in, monkeypatch):
    what(monkeypatch)
    state, distance = errors(run(texts()), expected)
    if seen_in == "states":
        assert state > 1e-3
    else:
        assert state < 5e-6
    assert distance > 1e-3


def values_not_normed(monkeypatch):
    normed = encoder._Encoder._head_norm

    def made(self, value, name, heads, size):
        return value if name.endswith("v_norm") else normed(self, value, name, heads, size)

    monkeypatch.setattr(encoder._Encoder, "_head_norm", made)


def vectors_of_the_next_layer(monkeypatch):
    shared = encoder._Encoder._share_out

    def made(self, vectors, layers):
        shared(self, vectors, layers)
        self.vectors = {layer: self.vectors[(layer + 1) % len(layers)] for layer in layers}

    monkeypatch.setattr(encoder._Encoder, "_share_out", made)


def vectors_not_normed(monkeypatch):
    context = decoder.context_of

    def made(weights, projected, table, **more):
        context(weights, projected, table, **more)
        return weights.top.one("Reshape", [projected, weights.top.numbers(0, 0, table.layers, table.size)], "apart")

    monkeypatch.setattr(decoder, "context_of", made)


@pytest.mark.parametrize("folder", [SECOND], indirect=True)
@pytest.mark.parametrize(
    "what", [values_not_normed, vectors_of_the_next_layer, vectors_not_normed], ids=lambda one: one.__name__
)
def test_what_the_second_computes_otherwise_is_seen(run, expected, what, monkeypatch):
    what(monkeypatch)
    state, distance = errors(run(texts()), expected)
    assert state > 1e-3
    assert distance > 1e-3


def test_dense_layers_in_another_order_are_seen(tmp_path):
    """Of equal widths, as any order fits then."""
    folder = write_encoder(tmp_path / "square", dense=(64, 64))
    config = Checkpoint.open(folder, encoder=True)
    out = tmp_path / "params.safetensors"
    plan = build_plan(config.config, "fp32", CONTEXT)
    rows = write_params(config, plan, out, journal=tmp_path / "params.journal").rows

    def vector(change):
        model = build_encoder(config.config, Kernels(), rows, location=out.name, embed_scale=8.0)
        change(model)
        feeds = {"input_ids": np.array([texts()[1]]), "attention_mask": np.ones((1, len(texts()[1])), np.int64)}
        return open_graph(model, tmp_path).run(["sentence_embedding"], feeds)[0][0]

    def swap(model):
        first, second = (f"{number}_Dense.linear.weight" for number in (2, 3))
        nodes = [node for node in model.graph if node.inputs[1:2] and node.inputs[1].name in (first, second)]
        a, b = (node.inputs[1] for node in nodes)
        nodes[0].replace_input_with(1, b)
        nodes[1].replace_input_with(1, a)

    right = stock_vector(folder, texts()[1])
    assert 1 - vector(lambda model: None) @ right < 2e-6
    assert 1 - vector(swap) @ right > 1e-2


def test_operators_and_ports(folder, file):
    out, rows = file
    config = Checkpoint.open(folder, encoder=True).config
    model = build_encoder(config, Kernels(), rows, location=out.name, embed_scale=8.0)
    kinds = [node.op_type for node in model.graph]
    assert kinds.count("Attention") == config.num_hidden_layers
    assert kinds.count("RotaryEmbedding") == 2 * config.num_hidden_layers
    assert "GroupQueryAttention" not in kinds
    ports = [
        (value.name, value.dtype, list(map(str, value.shape))) for value in (*model.graph.inputs, *model.graph.outputs)
    ]
    assert ports == [
        ("input_ids", ir.DataType.INT64, ["batch", "sequence"]),
        ("attention_mask", ir.DataType.INT64, ["batch", "sequence"]),
        ("last_hidden_state", ir.DataType.FLOAT, ["batch", "sequence", str(config.token_size)]),
        ("sentence_embedding", ir.DataType.FLOAT, ["batch", "160"]),
    ]
    assert config.token_size in (64, 160)  # as they are, or projected
    assert config.vocab_size == VOCABULARY
