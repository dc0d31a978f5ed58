"""What manifest.json and eval.json must hold: every key that something reads, of its type and within bounds."""

import copy
import json

import pytest
from pydantic import ValidationError

from gemma_deploy.artifact.manifest import Manifest
from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.bounds import lines_of
from gemma_deploy.cli import main
from gemma_deploy.errors import ArtifactError
from gemma_deploy.evaluation.schema import evaluation_problems

SENSITIVITY = {"layers": [1e-3, 2e-3], "table": None, "tokens": 32}
MORE = {
    "sensitivity": SENSITIVITY,
    "rescaling": {"exponents": {"model.layers.0.mlp.out": 3}, "wide": ["mlp"], "absmax": {"model.norm.out": 7.5}},
    "quantization": {"layers": [], "activations": {"bits": 8, "kept": ["model.layers.0.mlp.down_proj"]}},
    "kernels": {"integer": True, "candidates": 0, "wide": [], "block": 32},
}  # fmt: skip


def manifest_problems(value):
    try:
        Manifest.of(value)
    except ValidationError as error:
        return lines_of(error)
    return []


@pytest.fixture
def manifest(demo_artifact):
    return json.loads((demo_artifact / "manifest.json").read_text()) | copy.deepcopy(MORE)


def put(value, path, new):
    for part in path[:-1]:
        value = value[part]
    value[path[-1]] = new


def test_what_compile_writes_has_no_problem(manifest, genai_artifact):
    assert manifest_problems(manifest) == []
    for model_type in ("gemma", "gemma3_text"):
        assert manifest_problems(json.loads((genai_artifact(model_type) / "manifest.json").read_text())) == []


WRONG = [
    (("name",), None, "name: input should be a valid string"),
    (("format_version",), 2, None),  # not its work
    (("sensitivity", "layers", 0), "x", "sensitivity.layers.0: input should be a valid number"),
    (("sensitivity", "layers", 0), [], "sensitivity.layers.0: input should be a valid number"),
    (("sensitivity", "layers"), {}, "sensitivity.layers: input should be a valid array"),
    (("sensitivity",), None, None),
    (("rescaling", "exponents", "model.norm.in"), 10**9, "less than or equal to 64"),
    (("rescaling", "absmax", "model.layers.3"), 1.0, "is no point of a layer"),
    (("rescaling", "absmax", "model.norm.in"), "1", "absmax.model.norm.in: input should be a valid number"),
    (("quantization", "activations", "kept"), None, "quantization.activations.kept: input should be a valid array"),
    (("kernels", "integer"), "yes", "kernels.integer: input should be a valid boolean"),
    (("storage", "linears", "bits"), 3, "storage.linears.bits: input should be 4 or 8"),
    (("files", "../../etc/passwd"), {"bytes": 1, "sha256": "0"}, "not the path of a file in the artifact"),
    (("files", "/etc/passwd"), {"bytes": 1, "sha256": "0"}, "not the path of a file in the artifact"),
    (("files", "a\0b"), {"bytes": 1, "sha256": "0"}, "not the path of a file in the artifact"),
    (("files", "config.json", "bytes"), -1, "files.config.json.bytes: input should be greater than or equal to 0"),
    (("params", 0, "file"), "../x", "params.0.file: not the path of a file in the artifact"),
    (("params", 0, "shape"), [], "params.0.shape: tuple should have at least 1 item"),
    (("params", 0, "shape"), [0, 4], "params.0.shape.0: input should be greater than or equal to 1"),
    (("params", 0, "dtype"), "complex64", "params.0.dtype: input should be 'float32'"),
    (("params", 0, "name"), "weight", "params.0.name: string should match"),
    (("params",), [], "params: tuple should have at least 1 item"),
    (("model", "num_hidden_layers"), 10**12, "model.num_hidden_layers: input should be less than or equal to 1024"),
    (("model", "vocab_size"), True, "model.vocab_size: input should be a valid integer"),
    (("model", "eos_token_ids"), ["1"], "model.eos_token_ids.0: input should be a valid integer"),
    (("contract", "batch"), 0, "contract.batch: input should be greater than or equal to 1"),
    (("contract", "context"), 10**299, "contract.context: "),
    (("contract", "graphs", "../x"), {"inputs": [], "outputs": []}, "string should match pattern"),
    (("recipe", "backend", "type"), "../x", "recipe.backend.type: string should match"),
    (("recipe", "frontend", "model_kwargs", "embed_scale"), 1, "recipe.frontend.model_kwargs.embed_scale: "),
    (("recipe", "parity", "text"), 5, "recipe.parity.text: input should be a valid string"),
    (("recipe", "parity", "prompt_tokens"), "64", "recipe.parity.prompt_tokens: input should be a valid integer"),
    (("parity", "lines", 0, "passed"), 1, "parity.lines.0.passed: input should be a valid boolean"),
    (("parity", "divergence"), "here", "parity.divergence: "),
    (("ledger", 0, "effect"), [], "ledger.0.effect: input should be an object"),
    (("stages", 0, "bytes"), "1", "stages.0.bytes: input should be a valid integer"),
    (("op_census", "iter0", "Add"), None, "op_census.iter0.add: input should be a valid integer"),
    (("tool", "torch"), 2, "tool.torch: input should be a valid string"),
    (("key",), 5, "key: input should be a valid string"),
    (("scheme",), "w8a166", "no such scheme: 'w8a166'"),
    (("calibration",), {"sources": [], "windows": {"nsamples": 2}}, "calibration.windows.seqlen: "),
    (("calibration",), {"sources": [{"name": 1}], "windows": {}}, "calibration.sources.0.name: "),
    (("calibration",), {"sources": {}, "windows": {"nsamples": 2, "seqlen": 8}}, "calibration.sources: "),
]


@pytest.mark.parametrize(
    ("path", "value", "words"),
    WRONG,
    ids=lambda value: ".".join(map(str, value))[:40] if isinstance(value, tuple) else "",
)
def test_each_key_is_checked(manifest, path, value, words):
    put(manifest, path, value)
    problems = manifest_problems(manifest)
    if words is None:
        assert problems == []
    else:
        assert len(problems) >= 1
        assert any(words.lower() in problem.lower() for problem in problems), problems


def test_every_key_that_is_missing_is_named(manifest):
    for key in ("model", "files", "stages"):
        del manifest[key]
    del manifest["contract"]["batch"]
    missing = [f"{key}: field required" for key in ("contract.batch", "files", "model", "stages")]
    assert sorted(manifest_problems(manifest)) == missing


@pytest.mark.parametrize("value", [None, [], "x", 5])
def test_what_is_no_manifest_at_all(value):
    assert manifest_problems(value)


def test_an_artifact_is_refused_with_all_of_it(demo_copy, manifest, capsys):
    put(manifest, ("sensitivity", "layers", 0), "x")
    put(manifest, ("model", "vocab_size"), -1)
    (demo_copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"manifest\.json: is damaged") as caught:
        Artifact.open(demo_copy)
    assert len(caught.value.problems) == 2
    for command in ("inspect", "verify"):
        assert main([command, str(demo_copy)]) == 1
        assert "sensitivity.layers.0: input should be a valid number" in capsys.readouterr().err


RESULT = {
    "task": "ppl", "target": {"path": "a"}, "against": {"path": "b"}, "settings": {"text": "t", "windowing": "w"},
    "perplexity": 7.0, "perplexity_error": 0.1, "perplexity_reference": 6.9, "perplexity_reference_error": 0.1,
    "kl_mean": 1e-3, "top1": 0.99, "activation_absmax": {"model.norm.out": 3.0},
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"against": None}, None),
        ({"perplexity": None}, None),
        ({"perplexity": "7"}, "results.0.ppl.perplexity: input should be a valid number"),
        ({"task": "other"}, "results.0: input tag 'other'"),
        ({"settings": []}, "results.0.ppl.settings: "),
        ({"settings": {"text": "t"}}, "results.0.ppl.settings.windowing: field required"),
        ({"task": "ceval"}, "results.0.ceval.settings.split: field required"),
        ({"against": "b"}, "results.0.ppl.against: "),
        ({"activation_absmax": {"model.layers.x": 1.0}}, "is no point of a layer"),
    ],
)
def test_results_of_evaluations(change, words):
    problems = evaluation_problems({"format_version": 1, "results": [RESULT | change]})
    assert problems == [] if words is None else any(words in problem for problem in problems), problems


def test_what_was_compared_says_with_what_result():
    alone = {key: value for key, value in RESULT.items() if key not in ("kl_mean", "top1")}
    assert evaluation_problems({"results": [alone | {"against": None}]}) == []
    assert evaluation_problems({"results": [alone]}) == ["results.0.ppl: kl_mean, top1 missing beside against"]


def test_results_that_are_no_list():
    assert evaluation_problems({"results": {}})
    assert evaluation_problems([])
