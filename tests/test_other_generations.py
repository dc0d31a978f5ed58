"""Generations whose costly cases are `slow` elsewhere: each compiles for both back ends, proven, past the window."""

import json

import pytest

from gemma_deploy.compile import compile_recipe
from gemma_deploy.recipe import Recipe
from gemma_deploy.testing import write_tiny_checkpoint
from tests.calibration.make import write_tokenizer
from tests.rotation import OTHERS


@pytest.mark.parametrize("backend", [{"type": "onnxruntime", "dtype": "int8"}, {"type": "tvm_vacc", "dtype": "fp32"}])
@pytest.mark.parametrize("kind", OTHERS)
def test_it_compiles_proven(kind, backend, tmp_path):
    checkpoint = write_tiny_checkpoint(tmp_path / "ck", kind, num_hidden_layers=3)
    write_tokenizer(checkpoint)
    recipe = {
        "name": "x",
        "frontend": {"checkpoint": str(checkpoint), "shape": {"input_ids": [[48], [64]]}},
        "backend": backend,
        "parity": {"prompt_tokens": 40, "decode_tokens": 8},  # five windows of 8
        "workspace": {"path": str(tmp_path)},
    }
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))  # JSON is YAML
    result = compile_recipe(Recipe.load(tmp_path / "recipe.json"))
    assert result.parity.passed
    compared = {
        line["comparison"] for line in json.loads((result.path / "manifest.json").read_text())["parity"]["lines"]
    }
    assert {"hf = patched", "hf = strict"} <= compared
