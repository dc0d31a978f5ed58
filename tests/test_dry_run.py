"""`compile --dry-run` refuses what compile refuses before its first numbers, says where it goes, and does nothing."""

import json
import os
import shutil

import pytest

from gemma_deploy import compile as compiler
from gemma_deploy.cli import main
from gemma_deploy.errors import UsageError
from gemma_deploy.recipe import Recipe
from gemma_deploy.testing import write_tiny_checkpoint

GPTQ = ["-s", "frontend.quantize.type=w8a16_gptq"]
ONE = "-s", "dataset.name=c4:2", "-s", "dataset.seqlen=64"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current directory, and the disk as it is left there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys, *arguments):
    code = main(["compile", "accelerator-int8", "--checkpoint", "demo", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err


def short_text(folder):
    (folder / "short.txt").write_text("two words")
    return ["-s", f"parity.text={folder / 'short.txt'}"]


def short_data(folder):
    (folder / "c4.json").write_text(json.dumps({"text": "two words"}) + "\n")
    return [*GPTQ, "-s", "dataset.name=c4:64", "-s", f"dataset.path=c4={folder / 'c4.json'}"]


def no_tokenizer(folder):
    return [*GPTQ, "--checkpoint", write_tiny_checkpoint(folder / "bare", "gemma")]


def stranger(folder):
    (folder / "taken").mkdir()
    (folder / "taken" / "file").write_text("mine")
    return ["--out", folder / "taken"]


def stranger_partial(folder):
    (folder / "new.partial").mkdir()
    (folder / "new.partial" / "file").write_text("mine")
    return ["--out", folder / "new"]


REFUSED = {
    "a file that is not there": lambda _: [*GPTQ, "-s", "dataset.name=c4:2", "-s", "dataset.path=c4=nofile.json"],
    "no tokenizer": no_tokenizer,
    "too little calibration text": short_data,
    "too little text to compare on": short_text,
    "a directory that is no artifact": stranger,
    "somebody else's unfinished directory": stranger_partial,
    "the root": lambda _: ["--out", "/"],
    "no possible name": lambda _: ["--out", "x" * 300],
    "no cluster": lambda _: [*GPTQ, *ONE, "-s", "workspace.cluster=127.0.0.1:1"],
    "a key that is not built": lambda _: ["-s", "backend.merge_params=false"],
    "no adapter": lambda _: ["-s", "frontend.adapter=lora"],
    "a context longer than the model's": lambda _: ["-s", "frontend.shape.input_ids=[[128],[65536]]"],
    "no checkpoint": lambda _: ["--checkpoint", "nowhere"],
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_refuses_what_compile_refuses_in_the_same_words(case, here, capsys, monkeypatch):
    arguments = REFUSED[case](here)
    before = sorted(path for path in here.rglob("*") if path.name != "workspace")
    dry = run(capsys, *arguments, "--dry-run")
    assert dry[0] in (1, 2)
    assert "this machine can do it" not in dry[1]
    assert sorted(path for path in here.rglob("*") if path.name != "workspace") == before
    real = run(capsys, *arguments, *([] if "compare" in case else ["--no-parity"]))
    assert real[0] == dry[0]
    messages = ["\n".join(line for line in err.splitlines() if not line.startswith(("note: ", "check", "quantize")))
                for err in (dry[2], real[2])]  # fmt: skip
    assert messages[0] == messages[1]


@pytest.mark.parametrize("windows", [["-s", "dataset.nsamples=2"], []])
def test_windows_longer_than_the_context_are_told_in_the_words_of_a_recipe(windows, here, capsys):
    code, out, err = run(capsys, *GPTQ, "-s", "dataset.seqlen=4096", *windows, "--dry-run")
    assert (code, out) == (2, "")
    assert "- dataset.seqlen: windows of 4096 tokens are longer than the model's context, expected at most 2048" in err
    assert " --" not in err


def test_all_of_it_is_told_at_once(here, capsys):
    arguments = [*short_data(here), *short_text(here), *stranger(here)]
    code, out, err = run(capsys, *arguments, "--dry-run")
    assert (code, out) == (1, "")
    assert "(3 problems)" in err
    for words in ("is no artifact; it will not be touched", "too few for", "64 windows of 1024 tokens need"):
        assert words in err, err


def test_another_artifact_is_refused_unless_force_is_said(demo_artifact, here, capsys):
    shutil.copytree(demo_artifact, here / "there")
    other = ["--out", here / "there", "-s", "frontend.shape.input_ids=[[64],[128]]", "--dry-run"]
    code, _, err = run(capsys, *other)
    assert (code, "use --force to replace it" in err) == (1, True)
    code, out, err = run(capsys, *other, "--force")
    assert (code, "this machine can do it" in out) == (0, True), err


def test_it_prints_the_directory_of_out(here, capsys):
    code, out, _ = run(capsys, "--out", here / "some" / "place", "--dry-run")
    assert code == 0
    assert f"artifact: {here / 'some' / 'place'}, parameters" in " ".join(out.split())
    assert not list(here.iterdir())


def test_what_is_up_to_date_is_said(demo_artifact, capsys):
    with_gate = demo_artifact.parent
    code, out, _ = run(capsys, "-s", f"workspace.path={with_gate}", "--dry-run")
    assert code == 0
    path = with_gate / "gemma-demo-int8-128-256"
    assert " ".join(out.split()) == f"nothing has changed: {path} is up to date, and nothing would be done"


def test_the_calibration_text_is_said_in_one_line(here, capsys, caplog):
    sample = "calibration text: 2 windows of 64 tokens: 2 of c4 (bundled sample); for a model that you ship, set"
    with caplog.at_level("INFO", logger="gemma_deploy"):
        code, out, _ = run(capsys, *GPTQ, *ONE, "--dry-run")
        assert (code, sample in " ".join(out.split())) == (0, True)
        assert run(capsys, *GPTQ, *ONE, "--no-parity")[0] == 0
    assert len([line for line in caplog.messages if line.startswith(sample)]) == 1
    manifest = json.loads(next(here.glob("workspace/*/manifest.json")).read_text())
    page = next(here.glob("workspace/*/report.html")).read_text()
    assert manifest["calibration"]["windows"]["nsamples"] == 2
    assert sample.removeprefix("calibration text: ") in page


def test_text_of_ones_own_gets_no_advice(here, capsys):
    (here / "mine.json").write_text("".join(json.dumps({"text": "word " * 200}) + "\n" for _ in range(8)))
    own = ["-s", "dataset.path=c4=mine.json"]
    code, out, err = run(capsys, *GPTQ, *ONE, *own, "--dry-run")
    assert code == 0, err
    assert "2 of c4 (mine.json)" in out
    assert "you ship" not in out


def test_a_gate_that_cannot_run_is_refused_before_parameters_are_written(here, monkeypatch):
    """Not after hours: the text of the gate is looked at first."""
    monkeypatch.setattr(compiler, "write_parameters", lambda *_, **__: pytest.fail("it began"))
    asked = Recipe.load("accelerator-int8", [short_text(here)[1]], checkpoint="demo")
    with pytest.raises(UsageError, match="too few for"):
        compiler.compile_recipe(asked)
    assert os.listdir(here) == ["short.txt"]
