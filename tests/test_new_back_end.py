"""A back end that is onnxruntime under another name: a folder and a row, and all else works."""

import json

import pytest

from gemma_deploy.cli import main
from gemma_deploy.testing import write_tiny_checkpoint
from tests.calibration.make import write_tokenizer
from tests.program import changed_lines, command_of, copy_program, touched

NAME, TABLE = "twin", "gemma_deploy/backends/__init__.py"


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """A copy of the program with one back end more."""
    root = copy_program(tmp_path_factory.mktemp("program"))
    folder, known = root / f"gemma_deploy/backends/{NAME}", root / "gemma_deploy/backends/onnxruntime"
    folder.mkdir()
    for file in known.glob("*.py"):
        (folder / file.name).write_text(file.read_text().replace("backends.onnxruntime", f"backends.{NAME}"))
    table = root / TABLE
    table.write_text(table.read_text().replace('"onnxruntime",', f'"onnxruntime", "{NAME}",', 1))
    return root


@pytest.fixture(scope="module")
def run(program, tmp_path_factory):
    """Run the copied program beside a tiny checkpoint and recipes for both back ends."""
    work = tmp_path_factory.mktemp("work")
    write_tokenizer(write_tiny_checkpoint(work / "ck", "gemma", num_hidden_layers=2))
    for backend in ("onnxruntime", NAME):
        recipe = {
            "name": backend,
            "frontend": {"checkpoint": "ck", "shape": {"input_ids": [[32], [64]]}},
            "backend": {"type": backend, "dtype": "int8", "compile": {"prefill": "lean"}},
            "parity": {"prompt_tokens": 32, "decode_tokens": 8},
            "workspace": {"path": "w"},
        }
        (work / f"{backend}.yaml").write_text(json.dumps(recipe))
    return command_of(program, work), work


def test_a_folder_and_a_row(program):
    assert touched(program) == [TABLE, f"gemma_deploy/backends/{NAME}"]
    assert changed_lines(program, TABLE) == 1


def test_it_compiles_proven_to_the_same_bytes_and_every_command_takes_it(run, monkeypatch):
    command, work = run
    monkeypatch.chdir(work)
    assert main(["compile", "onnxruntime.yaml", "--no-parity"]) == 0
    done = command("compile", f"{NAME}.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    made, known = work / "w" / NAME, work / "w/onnxruntime"
    for file in ("model.onnx", "params.safetensors", "genai_config.json"):
        assert (made / file).read_bytes() == (known / file).read_bytes(), file
    manifest = json.loads((made / "manifest.json").read_text())
    assert manifest["recipe"]["backend"]["type"] == NAME
    assert manifest["parity"]["passed"] is True
    assert "shipped" in {measure["test"] for measure in manifest["parity"]["measures"]}
    for words in (["run", made, "-p", "the window", "-n", "4"], ["verify", made]):
        done = command(*words)
        assert done.returncode == 0, done.stdout + done.stderr
    typo = command("compile", f"{NAME}.yaml", "-s", "backend.compile.haed=screened", "-s", "name=y")
    assert typo.returncode == 2
    assert "backend.compile.haed" in typo.stderr
