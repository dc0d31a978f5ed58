"""T1: an engine in a Python of its own is looked at before there is work that is for nothing without it."""

import json
import sys
from dataclasses import replace

import pytest

from gemma_deploy import extras
from gemma_deploy.backends.gguf.source import ENGINE as LLAMA
from gemma_deploy.backends.vllm.source import ENGINE as VLLM
from gemma_deploy.cli import main
from gemma_deploy.errors import UsageError
from gemma_deploy.testing import write_tiny_checkpoint
from tests.calibration.make import write_tokenizer


@pytest.fixture(params=[LLAMA, VLLM], ids=["gguf", "vllm"])
def engine(request, monkeypatch):
    """An engine whose Python is this one, which lacks it."""
    monkeypatch.setenv(request.param.variable, sys.executable)
    return request.param


def test_what_it_needs_is_imported_there(engine):
    at_once = {"PYTHONUNBUFFERED": "1"}
    replace(engine, module="json", beside=("this",), variables=at_once).check()  # `this` prints twenty lines


def test_what_does_not_import_is_told(engine):
    with pytest.raises(UsageError, match="does not import in the Python that it is to run in") as told:
        replace(engine, module="json", beside=("no_such_module",)).check()
    assert told.value.problems[-1] == "ModuleNotFoundError: No module named 'no_such_module'"
    assert told.value.where == sys.executable
    assert f"pip install {engine.package}" in told.value.next_step


@pytest.mark.parametrize(
    ("program", "says"), [("exit 0", "it ended without a word"), ("echo $*", "it answers something else than JSON")]
)
def test_a_program_that_is_no_python_is_told(engine, tmp_path, monkeypatch, program, says):
    file = tmp_path / "python"
    file.write_text(f"#!/bin/sh\n{program}\n")
    file.chmod(0o755)
    monkeypatch.setenv(engine.variable, str(file))
    with pytest.raises(UsageError, match="does not import") as told:
        engine.check()
    assert told.value.problems == (says,)


def test_modules_of_the_current_directory_are_not_taken(engine, tmp_path, monkeypatch):
    (tmp_path / "no_such_module.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UsageError, match="does not import"):
        replace(engine, module="no_such_module").check()


@pytest.fixture
def recipe(tmp_path):
    """`backend.type` -> a recipe that calibrates."""
    checkpoint = write_tiny_checkpoint(tmp_path / "checkpoint", "gemma")
    write_tokenizer(checkpoint)

    def of(kind):
        file = tmp_path / "recipe.json"  # JSON is YAML
        file.write_text(
            json.dumps(
                {
                    "name": "x",
                    "frontend": {
                        "checkpoint": str(checkpoint),
                        "shape": {"input_ids": [[32], [64]]},
                        "quantize": {"type": "w8a16_gptq"},
                    },
                    "dataset": {"name": "c4:4", "seqlen": 64},
                    "backend": {"type": kind, "dtype": "int8"},
                    "workspace": {"path": str(tmp_path / "workspace")},
                }
            )
        )
        return str(file)

    return of


@pytest.mark.parametrize("words", [[], ["--dry-run"]])
def test_a_compile_without_it_is_refused_before_it_calibrates(engine, recipe, tmp_path, capsys, words):
    assert main(["compile", recipe(engine.backend), *words]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"{engine.name} does not import" in said
    assert f"No module named '{engine.module}'" in said
    assert "--no-parity" in said
    assert not (tmp_path / "workspace").exists()


@pytest.mark.parametrize("words", [[], ["--no-parity"]])
@pytest.mark.parametrize("kind", ["openvino", "tvm"])
def test_one_that_is_a_package_beside_this_program_likewise(recipe, tmp_path, monkeypatch, capsys, kind, words):
    monkeypatch.setattr(extras, "_missing", lambda extra: [kind] if extra == kind else [])
    assert main(["compile", recipe(kind), *words]) == 2
    assert f"gemma-deploy[{kind}]" in capsys.readouterr().err
    assert not (tmp_path / "workspace").exists()
