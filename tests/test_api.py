"""`import gemma_deploy`: names that come when they are used, results with types, examples that run."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gemma_deploy
from gemma_deploy import evaluate, prove
from gemma_deploy.api import ExamEvaluation, TextEvaluation
from gemma_deploy.artifact.manifest import GateRecord
from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.cli import main
from gemma_deploy.errors import ArtifactError, UsageError
from tests.imports import modules_after

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "datasets", "matplotlib", "accelerate")
COMPILES = {"compile_recipe"}


def python(code, *arguments):
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


NAMES = ["__all__", *sorted(set(gemma_deploy.__all__) - COMPILES)]


@pytest.fixture(scope="module")
def modules_of():
    found = modules_after(f"import gemma_deploy; gemma_deploy.{name}" for name in NAMES)
    return dict(zip(NAMES, found.values(), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_name_brings_neither_torch_nor_what_belongs_to_it(name, modules_of):
    assert "gemma_deploy" in modules_of[name]
    assert not modules_of[name] & set(HEAVY)


def test_the_package_alone_brings_no_library():
    code = "import sys, gemma_deploy; print(sorted({'numpy', 'pydantic', 'click', 'onnxruntime'} & set(sys.modules)))"
    assert python(code) == "[]"


def test_every_name_is_there_listed_and_the_same_each_time():
    promised = {"Recipe", "compile_recipe", "Artifact", "open_engine", "prove", "evaluate"}
    assert promised <= set(gemma_deploy.__all__) <= set(dir(gemma_deploy))
    for name in gemma_deploy.__all__:
        assert getattr(gemma_deploy, name) is getattr(gemma_deploy, name)
        assert getattr(gemma_deploy, name).__doc__
    with pytest.raises(AttributeError, match=r"module 'gemma_deploy' has no attribute 'recipes'"):
        _ = gemma_deploy.recipes
    assert gemma_deploy.Artifact is Artifact
    assert (Path(gemma_deploy.__file__).parent / "py.typed").exists()


def test_the_version_stands_in_one_place():
    """In setup.cfg; what is installed may be older than this checkout."""
    stated = re.findall(r"^version = (.+)$", (ROOT / "setup.cfg").read_text(), re.MULTILINE)
    assert len(stated) == 1
    written = [
        str(file.relative_to(ROOT))
        for file in (ROOT / "gemma_deploy").rglob("*.py")
        if re.search(rf"[\"']{re.escape(stated[0])}[\"']", file.read_text(encoding="utf-8"))
    ]
    assert written == []
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", gemma_deploy.__version__)


def test_a_proof_has_the_types_and_figures_of_the_manifest(demo_artifact):
    told = []
    gate = prove(demo_artifact, report=told.append)
    recorded = Artifact.open(demo_artifact).manifest.parity
    assert isinstance(gate, GateRecord)
    assert (gate.passed, [line.comparison for line in gate.lines]) == (
        recorded.passed,
        [line.comparison for line in recorded.lines],
    )
    for line, before in zip(gate.lines, recorded.lines, strict=True):
        assert line.value == pytest.approx(before.value, rel=1e-3, abs=1e-12)
    assert told


def test_a_proof_refuses_files_that_are_not_those_that_were_written(demo_copy):
    manifest = Artifact.open(demo_copy).manifest
    row = next(row for row in manifest.params if row.name == "model.rotary_emb.cos_cached" or "rotary" in row.name)
    with (demo_copy / "params.safetensors").open("r+b") as file:
        file.seek(row.offset + row.nbytes - 4)  # of a position that no prompt of the gate reaches
        file.write(b"\0\0\0\0")
    with pytest.raises(ArtifactError, match="damaged"):
        prove(demo_copy)


def test_an_evaluation_is_what_the_command_writes(demo_artifact, tmp_path, capfd):
    options = ["--task", "ppl", "--windows", "2", "--seqlen", "40", "--no-record", "--json", tmp_path / "x.json"]
    assert main(["eval", str(demo_artifact), *map(str, options)]) == 0
    written = json.loads((tmp_path / "x.json").read_text())
    ticks = []
    found = evaluate(demo_artifact, windows=2, seqlen=40, progress=lambda *done: ticks.append(done))
    assert isinstance(found, TextEvaluation)
    for key in ("perplexity", "perplexity_reference", "perplexity_change_error", "kl_mean", "top1", "scored_tokens"):
        assert getattr(found, key) == pytest.approx(written[key], rel=1e-6)
    assert found.target == str(demo_artifact)
    assert found.against == written["against"]["path"]
    assert found.settings == written["settings"]
    assert ticks[-1] == (2, 2)
    alone = evaluate(demo_artifact, windows=2, seqlen=40, against="none")
    assert (alone.perplexity, alone.kl_mean, alone.against) == (pytest.approx(found.perplexity, rel=1e-5), None, None)


def test_an_exam_has_its_own_type():
    found = evaluate("demo", task="ceval", shots=0, limit=2)
    assert isinstance(found, ExamEvaluation)
    assert found.questions == found.record["questions"] == len(found.record["answers"]) > 0
    assert math.isclose(found.accuracy, found.right / found.questions)
    assert (found.settings["shots"], found.against, found.same_choice) == (0, None, None)


def test_a_result_is_kept_where_asked(demo_copy):
    found = evaluate(demo_copy, windows=1, seqlen=20, against="none")
    assert not (demo_copy / "eval.json").exists()
    evaluate(demo_copy, windows=1, seqlen=20, against="none", record=True)
    (kept,) = json.loads((demo_copy / "eval.json").read_text())["results"]
    assert kept["perplexity"] == pytest.approx(found.perplexity)
    with pytest.raises(UsageError, match="demo: a result is kept in an artifact, and this is none"):
        evaluate("demo", windows=1, record=True)


def test_options_of_the_other_task_are_refused_all_at_once(demo_artifact):
    with pytest.raises(UsageError, match="task 'ppl' does not take shots, limit"):
        evaluate(demo_artifact, shots=1, limit=2)
    with pytest.raises(UsageError, match="task 'ceval' does not take text"):
        evaluate(demo_artifact, task="ceval", text="x")
    with pytest.raises(UsageError, match="there is no task 'mmlu'"):
        evaluate(demo_artifact, task="mmlu")


EXAMPLES = {
    "compile_and_ask.py": (lambda artifact: [artifact.parent], r"parity passed\nReturn the.*\n\d+ tokens at \d+ tok"),
    "chat.py": (lambda artifact: [artifact], r"0: .*\n1: .*\n0: .*\n1: "),
    "cancel.py": (lambda artifact: [artifact, 0], r"ended by cancelled; the session goes on after \d+ tokens"),
    "logits.py": (lambda artifact: [artifact, "Return the"], r"^\[\(.*\)\]\n\[\(.*\)\]$"),
    "evaluate.py": (lambda artifact: [artifact], r"perplexity \d+\.\d+ ± \d+\.\d+ of 126 tokens\nok    "),
}


def test_every_example_is_tried():
    assert {file.name for file in (ROOT / "examples").glob("*.py")} >= set(EXAMPLES)
    assert set(re.findall(r"examples/(\w+\.py)", (ROOT / "docs/python-api.md").read_text())) >= set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name, demo_artifact):
    arguments, expected = EXAMPLES[name]
    command = [sys.executable, f"examples/{name}", *map(str, arguments(demo_artifact))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert re.search(expected, done.stdout.strip(), re.DOTALL), done.stdout
