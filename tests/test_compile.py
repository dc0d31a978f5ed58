"""One command, one artifact: what is written, reused, refused, and what a kill leaves. Without the gate where it is not
the question: tests/parity has it."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import yaml

from gemma_deploy import compile as compiler
from gemma_deploy.cli import main
from gemma_deploy.graph import worker
from gemma_deploy.parity.compare import ParityResult
from gemma_deploy.parity.gates import Line
from gemma_deploy.provenance import Code
from gemma_deploy.stages.gate import advice
from gemma_deploy.testing import write_tiny_checkpoint
from gemma_deploy.workdir import Lock
from tests.exported import exported_before
from tests.exporting import export_in_this_process

NAME = "tiny"


@pytest.fixture(scope="module", autouse=True)
def one_program():
    """The program does not change between these tests, whoever edits it meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Code, "sha256", "this")
        yield


@pytest.fixture(scope="module")
def made(once, one_program, real_export_apart):
    """A checkpoint, and the artifact of its recipe without the gate, made without interruption; read only."""

    def make(folder):
        checkpoint = write_tiny_checkpoint(folder / "checkpoint", "gemma", num_hidden_layers=2)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(worker, "export_apart", real_export_apart)
            assert main(["compile", str(write_recipe(folder, checkpoint)), "--no-parity"]) == 0

    return once("compile", make)


@pytest.fixture(scope="module")
def checkpoint(made):
    return made / "checkpoint"


@pytest.fixture(scope="module")
def finished(made):
    return made / "workspace" / NAME


@pytest.fixture(autouse=True)
def one_export(finished, monkeypatch):
    """An export takes seconds: one for what happens around it."""
    monkeypatch.setattr(worker, "export_apart", exported_before(finished))


@pytest.fixture
def recipe(checkpoint, tmp_path):
    return write_recipe(tmp_path, checkpoint)


def write_recipe(folder, checkpoint, **changes):
    content = {
        "name": NAME,
        "frontend": {"checkpoint": str(checkpoint), "shape": {"input_ids": [[32], [64]]}},
        "backend": {"dtype": "int8"},
        "parity": {"prompt_tokens": 16, "decode_tokens": 2},
        "workspace": {"path": str(folder / "workspace")},
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(content | changes))
    return file


@pytest.fixture
def copied(finished, checkpoint, tmp_path):
    """A workspace with a copy of the finished artifact, and its recipe."""
    shutil.copytree(finished, tmp_path / "workspace" / NAME)
    return write_recipe(tmp_path, checkpoint), tmp_path / "workspace"


def snapshot(folder):
    """Every file below a directory, with its bytes and its time."""
    return {
        str(file.relative_to(folder)): (file.read_bytes(), file.stat().st_mtime_ns)
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def contents(artifact):
    """Bytes of every file, times left out of the manifest and its page."""
    found = {name: data for name, (data, _) in snapshot(artifact).items()}
    manifest = json.loads(found.pop("manifest.json"))
    assert manifest.pop("stages")
    assert found.pop("report.html")
    manifest["files"].pop("report.html")
    manifest["recipe"].pop("workspace")
    return found, manifest


def names(workspace):
    return sorted(entry.name for entry in workspace.iterdir()) if workspace.exists() else []


def test_the_artifact_has_its_files_and_the_manifest_its_facts(finished):
    assert {file.name for file in finished.iterdir()} == {
        "manifest.json", "iter0.onnx", "iter1.onnx", "params.safetensors", "config.json", "generation_config.json",
        "report.html",
    }  # fmt: skip
    manifest = json.loads((finished / "manifest.json").read_text())
    assert manifest["scheme"] == "w8a16"
    assert manifest["parity"] is None
    assert [stage["name"] for stage in manifest["stages"]] == ["check", "parameters", "graphs", "files"]
    assert all(stage["seconds"] >= 0 and stage["peak_rss_bytes"] > 1 << 20 for stage in manifest["stages"])
    assert {"torch", "onnx", "transformers", "gemma-deploy"} <= set(manifest["tool"])
    assert set(manifest["files"]) == {file.name for file in finished.iterdir()} - {"manifest.json"}
    assert names(finished.parent) == [NAME]


def test_params_open_with_the_safetensors_library(finished):
    from safetensors import safe_open

    rows = json.loads((finished / "manifest.json").read_text())["params"]
    with safe_open(finished / "params.safetensors", "np") as file:
        assert set(file.keys()) == {row["name"] for row in rows}
        assert all(list(file.get_slice(row["name"]).get_shape()) == row["shape"] for row in rows)


def test_a_second_run_writes_nothing(copied, capsys):
    recipe, workspace = copied
    before = snapshot(workspace)
    assert main(["compile", str(recipe), "--no-parity"]) == 0
    assert "nothing has changed" in capsys.readouterr().out
    assert snapshot(workspace) == before


def nothing_is_built(monkeypatch):
    for stage in ("write_parameters", "places_of", "write_model_files", "Graphs"):
        monkeypatch.setattr(compiler, stage, lambda *arguments, stage=stage, **options: pytest.fail(stage))


def test_a_second_run_with_the_gate_runs_the_gate_alone(copied, checkpoint, monkeypatch, capsys):
    recipe, workspace = copied
    written = (workspace / NAME / "params.safetensors").stat()
    nothing_is_built(monkeypatch)
    assert main(["compile", str(recipe)]) == 0
    manifest = json.loads((workspace / NAME / "manifest.json").read_text())
    assert manifest["parity"]["passed"] is True
    assert "parity  passed" in capsys.readouterr().out
    assert names(workspace) == [NAME]
    assert [one["name"] for one in manifest["stages"]] == ["parameters", "graphs", "files", "check", "parity"]
    again = (workspace / NAME / "params.safetensors").stat()
    assert (again.st_ino, again.st_mtime_ns) == (written.st_ino, written.st_mtime_ns)
    assert main(["verify", str(workspace / NAME)]) == 0
    # Another proof is asked for: it runs alone as well. The same one: nothing does.
    write_recipe(recipe.parent, checkpoint, parity={"prompt_tokens": 20, "decode_tokens": 2})
    assert main(["compile", str(recipe)]) == 0
    changed = json.loads((workspace / NAME / "manifest.json").read_text())
    assert changed["recipe"]["parity"]["prompt_tokens"] == 20
    assert changed["keys"]["gate"] != manifest["keys"]["gate"]
    assert changed["key"] == manifest["key"]
    capsys.readouterr()
    assert main(["compile", str(recipe)]) == 0
    assert "nothing has changed" in capsys.readouterr().out


def test_a_gate_that_fails_leaves_the_unproven_artifact(copied, monkeypatch, capsys):
    recipe, workspace = copied
    before = snapshot(workspace / NAME)
    nothing_is_built(monkeypatch)
    failed = ParityResult(lines=[Line("hf = strict", "mean KL", 1.0, 0.01, False)])
    monkeypatch.setattr(compiler, "run_gate", lambda *arguments, **named: failed)
    assert main(["compile", str(recipe)]) == 1
    assert "does not compute the model" in capsys.readouterr().err
    assert snapshot(workspace / NAME) == before
    assert (workspace / f"{NAME}.partial/report.html").exists()


def change_recipe(recipe, checkpoint, monkeypatch):
    write_recipe(recipe.parent, checkpoint, frontend={
        "checkpoint": str(checkpoint), "shape": {"input_ids": [[32], [80]]},
    })  # fmt: skip


def change_weights(recipe, checkpoint, monkeypatch):
    other = shutil.copytree(checkpoint, recipe.parent / "changed")
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-9] ^= 1
    (other / "model.safetensors").write_bytes(data)
    write_recipe(recipe.parent, other)


def change_program(recipe, checkpoint, monkeypatch):
    monkeypatch.setattr(Code, "sha256", "another")


def change_library(recipe, checkpoint, monkeypatch):
    monkeypatch.setattr(Code, "versions", {"torch": "0.1"})


@pytest.mark.parametrize("change", [change_recipe, change_weights, change_program, change_library])
def test_changed_inputs_are_noticed_and_nothing_is_replaced_unasked(copied, checkpoint, monkeypatch, capsys, change):
    recipe, workspace = copied
    before = snapshot(workspace)
    change(recipe, checkpoint, monkeypatch)
    assert main(["compile", str(recipe), "--no-parity"]) == 1
    message = capsys.readouterr().err
    assert "artifact of other inputs" in message
    assert "--force" in message
    assert snapshot(workspace) == before


def test_weights_changed_where_they_lie_are_noticed(checkpoint, tmp_path, capsys):
    own = shutil.copytree(checkpoint, tmp_path / "own")
    recipe = write_recipe(tmp_path, own)
    assert main(["compile", str(recipe), "--no-parity"]) == 0
    before = snapshot(tmp_path / "workspace")
    data = bytearray((own / "model.safetensors").read_bytes())
    data[-9] ^= 1
    (own / "model.safetensors").write_bytes(data)
    assert main(["compile", str(recipe), "--no-parity"]) == 1
    assert "artifact of other inputs" in capsys.readouterr().err
    assert snapshot(tmp_path / "workspace") == before


def test_force_replaces_it(copied, finished, checkpoint, monkeypatch):
    recipe, workspace = copied
    change_weights(recipe, checkpoint, monkeypatch)
    assert main(["compile", str(recipe), "--no-parity", "--force"]) == 0
    assert names(workspace) == [NAME]
    (new, manifest), (old, _) = contents(workspace / NAME), contents(finished)
    assert manifest["checkpoint"]["path"] == "changed"
    assert {name for name in new if new[name] != old[name]} == {"params.safetensors"}


def test_out_names_the_directory_and_a_second_export_gives_the_same_bytes(finished, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "export_apart", export_in_this_process)
    recipe = write_recipe(tmp_path, checkpoint)
    assert main(["compile", str(recipe), "--no-parity", "--out", str(tmp_path / "elsewhere")]) == 0
    assert contents(tmp_path / "elsewhere") == contents(finished)
    assert names(tmp_path / "workspace") == []


def test_another_compile_of_the_same_name_is_one_message(recipe, finished, capsys):
    (recipe.parent / "workspace").mkdir()
    lock = Lock(recipe.parent / f"workspace/{NAME}")
    assert main(["compile", str(recipe), "--no-parity"]) == 1
    message = capsys.readouterr().err
    assert f"another run is writing it (process {os.getpid()} is running)" in message
    assert str(recipe.parent / "workspace" / NAME) in message
    assert "Traceback" not in message
    lock.release()
    assert main(["compile", str(recipe), "--no-parity"]) == 0
    assert contents(recipe.parent / "workspace" / NAME) == contents(finished)


# Forks a child per line of stdin, which compiles and dies when a function is called for the n-th time, before that call
# has done anything. Torch is imported once and the graphs are there, which makes this fast.
DRIVER = """
import importlib, json, os, pathlib, signal, sys
import torch
from gemma_deploy.cli import main
from gemma_deploy.provenance import Code
from gemma_deploy.graph import worker
from tests.exported import exported_before
assert "onnxruntime" not in sys.modules
Code.sha256 = "this"
worker.export_apart = exported_before(pathlib.Path(sys.argv[1]))
for line in sys.stdin:
    (module, name, count), kind, errors, arguments = json.loads(line)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored
        sys.stdout = sys.stderr = open(errors, "w", buffering=1)
        os.dup2(sys.stderr.fileno(), 2)
        left, owner = [count], importlib.import_module(module)
        *path, last = name.split(".")
        for part in path:
            owner = getattr(owner, part)
        call = getattr(owner, last)
        def dying(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), getattr(signal, kind))
            return call(*args, **kwargs)
        setattr(owner, last, dying)
        code = main(arguments)
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def die(finished, tmp_path_factory):
    """(moment, recipe, signal) -> exit code and what was said."""
    errors = tmp_path_factory.mktemp("driver") / "errors.txt"
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(finished)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )

    def run(moment, recipe, kind="SIGKILL"):
        arguments = ["compile", str(recipe), *["--no-parity"] * (moment != "the gate")]
        driver.stdin.write(json.dumps((MOMENTS[moment], kind, str(errors), arguments)) + "\n")
        driver.stdin.flush()
        return int(driver.stdout.readline()), errors.read_text()

    yield run
    driver.stdin.close()
    driver.stdout.close()
    driver.wait()


MOMENTS = {
    "the first tensor": ("os", "pwrite", 2),
    "a tensor in the middle": ("os", "pwrite", 30),
    "before the graphs": ("gemma_deploy.stages.graphs", "Graphs.write", 1),
    "between the two graph files": ("gemma_deploy.graph.external", "write_graph", 2),
    "the model's files": ("gemma_deploy.compile", "write_model_files", 1),
    "the gate": ("gemma_deploy.compile", "run_gate", 1),
    "the report": ("gemma_deploy.compile", "write_report", 1),
    "the manifest": ("gemma_deploy.artifact.commit", "write_json", 1),
    "the rename": ("gemma_deploy.artifact.commit", "ArtifactDir.publish", 1),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_9_at_any_moment_and_run_again(recipe, finished, die, monkeypatch, moment):
    code, said = die(moment, recipe)
    assert code == -signal.SIGKILL, said
    workspace = recipe.parent / "workspace"
    assert NAME not in names(workspace)
    journal = workspace / f"{NAME}.partial/params.journal"
    done = finished_tensors(journal)
    exported, export = [], worker.export_apart
    monkeypatch.setattr(worker, "export_apart", lambda task: exported.append(task) or export(task))
    assert main(["compile", str(recipe), "--no-parity"]) == 0
    assert contents(workspace / NAME) == contents(finished)
    assert names(workspace) == [NAME]
    order = list(MOMENTS)
    assert bool(exported) == (order.index(moment) < order.index("the model's files"))  # else continued behind it
    if moment != "a tensor in the middle":  # there it depends on the threads; tests/params has every moment
        assert bool(done) == (moment != "the first tensor")


def finished_tensors(journal):
    if not journal.exists():
        return []
    return [record["job"] for line in journal.read_text().splitlines() if "job" in (record := json.loads(line))]


def test_ctrl_c_ends_with_130_and_one_line_and_the_next_run_continues(recipe, finished, die):
    code, said = die("between the two graph files", recipe, "SIGINT")
    assert code == 130
    assert said.strip().splitlines()[-1].startswith("interrupted; run the same command again")
    assert "Traceback" not in said
    workspace = recipe.parent / "workspace"
    assert names(workspace) == [f"{NAME}.partial"]
    assert main(["compile", str(recipe), "--no-parity"]) == 0
    assert contents(workspace / NAME) == contents(finished)


@pytest.mark.parametrize("moment", ["a tensor in the middle", "between the two graph files", "the manifest"])
def test_a_full_disk_is_one_message_and_the_next_run_continues(recipe, finished, monkeypatch, capsys, moment):
    module, name, count = MOMENTS[moment]
    owner = sys.modules[module] if module != "os" else os
    real, calls = getattr(owner, name), []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) >= count:
            raise OSError(errno.ENOSPC, "No space left on device", "somewhere")
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        assert main(["compile", str(recipe), "--no-parity"]) == 1
    message = capsys.readouterr().err
    assert "No space left on device" in message or "no space left for the parameters" in message
    assert "it continues" in message
    workspace = recipe.parent / "workspace"
    assert names(workspace) == [f"{NAME}.partial"]
    assert main(["compile", str(recipe), "--no-parity"]) == 0
    assert contents(workspace / NAME) == contents(finished)


def test_a_dry_run_writes_nothing_and_shows_every_stage(recipe, capsys):
    before = snapshot(recipe.parent)
    assert main(["compile", str(recipe), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    for word in ("parameters", "graphs", "parity"):
        assert word in shown
    assert snapshot(recipe.parent) == before
    assert names(recipe.parent / "workspace") == []


def test_a_failed_gate_leaves_a_report_and_no_artifact(recipe, monkeypatch, capsys):
    from gemma_deploy.parity.compare import ParityResult
    from gemma_deploy.parity.gates import Line

    real = compiler.run_gate

    def wrong(*args, **named):
        result = real(*args, **named)
        first = result.lines[0]
        result.lines[0] = Line(**{**vars(first), "passed": False})
        assert isinstance(result, ParityResult)
        return result

    monkeypatch.setattr(compiler, "run_gate", wrong)
    assert main(["compile", str(recipe)]) == 1
    message = capsys.readouterr().err
    workspace = recipe.parent / "workspace"
    assert "does not compute the model" in message
    assert "report.html" in message
    assert names(workspace) == [f"{NAME}.partial"]
    assert "FAILED" in (workspace / f"{NAME}.partial/report.html").read_text()
    assert not (workspace / f"{NAME}.partial/manifest.json").exists()


def test_a_recipe_can_switch_the_gate_off_but_not_the_verdict(checkpoint, tmp_path, monkeypatch, capsys):
    from gemma_deploy.parity.gates import Line

    real = compiler.run_gate

    def wrong(*args, **named):
        result = real(*args, **named)
        result.lines[0] = Line(**{**vars(result.lines[0]), "passed": False})
        return result

    monkeypatch.setattr(compiler, "run_gate", wrong)
    parity = {"prompt_tokens": 16, "decode_tokens": 2, "gate": False}
    assert main(["compile", str(write_recipe(tmp_path, checkpoint, parity=parity))]) == 0
    assert "FAILED" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "workspace" / NAME / "manifest.json").read_text())
    assert manifest["parity"]["passed"] is False


@pytest.mark.parametrize(
    ("dtype", "failed", "words"),
    [
        ("fp16", ("hf", "headroom of float16 (model.layers.7.out reaches 1e+05)"), "do not fit float16"),
        ("int8", ("weights", "lowest SQNR in dB (layer 2)"), "loses too much in int8"),
        ("int8", ("hf = patched", "relative error"), "a bug in gemma-deploy"),
        ("fp32", ("patched = strict", "relative error"), "a bug in gemma-deploy"),
    ],
)
def test_a_failed_gate_says_what_to_do(checkpoint, tmp_path, dtype, failed, words):
    from gemma_deploy.parity.compare import ParityResult
    from gemma_deploy.parity.gates import Line
    from gemma_deploy.recipe import Recipe

    scheme = Recipe.load(write_recipe(tmp_path, checkpoint, backend={"dtype": dtype})).scheme
    lines = [Line("hf = strict", "mean KL", 0.0, 1.0, True), Line(*failed, 0.5, 4.0, False)]
    assert words in advice(scheme, ParityResult(lines=lines))
