"""`gemma-deploy embed`: an encoder compiled for both targets, its vectors, its gate, and what is refused."""

import io
import json
import re
import shutil

import numpy as np
import pytest

from gemma_deploy import open_embedder
from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.cli import main
from gemma_deploy.compile import compile_recipe
from gemma_deploy.errors import ArtifactError, GateError, RecipeError, UsageError
from gemma_deploy.parity.compare import ParityResult
from gemma_deploy.parity.encoder import DISTANCES
from gemma_deploy.parity.gates import Line
from gemma_deploy.recipe import Recipe
from gemma_deploy.schemes import FLOATS, QUANTIZERS, Scheme
from gemma_deploy.stages.gate import advice
from gemma_deploy.testing import TINY_PROMPTS
from gemma_deploy.text import Tokenizer
from tests.encoders import stock_states, stock_vector, texts, write_encoder

TEXTS = ["which planet is red", "a text that is far longer than the window of ten, " * 3, ""]
RECIPE = """
name: encoder
frontend:
  checkpoint: {checkpoint}
  shape: {{input_ids: [[64], [128]], batch: {batch}}}
  quantize: {quantize}
dataset: {{nsamples: 2, seqlen: 48}}
backend: {{type: {backend}, dtype: {dtype}}}
parity: {{prompt_tokens: 48}}
"""


def recipe_of(checkpoint, backend, dtype="fp32", quantize="null", batch=1, overrides=()):
    text = RECIPE.format(checkpoint=checkpoint, backend=backend, dtype=dtype, quantize=quantize, batch=batch)
    return Recipe.from_text(text, overrides)


def compiled(checkpoint, out, **given):
    """Compile with the gate; exports are done once and kept."""
    compile_recipe(recipe_of(checkpoint, **given), out=out)
    return out


@pytest.fixture(scope="session")
def checkpoint(once):
    return once("encoder", lambda root: write_encoder(root / "checkpoint")) / "checkpoint"


@pytest.fixture(scope="session")
def dynamic(once, checkpoint):
    """For ONNX Runtime, in float32."""
    return once("encoder-onnxruntime", lambda root: compiled(checkpoint, root / "a", backend="onnxruntime")) / "a"


@pytest.fixture(scope="session")
def static(once, checkpoint):
    """One graph of two texts of 64 tokens."""
    return once("encoder-tvm_vacc", lambda root: compiled(checkpoint, root / "a", backend="tvm_vacc", batch=2)) / "a"


@pytest.fixture
def artifact(request, dynamic, static):
    return {"onnxruntime": dynamic, "tvm_vacc": static}[request.param]


both = pytest.mark.parametrize("artifact", ["onnxruntime", "tvm_vacc"], indirect=True)


def ids_of(checkpoint, text, longest=64):
    """As transformers' tokenizer makes them."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(checkpoint)(text, truncation=True, max_length=longest)["input_ids"]


@both
def test_vectors_are_those_of_transformers(artifact, checkpoint):
    """Measured 2.4e-13 and 5e-14 of 1 - cosine in float64."""
    found = open_embedder(artifact).embed(TEXTS, prompt_name="query")
    assert found.dtype == np.float32
    assert found.shape == (3, 160)
    for text, vector in zip(TEXTS, found, strict=True):
        expected = stock_vector(checkpoint, ids_of(checkpoint, TINY_PROMPTS["query"] + text))
        np.testing.assert_allclose(vector, expected, rtol=0, atol=2e-6)


@both
def test_the_gate_is_in_the_manifest_and_speaks_of_states_and_vectors(artifact):
    manifest = Artifact.open(artifact).manifest
    lines = {(line.comparison, line.name): line.value for line in manifest.parity.lines}
    assert manifest.parity.passed
    assert lines["hf = patched", "relative error"] == 0
    assert lines["hf = strict", "relative error"] <= 1e-5
    assert lines["hf = shipped", "largest cosine distance"] <= 1e-11
    assert list(manifest.contract.graphs) == ["model"]
    ports = manifest.contract.graphs["model"]
    assert [port.name for port in ports.inputs] == ["input_ids", "attention_mask"]
    assert [port.name for port in ports.outputs] == ["last_hidden_state", "sentence_embedding"]
    assert not any("past_key_values" in file or "genai" in file for file in manifest.files)
    assert manifest.model.sentence.dimensions == 160


def test_hidden_states_of_the_strict_graph(dynamic, static, checkpoint):
    """Measured 1.3e-6 and 1.2e-6 of the largest."""
    for artifact in (dynamic, static):
        graph = open_embedder(artifact, strict=True).graph
        for text, states in zip(texts(), graph.both(texts())[0], strict=True):
            expected = stock_states(checkpoint, text)
            assert np.abs(states - expected).max() / np.abs(expected).max() < 1e-5


@both
def test_company_order_and_batches_change_nothing(artifact):
    embedder = open_embedder(artifact)
    many = [f"text {'and more ' * number}" for number in (5, 0, 3, 1, 4)]
    whole = embedder.embed(many)
    for batch in (1, 2, 64):
        np.testing.assert_allclose(embedder.embed(many, batch=batch), whole, atol=2e-6)
    np.testing.assert_allclose(embedder.embed(many[::-1]), whole[::-1], atol=2e-6)
    seen = []
    embedder.embed(many, batch=2, progress=lambda done, of: seen.append((done, of)))
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_cut_vectors_have_length_1(dynamic):
    embedder = open_embedder(dynamic)
    whole, small = embedder.embed(TEXTS), embedder.embed(TEXTS, dimensions=128)
    assert embedder.sizes == (160, 128)
    assert np.linalg.norm(whole[:, :128], axis=1).max() < 0.99  # so that length 1 is something that was done
    np.testing.assert_allclose(np.linalg.norm(small, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(small * np.linalg.norm(whole[:, :128], axis=1)[:, None], whole[:, :128], atol=1e-6)


def test_a_long_text_is_cut_as_transformers_does_and_that_is_told(static, checkpoint, caplog):
    long = "word " * 200
    (found,) = open_embedder(static).embed([long])
    ids = ids_of(checkpoint, long)
    assert len(ids) == 64
    assert ids[-1] == 1
    np.testing.assert_allclose(found, stock_vector(checkpoint, ids), rtol=0, atol=2e-6)
    assert re.search(r"text 1 has \d{3} tokens: only the first 64 are read", caplog.text)


@pytest.mark.parametrize("ends", [True, False], ids=["bos and eos", "bos"])
def test_what_stands_before_and_behind_a_text(tmp_path, ends):
    """add_eos_token of tokenizer_config.json is not looked at: transformers drops it."""
    folder = write_encoder(tmp_path / "checkpoint", ends=ends, num_hidden_layers=1)
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"add_eos_token": not ends}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer(folder)
    assert tokenizer.frame == ((2,), (1,) if ends else ())
    for text in (*TEXTS, "<bos>spelled"):
        ids, left = tokenizer.encode_framed(text, 20)
        assert ids == ids_of(folder, text, 20)
        assert left == max(0, len(ids_of(folder, text, 1000)) - 20)


def test_a_default_prompt_is_put_in_front(tmp_path, dynamic):
    folder = shutil.copytree(dynamic, tmp_path / "a")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["model"]["sentence"]["default_prompt"] = "query"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    embedder = open_embedder(folder)
    np.testing.assert_array_equal(embedder.embed(TEXTS), embedder.embed(TEXTS, prompt_name="query"))
    assert np.abs(embedder.embed(TEXTS) - embedder.embed(TEXTS, prompt_name="document")).max() > 0.01


@both
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda manifest: manifest["model"]["sentence"].update(dimensions=64), "says vectors of 64 channels"),
        (lambda manifest: manifest["contract"]["graphs"]["model"]["outputs"].pop(), "sentence_embedding: not in the"),
        (lambda manifest: manifest["contract"]["graphs"]["model"]["inputs"][0].update(shape=[3, 5]), "input_ids: "),
        (lambda manifest: manifest["contract"]["graphs"].clear(), "graph and manifest disagree"),
        (lambda manifest: manifest["model"]["sentence"].update(dense="no"), "model.sentence.dense"),
        (lambda manifest: manifest["contract"].update(batch=7, dynamic=False), "input_ids: "),
    ],
    ids=["dimensions", "no vectors", "another shape", "no graph", "dense", "batch"],
)
def test_a_manifest_that_is_not_the_graph_s_is_refused(tmp_path, artifact, change, said):
    folder = shutil.copytree(artifact, tmp_path / "a")
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=re.escape(said)):
        open_embedder(folder)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"texts": TEXTS, "prompt_name": "title"}, "no prompt named 'title'"),
        ({"texts": TEXTS, "dimensions": 100}, "not cut to 100 channels"),
        ({"texts": []}, "there is no text"),
        ({"texts": "one"}, "texts is one string"),
        ({"texts": ["\udcff"]}, "not Unicode"),
    ],
)
def test_what_makes_no_sense_is_said(dynamic, given, said):
    with pytest.raises(UsageError, match=said):
        open_embedder(dynamic).embed(given.pop("texts"), **given)


def run(capsys, *words):
    code = main([str(word) for word in words])
    found = capsys.readouterr()
    return code, found.out, found.err


def test_the_command_prints_json(dynamic, capsys):
    words = ["-p", TEXTS[0], "-p", TEXTS[1], "--prompt-name", "query", "--dimensions", 128, "--stats"]
    code, out, err = run(capsys, "embed", dynamic, *words)
    found = json.loads(out)
    expected = open_embedder(dynamic).embed(TEXTS[:2], prompt_name="query", dimensions=128)
    assert code == 0
    assert (found["prompt"], found["dimensions"]) == (TINY_PROMPTS["query"], 128)
    np.testing.assert_array_equal(np.array(found["embeddings"], np.float32), expected)
    assert "2 texts in" in err


def test_lines_of_a_file_and_of_standard_input(dynamic, tmp_path, capsys, monkeypatch):
    (tmp_path / "lines.txt").write_text("\n".join(TEXTS[::-1]) + "\n")  # an empty line is a text
    expected = open_embedder(dynamic).embed(TEXTS[::-1])
    assert run(capsys, "embed", dynamic, "--file", tmp_path / "lines.txt", "--out", tmp_path / "a.npy") == (0, "", "")
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), expected)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(TEXTS[::-1])))
    assert run(capsys, "embed", dynamic, "--out", tmp_path / "a.json")[0] == 0
    found = json.loads((tmp_path / "a.json").read_text())["embeddings"]
    np.testing.assert_array_equal(np.array(found, np.float32), expected)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-p", "a", "--out", "vectors.txt"], "ends in .npy or .json"),
        (["-p", "a", "--file", "x.txt"], "with -p or in a file, not both"),
        (["--file", "gone.txt"], "gone.txt"),
        (["-p", "a", "--prompt-name", "title"], "expected: document, query"),
        (["-p", "a", "--dimensions", "100"], "expected: 160, 128"),
    ],
)
def test_wrong_words_are_told(dynamic, capsys, words, said):
    code, out, err = run(capsys, "embed", dynamic, *words)
    assert (code, out) == (2, "")
    assert said in err
    assert "Traceback" not in err


@both
@pytest.mark.parametrize(
    "words",
    [["run", "-p", "a"], ["run", "-p", "a", "--lookup"], ["chat"], ["eval", "--task", "ppl"], ["bench"],
     ["adapter", "x"]],
    ids=" ".join,
)  # fmt: skip
def test_commands_of_a_decoder_refuse_it(artifact, capsys, words):
    code, out, err = run(capsys, words[0], artifact, *words[1:])
    assert (code, out) == (2, "")
    assert "this artifact is an encoder" in err
    assert "next:" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("words", [["calibrate"], ["stage"], ["split"], ["merge"], ["finetune"]], ids=" ".join)
def test_commands_on_a_checkpoint_refuse_it(checkpoint, tmp_path, capsys, words):
    (tmp_path / "data.jsonl").write_text('{"text": "a"}\n')
    more = {
        "calibrate": ["--checkpoint", checkpoint, "--dataset", "c4", "--workspace", tmp_path],
        "stage": [checkpoint, tmp_path / "out"],
        "split": [checkpoint],
        "merge": [checkpoint, tmp_path, tmp_path / "out"],
        "finetune": ["--checkpoint", checkpoint, "--data", tmp_path / "data.jsonl", "--out", tmp_path / "out"],
    }[words[0]]
    code, _, err = run(capsys, words[0], *more)
    assert code == 2, err
    assert "is an encoder (EmbeddingGemma)" in err


def test_an_artifact_that_generates_makes_no_vectors(demo_artifact, capsys):
    code, _, err = run(capsys, "embed", demo_artifact, "-p", "a")
    assert code == 2
    assert "this artifact generates text: it makes no vectors" in err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"backend": "tvm_vacc", "dtype": "int8", "quantize": "{type: w8a16+kv8}"}, "has no cache: leave \\+kv8 out"),
        ({"backend": "tvm_vacc", "dtype": "fp16", "quantize": "{type: w16kv8}"}, "cache: remove frontend.quantize"),
        ({"backend": "tvm_vacc", "dtype": "int8", "quantize": "{type: w8a8}"}, "w8a8 is not built for encoders"),
        ({"backend": "tvm_vacc", "overrides": ["frontend.model_kwargs.tp=2"]}, "is not divided"),
        ({"backend": "onnxruntime", "overrides": ["adapters.rank=4"]}, "an encoder takes none at run time"),
        ({"backend": "onnxruntime", "overrides": ["backend.compile.cache=window"]}, "window means nothing to an enc"),
        ({"backend": "onnxruntime", "overrides": ["backend.compile.logits=all"]}, "all means nothing to an encoder"),
    ],
)
def test_a_recipe_for_decoders_is_refused_key_by_key(checkpoint, tmp_path, given, said):
    with pytest.raises(RecipeError, match=said):
        compile_recipe(recipe_of(checkpoint, **given), out=tmp_path / "a")


SCHEMES = [
    ("tvm_vacc", "fp16", "null"), ("tvm_vacc", "bf16", "null"), ("tvm_vacc", "int8", "{type: w8a16}"),
    ("tvm_vacc", "int8", "{type: w8a16_gptq}"), ("tvm_vacc", "int8", "{type: w4a16_gptq}"),
    ("onnxruntime", "bf16", "null"), ("onnxruntime", "int8", "{type: w8a16}"),
    ("onnxruntime", "int8", "{type: w8a16_gptq}"), ("onnxruntime", "int8", "{type: w4a16_gptq}"),
    ("onnxruntime", "int8", "{type: w4a16_rtn}"),
]  # fmt: skip
NAMES = [" ".join((*one[:2], re.sub("[{}]|type: |null", "", one[2]))).strip() for one in SCHEMES]
DEFAULT = {"onnxruntime int8 w8a16"}


@pytest.mark.parametrize(
    ("backend", "dtype", "quantize"),
    [
        pytest.param(*one, id=name, marks=[] if name in DEFAULT else pytest.mark.slow)
        for one, name in zip(SCHEMES, NAMES, strict=True)
    ],
)
def test_every_scheme_compiles_proven(checkpoint, dynamic, tmp_path, backend, dtype, quantize):
    out = compiled(checkpoint, tmp_path / "a", backend=backend, dtype=dtype, quantize=quantize)
    manifest = Artifact.open(out).manifest
    lines = {(line.comparison, line.name): line.value for line in manifest.parity.lines}
    if dtype != "fp16":
        assert lines[f"patched {manifest.scheme} = strict", "relative error"] <= 1e-5
    rows = {row.name: row.dtype for row in manifest.params}
    assert rows["2_Dense.linear.weight"] == {"bf16": "bfloat16"}.get(dtype, "float16")
    if (backend, dtype) == ("onnxruntime", "bf16"):
        return  # no such kernels for a CPU
    cosines = (open_embedder(out).embed(TEXTS[:2]) * open_embedder(dynamic).embed(TEXTS[:2])).sum(1)
    assert cosines.min() > (0.9 if "w4" in quantize else 0.995)


@pytest.mark.slow
def test_dynamic_graphs_of_the_static_target_take_any_lengths(checkpoint, dynamic, tmp_path):
    recipe = recipe_of(checkpoint, "tvm_vacc", overrides=["frontend.shape.dynamic=true"])
    compile_recipe(recipe, out=tmp_path / "a", parity=False)
    found = open_embedder(tmp_path / "a")
    assert found.longest == 128
    np.testing.assert_allclose(found.embed(TEXTS), open_embedder(dynamic).embed(TEXTS), atol=2e-6)


@pytest.mark.parametrize(
    "what", ["causal", *(pytest.param(one, marks=pytest.mark.slow) for one in ("dense", "padding"))]
)
def test_the_gate_sees_a_wrong_graph(checkpoint, tmp_path, monkeypatch, what):
    from gemma_deploy.backends.onnxruntime import encoder
    from tests.backends import test_encoder as breaks

    said = "hf = strict: relative error"
    if what == "causal":
        breaks.causal(monkeypatch)
    elif what == "padding":
        breaks.padding_pooled(monkeypatch)
        said = "own states = strict: largest cosine distance"
    else:
        vectors = encoder._Encoder._vectors
        monkeypatch.setattr(encoder._Encoder, "_vectors", lambda self, states, mask: vectors(
            self, self.nodes.one("Relu", [states], "wrong"), mask))  # fmt: skip
        said = "own states = strict: largest cosine distance"
    with pytest.raises(GateError, match="does not compute the model") as caught:
        compile_recipe(recipe_of(checkpoint, "onnxruntime"), out=tmp_path / "a")
    assert any(said in problem for problem in caught.value.problems)


def test_every_scheme_that_is_built_has_a_limit():
    assert set(DISTANCES) == {*FLOATS, *QUANTIZERS} - {"w8a8"}


def test_a_graph_that_is_right_and_loses_too_much_is_no_bug():
    right = Line("patched w8a16 = strict", "relative error", 1e-6, 5e-5, True)
    far = Line("hf = strict", "largest cosine distance", 0.02, 0.01, False)
    assert "rounding loses too much" in advice(Scheme("w8a16"), ParityResult([right, far]))
    wrong = Line("patched w8a16 = strict", "relative error", 1e-2, 5e-5, False)
    assert "a bug in gemma-deploy" in advice(Scheme("w8a16"), ParityResult([wrong, far]))


def test_parity_inspect_and_verify_take_it(dynamic, tmp_path, capsys):
    copy = shutil.copytree(dynamic, tmp_path / "a")
    code, out, err = run(capsys, "parity", copy, "--prompt-tokens", 40)
    assert code == 0, err
    assert "passed" in out
    assert "cosine distance" in out
    assert "mean KL" not in out
    page = (copy / "report.html").read_text()
    assert "gemma-deploy embed" in page
    assert "gemma-deploy run" not in page
    assert "128 of a text at most, any batch" in page
    code, out, _ = run(capsys, "inspect", copy, "--json")
    assert code == 0
    assert json.loads(out)["encoder"]["prompts"].startswith("document: 'title: none | text: '")
    assert run(capsys, "verify", copy)[0] == 0


def test_inspect_shows_a_checkpoint(checkpoint, capsys):
    code, out, _ = run(capsys, "inspect", checkpoint, "--json")
    assert code == 0
    assert json.loads(out)["encoder"]["vectors"] == "160, 128 channels"


@pytest.mark.slow
def test_sentence_transformers_gives_the_same_vectors(dynamic, checkpoint):
    """Version 6.2: 3e-7."""
    library = pytest.importorskip("sentence_transformers")
    kwargs = {"attn_implementation": "eager", "dtype": "float32"}
    model = library.SentenceTransformer(str(checkpoint), device="cpu", model_kwargs=kwargs)
    expected = model.encode(TEXTS, prompt_name="query", convert_to_numpy=True)
    np.testing.assert_allclose(open_embedder(dynamic).embed(TEXTS, prompt_name="query"), expected, atol=2e-6)
