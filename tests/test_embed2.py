"""EmbeddingGemma 2 from its published layout to vectors, for both targets; its gate, and schemes."""

import json
import re
import shutil

import numpy as np
import pytest

from gemma_deploy import open_embedder
from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.compile import compile_recipe
from gemma_deploy.errors import GateError, RecipeError
from gemma_deploy.testing import TINY_PROMPTS
from tests.encoders import SECOND, stock, stock_states, stock_vector, texts, write_encoder
from tests.test_embed import SCHEMES, TEXTS, compiled, ids_of, recipe_of, run


@pytest.fixture(scope="session")
def checkpoint(once):
    return once("encoder2", lambda root: write_encoder(root / "checkpoint", which=SECOND)) / "checkpoint"


@pytest.fixture(scope="session")
def dynamic(once, checkpoint):
    """For ONNX Runtime, in float32."""
    return once("encoder2-onnxruntime", lambda root: compiled(checkpoint, root / "a", backend="onnxruntime")) / "a"


@pytest.fixture(scope="session")
def static(once, checkpoint):
    """One graph of two texts of 64 tokens."""
    return once("encoder2-tvm_vacc", lambda root: compiled(checkpoint, root / "a", backend="tvm_vacc", batch=2)) / "a"


@pytest.fixture
def artifact(request):
    return request.getfixturevalue({"onnxruntime": "dynamic", "tvm_vacc": "static"}[request.param])


both = pytest.mark.parametrize(
    "artifact", ["onnxruntime", pytest.param("tvm_vacc", marks=pytest.mark.slow)], indirect=True
)


@both
def test_vectors_are_those_of_transformers_and_the_gate_has_passed(artifact, checkpoint):
    found = open_embedder(artifact).embed(TEXTS, prompt_name="query")
    for text, vector in zip(TEXTS, found, strict=True):
        expected = stock_vector(checkpoint, ids_of(checkpoint, TINY_PROMPTS["query"] + text))
        np.testing.assert_allclose(vector, expected, rtol=0, atol=2e-6)
    manifest = Artifact.open(artifact).manifest
    lines = {(line.comparison, line.name): line.value for line in manifest.parity.lines}
    assert manifest.parity.passed
    assert lines["hf = patched", "relative error"] == 0
    assert lines["hf = strict", "relative error"] <= 1e-5
    assert lines["hf = shipped", "largest cosine distance"] <= 1e-11
    states, vectors = manifest.contract.graphs["model"].outputs
    assert (states.shape[-1], vectors.shape[-1]) == (160, 160)
    rows = {row.name: list(row.shape) for row in manifest.params}
    assert rows["model.ple.per_layer_model_projection.weight"] == [7 * 96, 64]
    assert rows["model.embedding_projection.weight"] == [160, 64]


@both
def test_hidden_states_of_the_strict_graph(artifact, checkpoint):
    graph = open_embedder(artifact, strict=True).graph
    for text, states in zip(texts(), graph.both(texts())[0], strict=True):
        expected = stock_states(checkpoint, text)
        assert np.abs(states - expected).max() / np.abs(expected).max() < 1e-5


def test_inspect_shows_artifact_and_checkpoint(dynamic, checkpoint, capsys):
    for path in (dynamic, checkpoint):
        code, out, _ = run(capsys, "inspect", path, "--json")
        assert code == 0
        assert json.loads(out)["encoder"]["vectors"] == "160, 128 channels"


@pytest.mark.parametrize("backend", ["onnxruntime", "tvm_vacc"])
def test_there_is_no_table_of_vectors_to_choose_a_form_for(checkpoint, tmp_path, backend):
    overrides = ["frontend.quantize.per_layer_table=int8"]
    recipe = recipe_of(checkpoint, backend, dtype="int8", quantize="{type: w8a16}", overrides=overrides)
    with pytest.raises(RecipeError, match="this model has no table of per-layer vectors: remove it"):
        compile_recipe(recipe, out=tmp_path / "a")


def test_the_gate_sees_a_wrong_graph(checkpoint, tmp_path, monkeypatch):
    from tests.backends import test_encoder as breaks

    breaks.vectors_of_the_next_layer(monkeypatch)
    with pytest.raises(GateError, match="does not compute the model") as caught:
        compile_recipe(recipe_of(checkpoint, "onnxruntime"), out=tmp_path / "a")
    assert any("hf = strict: relative error" in problem for problem in caught.value.problems)


@pytest.mark.slow
def test_dynamic_graphs_of_the_static_target_take_any_lengths(checkpoint, dynamic, tmp_path):
    overrides = ["frontend.shape.dynamic=true"]
    found = open_embedder(compiled(checkpoint, tmp_path / "a", backend="tvm_vacc", overrides=overrides))
    assert found.longest == 128
    np.testing.assert_allclose(found.embed(TEXTS), open_embedder(dynamic).embed(TEXTS), atol=2e-6)


@pytest.mark.slow
def test_sentence_transformers_gives_the_same_vectors(dynamic, checkpoint, tmp_path):
    """Version 6.2, of the text model alone: for the whole one it wants to read images as well."""
    library = pytest.importorskip("sentence_transformers")
    kwargs = {"attn_implementation": "eager", "dtype": "float32"}
    folder = shutil.copytree(checkpoint, tmp_path / "text")
    stock(checkpoint).save_pretrained(folder)
    model = library.SentenceTransformer(str(folder), device="cpu", model_kwargs=kwargs)
    expected = model.encode(TEXTS, prompt_name="query", convert_to_numpy=True)
    np.testing.assert_allclose(open_embedder(dynamic).embed(TEXTS, prompt_name="query"), expected, atol=2e-6)
    assert np.abs(expected - model.encode(TEXTS, convert_to_numpy=True)).max() > 0.01  # the prompt is read


NAMES = [" ".join((*one[:2], re.sub("[{}]|type: |null", "", one[2]))).strip() for one in SCHEMES]


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "dtype", "quantize"), SCHEMES, ids=NAMES)
def test_every_scheme_compiles_proven(checkpoint, dynamic, tmp_path, backend, dtype, quantize):
    # Random weights of this size lose in 4 bits 0.03 to 0.05 of 1 - cosine (GPTQ; 0.04 to 0.06 to nearest), the worst
    # of many random texts 0.18 and 0.21, which is more than the gate lets trained ones lose.
    overrides = ["parity.gate=false"] if "w4" in quantize else []
    out = compiled(checkpoint, tmp_path / "a", backend=backend, dtype=dtype, quantize=quantize, overrides=overrides)
    manifest = Artifact.open(out).manifest
    lines = {(line.comparison, line.name): line.value for line in manifest.parity.lines}
    if dtype != "fp16":
        assert lines[f"patched {manifest.scheme} = strict", "relative error"] <= 1e-5
    rows = {row.name: row.dtype for row in manifest.params}
    assert rows["model.embedding_projection.weight"] == {"bf16": "bfloat16"}.get(dtype, "float16")
    if dtype == "int8":
        for module in ("model.ple.per_layer_model_projection", "model.layers.0.ple_block.per_layer_projection"):
            assert rows[f"{module}.weight"] in ("int8", "uint8")  # whatever linears have
    if (backend, dtype) == ("onnxruntime", "bf16"):
        return  # no such kernels for a CPU
    cosines = (open_embedder(out).embed(TEXTS[:2]) * open_embedder(dynamic).embed(TEXTS[:2])).sum(1)
    assert cosines.min() > (0.9 if "w4" in quantize else 0.995)
