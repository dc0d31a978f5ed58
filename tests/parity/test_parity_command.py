"""`gemma-deploy parity` and the gate inside `compile`, on the bundled demo checkpoint and on tiny ones."""

import json
import os
import re
import shutil
import time

import numpy as np
import pytest

import gemma_deploy.compile as compiler
from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.backends.base import Exported
from gemma_deploy.cli import main
from gemma_deploy.errors import GateError
from gemma_deploy.graph import worker
from gemma_deploy.patched import patched_module
from gemma_deploy.recipe import Recipe
from gemma_deploy.testing import write_tiny_checkpoint
from tests.parity.breaking import Graph, change_tensor
from tests.parity.conftest import checkpoint_of, write_recipe

SMALL = ["--prompt-tokens", "24", "--decode-tokens", "4"]


@pytest.fixture(scope="session")
def demo(once):
    """An int8 artifact of the demo checkpoint, compiled with the gate on."""

    def make(out):
        lengths = 128, 256  # the bundled recipe's, whose graphs are the same
        recipe = write_recipe(out.with_suffix(".yaml"), "demo", "w8a16", batch=1, lengths=lengths)
        result = compiler.compile_recipe(recipe, out=out)
        assert result.parity.passed

    return once("demo-int8", make)


def run(capfd, *arguments):
    code = main([str(argument) for argument in arguments])
    out, err = capfd.readouterr()
    assert "Traceback" not in err
    return code, out, err


def has_row(out, *cells):
    """Whether a table has a row with these cells, in order."""
    rows = ([cell.strip() for cell in re.split("[\u2502\u2503]", line)] for line in out.splitlines())
    return any([cell for cell in row if cell in cells] == list(cells) for row in rows)


def test_the_gate_of_compile_passes_on_text_and_its_measures_are_kept(demo):
    parity = Artifact.open(demo).manifest.parity
    assert parity.passed is True
    compared = {(row["reference"], row["test"], row["case"], row["phase"]) for row in parity.measures}
    pairs = {("hf", "patched"), ("patched w8a16", "strict"), ("hf", "strict")}
    phases = {(case, phase) for case in ("text", "random") for phase in ("prefill", "decode")}
    assert compared == {(*pair, *phase) for pair in pairs for phase in phases}
    names = [line.name.split(" (")[0] for line in parity.lines]
    assert {"relative error", "mean KL", "inf or NaN logits"} <= set(names)
    kl = next(line for line in parity.lines if line.name == "mean KL")
    assert 0 < kl.value <= kl.limit == 0.01
    assert parity.effect["tokens"] == "text"
    assert "passed" in (demo / "report.html").read_text()


def test_the_newest_artifact_json_and_html(demo, capfd, tmp_path):
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    shutil.copytree(demo, workspace / "a")
    shutil.copytree(demo, workspace / "b")
    shutil.copytree(demo, workspace / "c.partial")
    now = time.time()
    for age, name in enumerate(("c.partial", "a", "b")):
        os.utime(workspace / name / "manifest.json", (now - age, now - age))
    json_file, html_file = tmp_path / "out.json", tmp_path / "out.html"
    arguments = ["parity", "--workspace", workspace, "--json", json_file, "--html", html_file, *SMALL]
    code, out, err = run(capfd, *arguments)
    assert code == 0, out + err
    lines = Artifact.open(demo).manifest.parity.lines
    assert re.search(rf"^parity  passed, {len(lines)} gates; mean KL [\d.e-]+ nats \(limit 0.01 nats\)\n\Z", out, re.M)
    assert out.count("\u2502 ok") == len(lines)
    assert "parity  running strict\n" in err
    found = json.loads(json_file.read_text())
    assert (found["title"], found["passed"], found["divergence"]) == (str(workspace / "a"), True, None)
    rows = {(row["reference"], row["test"], row["case"], row["phase"]): row for row in found["measures"]}
    assert ("strict", "fast", "text", "decode") in rows
    assert rows["hf", "strict", "text", "decode"]["positions"] == 4
    assert rows["hf", "strict", "text", "prefill"]["positions"] == 24
    assert rows["strict", "fast", "text", "prefill"]["positions"] == 1
    assert rows["hf", "patched", "text", "decode"]["max_abs"] == 0
    page = html_file.read_text()
    assert page.startswith("<!doctype html>")
    assert "http" not in page.lower().replace("<!doctype html>", ""), "self-contained"
    for line in found["lines"]:
        measure = line["name"].replace(" in dB", "")
        assert re.search(rf"<span>{line['comparison']}</span></td><td[^>]*><span>{re.escape(measure)}</span>", page)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.html", "out.json", "workspace"]


def test_without_the_fast_session(demo, capfd):
    code, out, err = run(capfd, "parity", demo, "--no-fast", "--backend", "onnxruntime", *SMALL)
    assert (code, "fast" in out + err) == (0, False)


def test_text_of_the_users_own(demo, capfd, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The list holds the names of all files. " * 40)
    arguments = ["parity", demo, "--no-fast", *SMALL, "--json"]
    code, out, _ = run(capfd, *arguments, tmp_path / "1.json", "--text", text)
    assert code == 0, out
    run(capfd, *arguments, tmp_path / "2.json")
    own, bundled = (json.loads((tmp_path / f"{n}.json").read_text())["measures"] for n in (1, 2))
    of_text = [[row["ppl_reference"] for row in rows if row["case"] == "text"] for rows in (own, bundled)]
    of_random = [[row["ppl_reference"] for row in rows if row["case"] == "random"] for rows in (own, bundled)]
    assert of_text[0] != of_text[1]
    assert of_random[0] == of_random[1]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read: No such file"),
        (b"\xff\xfe", "is not UTF-8 text (byte 0)"),
        (b"two words", "too few for 4 decode steps"),
    ],
)
def test_bad_text(demo, capfd, tmp_path, content, words):
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    code, out, err = run(capfd, "parity", demo, "--text", text, *SMALL)
    assert (code, out) == (2, "")
    assert f"error: {text}: " in err
    assert words in err


def test_text_without_a_tokenizer(finished, capfd, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("words " * 100)
    code, _, err = run(capfd, "parity", finished("gemma"), "--text", text, *SMALL)
    assert code == 2
    assert "the checkpoint has no tokenizer" in err
    code, _, err = run(capfd, "parity", finished("gemma"), "--text", tmp_path / "no.txt", *SMALL)
    assert code == 2


def test_a_broken_artifact_exits_with_1_and_says_where(finished, capfd, tmp_path):
    copy = shutil.copytree(finished("gemma"), tmp_path / "copy")
    change_tensor(copy, "model.layers.1.mlp.gate_proj.weight", lambda weight: weight * 1.01)
    html_file, json_file = tmp_path / "out.html", tmp_path / "out.json"
    code, out, err = run(capfd, "parity", copy, *SMALL, "--html", html_file, "--json", json_file, "--no-fast")
    assert code == 1
    sentence = "strict first differs in model.layers.1.mlp.gate_proj ("
    assert f"where   {sentence}" in out
    assert re.search(r"^parity  FAILED, \d of \d gates\n\Z", out, re.M)
    assert has_row(out, "hf = strict", "relative error", "FAILED")
    assert f"error: {copy}: " in err
    assert sentence in err
    assert sentence in html_file.read_text()
    found = json.loads(json_file.read_text())
    assert (found["passed"], found["divergence"]["module"]) == (False, "model.layers.1.mlp.gate_proj")


def test_against_an_artifact_of_the_same_scheme(demo, capfd, tmp_path):
    copy = shutil.copytree(demo, tmp_path / "copy")
    code, out, _ = run(capfd, "parity", demo, "--against", copy, *SMALL)
    assert (code, has_row(out, "reference = strict", "relative error", "0", "<= 1e-5")) == (0, True)
    change_tensor(copy, "model.norm.weight", lambda weight: weight * 1.001)
    code, out, err = run(capfd, "parity", demo, "--against", copy, *SMALL)
    assert (code, has_row(out, "reference = strict", "relative error", "FAILED")) == (1, True)
    assert "reference = strict" in err


def test_against_an_artifact_of_another_scheme(finished, capfd):
    bf16, fp16, fp32 = (finished("gemma3_text", scheme) for scheme in ("bf16", "fp16", "fp32"))
    code, out, err = run(capfd, "parity", bf16, "--against", fp32, *SMALL)
    assert code == 0, out + err  # a bfloat16 checkpoint loses nothing
    assert has_row(out, "reference = strict", "mean KL")
    code, out, _ = run(capfd, "parity", fp16, "--against", fp32, *SMALL)
    assert (code, "<= 0.01 nats" in out, "perplexity" in out) == (0, True, True)


def test_against_an_artifact_of_another_shape(demo, finished, capfd):
    code, out, err = run(capfd, "parity", demo, "--against", finished("gemma"), *SMALL)
    assert (code, out) == (2, "")
    for problem in ("batch: 1 here, 2 there", "prefill: 128 here, 32 there", "vocab_size: 4096 here, 512 there"):
        assert f"  - {problem}" in err


def test_the_patched_stage_needs_no_artifact(capfd, tmp_path, monkeypatch):
    code, out, _ = run(capfd, "parity", "--stage", "patched", *SMALL)
    assert code == 0
    assert has_row(out, "hf = patched", "causal LM, float32, relative error", "0", "<= 1e-5")
    assert has_row(out, "hf in bfloat16 = patched in bfloat16", "base model, bfloat16, relative error", "0", "<= 0.001")
    assert has_row(out, "hf = patched", "config keys that differ", "0")
    assert has_row(out, "hf = patched", "texts of 64 with other tokens", "0")
    assert out.splitlines()[0].strip() == "patched, demo"
    checkpoint = write_tiny_checkpoint(tmp_path / "tiny", "gemma3_text")
    arguments = ["parity", "--stage", "patched", "--checkpoint", checkpoint, *SMALL]
    assert run(capfd, *arguments)[0] == 0
    norm = patched_module("layers_vacc").RMSNorm
    right = norm.forward
    monkeypatch.setattr(norm, "forward", lambda self, x: right(self, x) * 1.001)
    code, out, _ = run(capfd, *arguments)
    assert (code, "patched first differs in model.layers.0.input_layernorm (prefill)" in out) == (1, True), out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stage", "patched", "somewhere"], "and no artifact"),
        (["--stage", "patched", "--against", "other"], "and no artifact"),
        (["--stage", "patched", "--decode-tokens", "2048"], "2048 decode steps leave no room for a prompt"),
        (["--stage", "patched", "--backend", "onnxruntime"], "--stage patched runs no graph"),
        (["--stage", "other"], "Invalid value for '--stage'"),
        (["--prompt-tokens", "0"], "Invalid value for '--prompt-tokens'"),
        (["--json", "/no/such/folder/out.json"], "its directory does not exist"),
        (["--workspace", "/no/such/folder"], "no finished artifact in the workspace"),
    ],
)
def test_bad_requests(capfd, arguments, message):
    code, out, err = run(capfd, "parity", *arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_graphs_run_on_what_is_there(demo, finished, capfd):
    """The device of the static pair is not there: its graphs are proven on ONNX Runtime."""
    for arguments in ([], ["--against", finished("gemma")]):
        code, out, err = run(capfd, "parity", demo, "--backend", "tvm_vacc", *arguments)
        assert (code, out) == (2, "")
        assert "no runtime of tvm_vacc is known here: graphs for tvm_vacc run on onnxruntime" in err


def test_the_checkpoint_must_be_the_artifacts_own(finished, capfd, tmp_path):
    artifact = finished("gemma")
    other = write_tiny_checkpoint(tmp_path / "other", "gemma", seed=1)
    code, _, err = run(capfd, "parity", artifact, "--checkpoint", other, *SMALL)
    assert (code, "is not the checkpoint this artifact was made from" in err) == (2, True)
    code, _, err = run(capfd, "parity", artifact, "--checkpoint", tmp_path / "nowhere", *SMALL)
    assert code != 0
    assert str(tmp_path / "nowhere") in err
    moved = shutil.copytree(artifact, tmp_path / "moved")
    manifest = json.loads((moved / "manifest.json").read_text())
    manifest["recipe"]["frontend"]["checkpoint"] = str(tmp_path / "gone")
    (moved / "manifest.json").write_text(json.dumps(manifest))
    code, _, err = run(capfd, "parity", moved, *SMALL)
    assert (code != 0, str(tmp_path / "gone") in err, "--checkpoint PATH" in err) == (True, True, True)
    code, out, err = run(capfd, "parity", moved, "--checkpoint", checkpoint_of(artifact), "--no-fast", *SMALL)
    assert code == 0, out + err


def test_no_artifact_at_all(capfd, tmp_path):
    code, _, err = run(capfd, "parity", tmp_path / "nothing")
    assert (code, f"{tmp_path / 'nothing'}: there is no such directory" in err) == (2, True)


@pytest.fixture
def broken_export(finished, monkeypatch, tmp_path):
    """`compile` whose exporter writes a wrong graph: decode positions one too far."""
    graphs = finished("gemma")

    broken = tmp_path / "broken"
    broken.mkdir()
    for graph in ("iter0", "iter1"):
        shutil.copy(graphs / f"{graph}.onnx", broken)
    with Graph(broken, "iter1") as graph:
        graph.put_between("position_ids", "Add", np.int64(1))
    files = {file.name: file.read_bytes() for file in broken.iterdir()}
    monkeypatch.setattr(worker, "export_apart", lambda task: Exported(files))
    return checkpoint_of(graphs)


def test_compile_fails_and_commits_nothing(broken_export, capfd, tmp_path):
    recipe_file = tmp_path / "wrong.yaml"
    recipe = write_recipe(recipe_file, broken_export)
    with pytest.raises(GateError, match="does not compute the model"):
        compiler.compile_recipe(recipe)
    code, _, err = run(capfd, "compile", recipe_file)
    assert code == 1
    assert "first differs in model.layers.0.self_attn" in err
    workspace = tmp_path / "workspace"
    assert [path.name for path in workspace.iterdir()] == ["wrong.partial"]
    report = workspace / "wrong.partial" / "report.html"
    assert str(report) in err
    assert "FAILED" in report.read_text()
    assert not (workspace / "wrong.partial" / "manifest.json").exists()
    code, _, err = run(capfd, "parity", "--workspace", workspace)
    assert (code, "no finished artifact" in err) == (2, True)


def test_an_open_gate_commits_and_says_what_it_found(broken_export, capfd, tmp_path):
    recipe_file = tmp_path / "open.yaml"
    write_recipe(recipe_file, broken_export, gate=False)
    code, out, _ = run(capfd, "compile", recipe_file)
    assert code == 0
    assert "parity  FAILED, " in out
    artifact = tmp_path / "workspace" / "open"
    manifest = Artifact.open(artifact).manifest
    assert manifest.recipe.parity.model_dump()["gate"] is False
    assert manifest.parity.passed is False
    assert manifest.parity.divergence.phase == "decode"
    assert "model.layers.0.self_attn" in manifest.parity.divergence.module
    assert "FAILED" in (artifact / "report.html").read_text()
    assert run(capfd, "parity", artifact, "--no-fast", *SMALL)[0] == 1


def test_without_parity_the_manifest_says_that_nothing_is_proven(broken_export, tmp_path):
    recipe_file = tmp_path / "unproven.yaml"
    write_recipe(recipe_file, broken_export)
    result = compiler.compile_recipe(Recipe.load(recipe_file), parity=False)
    assert Artifact.open(result.path).manifest.parity is None
    with pytest.raises(GateError):  # asked again with the gate on: not taken for done
        compiler.compile_recipe(Recipe.load(recipe_file))
    assert Artifact.open(result.path).manifest.parity is None


def test_a_checkpoint_that_was_moved_is_named_with_an_option(finished, capfd, tmp_path):
    artifact = finished("gemma")
    moved = shutil.copytree(checkpoint_of(artifact), tmp_path / "moved", copy_function=shutil.copyfile)
    code, out, err = run(capfd, "parity", artifact, "--checkpoint", moved, *SMALL)
    assert code == 0, err
    assert "hf = patched" in out
