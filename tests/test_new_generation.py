"""A generation that is Gemma 3 under another name: a module, a file of modeling code and a row, and all else works."""

import json

import pytest

from gemma_deploy.testing import write_tiny_checkpoint
from tests.calibration.make import write_tokenizer
from tests.program import changed_lines, command_of, copy_program, touched

MODULE = '''"""Gemma 3 under another name."""

from dataclasses import replace

from gemma_deploy.architectures.base import Patched
from gemma_deploy.architectures.gemma3 import GEMMA3

OTHER = replace(
    GEMMA3,
    name="Gemma X",
    model_type="gemmax_text",
    gguf=replace(GEMMA3.gguf, name="gemmax"),
    multimodal=("gemmax",),
    patched=Patched(
        configuration="modeling_gemmax_vacc",
        config_class="GemmaXConfig",
        modeling="modeling_gemmax_vacc",
        stack="GemmaXModel",
        causal="GemmaXForCausalLM",
        classifier="GemmaXForSequenceClassification",
    ),
)
'''
MODELING = '''"""Gemma 3 under another name."""

from huggingface_hub.dataclasses import strict

from .configuration_gemma3_vacc import Gemma3TextConfig
from .modeling_gemma3_vacc import Gemma3ForCausalLM, Gemma3TextForSequenceClassification, Gemma3TextModel


@strict
class GemmaXConfig(Gemma3TextConfig):
    model_type = "gemmax_text"


class GemmaXModel(Gemma3TextModel):
    config_class = GemmaXConfig


class GemmaXForCausalLM(Gemma3ForCausalLM):
    config_class = GemmaXConfig


class GemmaXForSequenceClassification(Gemma3TextForSequenceClassification):
    config_class = GemmaXConfig
'''


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """A copy of the program with one generation more; files that had to be touched."""
    root = copy_program(tmp_path_factory.mktemp("program"))
    (root / "gemma_deploy/architectures/gemmax.py").write_text(MODULE)
    (root / "source_code/modeling_gemmax_vacc.py").write_text(MODELING)
    table = root / "gemma_deploy/architectures/__init__.py"
    text = table.read_text()
    text = text.replace("import GEMMA3\n", "import GEMMA3\nfrom gemma_deploy.architectures.gemmax import OTHER\n", 1)
    table.write_text(text.replace("    EMBEDDING_GEMMA2,\n", "    EMBEDDING_GEMMA2,\n    OTHER,\n", 1))
    return root


@pytest.fixture(scope="module")
def run(program, tmp_path_factory):
    """Run the copied program on a tiny checkpoint of the new generation."""
    work = tmp_path_factory.mktemp("work")
    path = write_tiny_checkpoint(work / "ck", "gemma3_text", num_hidden_layers=3, sliding_window_pattern=3)
    write_tokenizer(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"model_type": "gemmax_text"}))

    return command_of(program, work)


def test_two_files_and_a_row(program):
    assert touched(program) == [
        "gemma_deploy/architectures/__init__.py",
        "gemma_deploy/architectures/gemmax.py",
        "source_code/modeling_gemmax_vacc.py",
    ]
    assert changed_lines(program, "gemma_deploy/architectures/__init__.py") == 2  # its import, and the row


@pytest.mark.parametrize(
    ("backend", "quantize"),
    [
        ({"type": "tvm_vacc", "dtype": "fp32"}, None),
        ({"type": "onnxruntime", "dtype": "int8"}, {"type": "w8a16_gptq", "calib_args": {"sensitivity": False}}),
    ],
)
def test_it_compiles_proven(run, tmp_path, backend, quantize):
    recipe = {
        "name": "x",
        "frontend": {"checkpoint": "ck", "shape": {"input_ids": [[32], [48]]}, "quantize": quantize},
        "dataset": {"name": "c4:4", "seqlen": 64},
        "backend": backend,
        "parity": {"prompt_tokens": 32, "decode_tokens": 8},
        "workspace": {"path": str(tmp_path)},
    }
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    done = run("compile", tmp_path / "r.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    manifest = json.loads((tmp_path / "x/manifest.json").read_text())
    assert manifest["model"]["model_type"] == "gemmax_text"
    assert manifest["parity"]["passed"] is True
    lines = {line["comparison"] for line in manifest["parity"]["lines"]}
    assert {"hf = patched", "hf = strict"} <= lines


def test_it_is_staged_split_and_refused_by_its_names(run, tmp_path):
    assert run("stage", "ck", tmp_path / "staged").returncode == 0
    staged = json.loads((tmp_path / "staged/config.json").read_text())
    assert staged["auto_map"]["AutoModelForCausalLM"] == "modeling_gemmax_vacc.GemmaXForCausalLM"
    assert run("split", "ck", tmp_path / "parts").returncode == 0
    (tmp_path / "ck").mkdir()
    (tmp_path / "ck/config.json").write_text('{"model_type": "gemmax"}')
    (tmp_path / "ck/model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    refused = run("inspect", tmp_path / "ck").stderr
    assert "tensor(s) do not fit the config" in refused  # of its language model, which the row has
    (tmp_path / "ck/config.json").write_text('{"model_type": "gemmay"}')
    assert ", gemmax_text, gemma3, gemma4, gemma4_unified, gemmax" in (run("inspect", tmp_path / "ck").stderr)
