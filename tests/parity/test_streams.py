"""Gemma 3n on the static pair: transformers' logits and tokens past five windows; what is wrong is named."""

import shutil

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.backends.tvm_vacc.runner import StaticRunner
from gemma_deploy.backends.tvm_vacc.segments import StrictSource
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.parity.cases import Case
from gemma_deploy.testing import write_tiny_checkpoint
from tests.exporting import write_artifact
from tests.parity.breaking import Graph
from tests.parity.conftest import finish, gate
from tests.parity.test_gate_fails import ATTENTION, assert_found
from tests.parity.test_reference import stock
from tests.parity.test_shared_layers import PROMPTS, STEPS, VECTORS, WINDOW


@pytest.fixture(scope="module")
def artifact_of(once):
    """Scheme -> a finished artifact, read only, its checkpoint beside it."""

    def artifact(scheme):
        def make(root):
            checkpoint = write_tiny_checkpoint(root / "checkpoint", "gemma3n_text", sliding_window=WINDOW)
            write_artifact(checkpoint, root / "graphs", scheme)
            finish(root / "graphs", checkpoint, scheme, root / "artifact")

        return once(f"gemma3n-{scheme}", make) / "artifact"

    return artifact


@pytest.fixture(scope="module")
def streams(artifact_of):
    return artifact_of("fp32")


@pytest.fixture(scope="module")
def transformers_own(streams):
    return stock(Checkpoint.open(streams.parent / "checkpoint"))


@pytest.fixture(scope="module")
def prompts():
    """Tokens among them that the table of vectors has no row for."""
    rng = np.random.default_rng(5)
    found = [rng.integers(3, 512, n).tolist() for n in PROMPTS]
    assert all(max(prompt) >= 480 for prompt in found)
    return found


@pytest.fixture
def copy(streams, tmp_path):
    return shutil.copytree(streams, tmp_path / "copy")


def broken_gate(artifact):
    return gate(artifact, prompt_tokens=32, decode_tokens=6)


def test_logits_are_transformers_and_greedy_tokens_too(streams, transformers_own, prompts):
    runner = StaticRunner(streams, "strict", 1)
    logits, sequences = runner.prefill(prompts), [list(prompt) for prompt in prompts]
    for step in range(STEPS):
        for row, sequence in enumerate(sequences):
            with torch.no_grad():
                expected = transformers_own(torch.tensor([sequence])).logits[0, -1].numpy()
            # 4.6e-6 measured
            assert np.abs(logits[row] - expected).max() <= 1e-5 * np.abs(expected).max(), (step, row)
            assert logits[row].argmax() == expected.argmax()
            sequence.append(int(expected.argmax()))
        logits = runner.step([sequence[-1] for sequence in sequences])


@pytest.mark.slow  # E2B's are seen by default
def test_layers_that_share_have_no_ports_and_one_row_of_a_prompt(streams):
    contract = Artifact.open(streams).manifest.contract
    caches = {name.split(".")[1] for one in contract.graphs["iter1"].inputs if "." in (name := one.name)}
    assert caches == set("0123")
    graph = onnx.shape_inference.infer_shapes(onnx.load(streams / "iter0.onnx", load_external_data=False)).graph
    rows = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in graph.value_info}
    assert [rows[f"model.layers.{layer}.mlp.up_proj.out"] for layer in range(7)] == [
        [2, 32, 160], [2, 32, 160], [2, 32, 96], [2, 32, 160], [2, 1, 160], [2, 1, 96], [2, 1, 160],
    ]  # fmt: skip


@pytest.mark.slow
def test_the_last_position_of_all_streams_is_what_all_positions_give(streams, transformers_own, prompts):
    case = Case("random", tuple(map(tuple, prompts)), ((), ()))
    (last,), (every,) = (StrictSource(streams, every=every).run([case]) for every in (False, True))
    for row, prompt in enumerate(prompts):
        assert (last[row].shape, every[row].shape) == ((1, 64), (len(prompt), 64))
        with torch.no_grad():
            expected = transformers_own.model(torch.tensor([prompt])).last_hidden_state[0].numpy()
        assert np.abs(every[row] - expected).max() <= 1e-5 * np.abs(expected).max()  # 1.9e-6 measured
        # one row of a GEMM, and one among others: 0 measured
        assert np.abs(last[row] - every[row][-1:]).max() <= 2e-6 * np.abs(every[row]).max()


@pytest.mark.slow
def test_an_intact_copy_passes(streams):
    result = broken_gate(streams)
    assert result.passed, result.summary


def node_with(graph, layer, number):
    """The node of a layer that computes with a constant, and which of its inputs it is."""
    stored = (one for one in graph.graph.initializer if one.raw_data or one.float_data)
    arrays = {one.name: numpy_helper.to_array(one) for one in stored}
    wanted = {
        name for name, array in arrays.items() if array.size == 1 and abs(float(array.ravel()[0]) - number) < 1e-5
    }
    nodes = (node for node in graph.graph.node if node.output[0].startswith(f"model.layers.{layer}."))
    return [(node, index) for node in nodes for index, name in enumerate(node.input) if name in wanted]


def another_layers_cache(graph):
    wrong = {f"past_key_values.2.{part}": f"past_key_values.0.{part}" for part in ("key", "value")}
    made = [[graph.maker(f"present.{i}.{part}").input[0] for part in ("key", "value")] for i in (2, 0)]
    wrong |= dict(zip(*made, strict=True))
    for node in (node for node in graph.graph.node if node.output[0].startswith("model.layers.4.")):
        node.input[:] = [wrong.get(one, one) for one in node.input]


def the_neighbours_vector(graph):
    graph.replace_constant(graph.maker("model.layers.3.per_layer_input"), 1, lambda index: index - 1)


def no_laurel(graph):
    name = "model.layers.1.laurel.post_laurel_norm.out"
    (node,) = graph.consumers(name)
    zero = graph.constant(np.zeros(64, np.float32))
    node.input[:] = [zero if one == name else one for one in node.input]


def deviation_of_a_sample(graph):
    """N - 1 in the place of N: the quantile by that much larger."""
    ((node, index),) = node_with(graph, 0, 1.6448536)
    graph.replace_constant(node, index, lambda value: value * np.float32((160 / 159) ** 0.5))


def no_root_of_two(graph):
    ((node, index),) = node_with(graph, 2, 2**0.5)
    graph.replace_constant(node, index, np.ones_like)


def correction_without_one(graph):
    (node,) = graph.consumers("model.layers.5.altup.correction_coefs.out")
    index = 1 - list(node.input).index("model.layers.5.altup.correction_coefs.out")
    graph.replace_constant(node, index, np.zeros_like)


def streams_of_another_size(graph):
    """What a projection makes is not brought to the embeddings' size."""
    (node, *_) = [one for one in graph.graph.node if one.op_type == "Div" and not one.output[0].startswith("model.l")]
    node.input[1] = graph.constant(np.float32(1))


BREAKAGES = [
    (another_layers_cache, "iter0", f"model.layers.4.{ATTENTION}"),
    (another_layers_cache, "iter1", f"model.layers.4.{ATTENTION}"),
    (the_neighbours_vector, "iter0", f"model.layers.3.{VECTORS}"),
    (no_laurel, "iter1", "model.layers.1.pre_feedforward_layernorm"),
    (deviation_of_a_sample, "iter0", "model.layers.0.mlp.act_fn"),
    (no_root_of_two, "iter0", "model.layers.2.per_layer_input_gate"),
    (correction_without_one, "iter1", "model.layers.5.per_layer_input_gate"),
    (streams_of_another_size, "iter0", "model.layers.0.input_layernorm"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("broken", "name", "where"), BREAKAGES, ids=[f"{one.__name__}-{graph}" for one, graph, _ in BREAKAGES]
)
def test_what_is_wrong_is_named(broken, name, where, copy):
    with Graph(copy, name) as graph:
        broken(graph)
    phase = "prefill" if name == "iter0" else "decode"
    assert_found(broken_gate(copy), where, phase, ("patched", "strict"))
