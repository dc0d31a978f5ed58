"""Children of this program run no code of the current directory."""

import ast
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from gemma_deploy import child, paths
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.errors import DeployError, ExportError, NotBuiltError
from gemma_deploy.partition import ArtifactPart, whole
from gemma_deploy.testing import write_tiny_checkpoint

ROOT = Path(__file__).parent.parent
# Built into the interpreter, so that nothing it needs is poisoned itself.
POISON = """
import posix
log = posix.open(posix.environ[b"POISON_LOG"], posix.O_WRONLY | posix.O_CREAT | posix.O_APPEND)
posix.write(log, f"{posix.getpid()} {__name__}\\n".encode())
raise ImportError("poisoned")
"""


@pytest.fixture
def poisoned(tmp_path, monkeypatch):
    """Makes the current directory one full of modules; () -> those that another process imported."""
    import onnx_ir  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401

    folder, log = tmp_path / "downloaded", tmp_path / "imported.txt"
    names = {name.partition(".")[0] for name in sys.modules} | {"onnxruntime", "onnxruntime_genai", "sitecustomize"}
    for name in {*names, *sys.stdlib_module_names, "usercustomize"} - {"__main__", "__mp_main__"}:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(POISON)
    for name in ("onnx_ir", "torch", "numpy", "yaml"):  # as a file too
        (folder / f"{name}.py").write_text(POISON)
    assert (folder / "gemma_deploy" / "__init__.py").exists()
    monkeypatch.setenv("POISON_LOG", str(log))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", str(ROOT), "."]))  # an empty entry is the current directory
    monkeypatch.setattr(sys, "path", [*sys.path, "", str(folder), "."])  # last: this process is to go on working
    monkeypatch.chdir(folder)

    def seen():
        lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
        return sorted({name for pid, name in lines if pid != str(os.getpid())})

    return seen


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "checkpoint"
    return Checkpoint.open(write_tiny_checkpoint(path, "gemma", num_hidden_layers=1))


def test_the_poison_works(poisoned):
    done = subprocess.run([sys.executable, "-m", "json.tool"], capture_output=True)
    assert done.returncode
    assert poisoned()


def test_the_export(poisoned, checkpoint, real_export_apart):
    from gemma_deploy.graph.worker import Task
    from tests.exporting import contract_of

    unknown = replace(checkpoint.config, model_type="gemma9")
    contract = contract_of(checkpoint.config, "fp32")
    with pytest.raises(NotBuiltError, match="gemma9"):  # said by the child, when it has imported all it needs
        real_export_apart(
            Task(unknown, "fp32", contract, "exact", [(ArtifactPart(whole(1)), [])], "params.safetensors")
        ).result()
    assert poisoned() == []


def test_the_benchmark(poisoned, tmp_path):
    from gemma_deploy.bench import figures
    from gemma_deploy.bench.process import BenchJob

    with pytest.raises(DeployError) as caught:
        figures._apart(BenchJob("cold", str(tmp_path / "absent"), False, 1, [4], 1))
    assert poisoned() == []
    assert "error: " in caught.value.problems[-1] or "absent" in str(caught.value)


def test_the_measured_bandwidth(poisoned, monkeypatch):
    from gemma_deploy.bench import memory

    monkeypatch.setattr(memory, "BANDWIDTH", memory.BANDWIDTH.replace("1 << 28", "1 << 20"))
    assert memory.bandwidth_bytes_s(1) > 1e6
    assert poisoned() == []


def test_processes_that_calibrate(poisoned, checkpoint, tmp_path):
    from gemma_deploy.calibration.executors import open_executor
    from gemma_deploy.calibration.ranges import run_layers

    ids = np.random.default_rng(5).integers(3, 500, (2, 12))
    with open_executor(tmp_path / "shards", processes=2) as executor:
        found = run_layers(checkpoint, ids, scratch=tmp_path, executor=executor)
    assert "model.layers.0.out" in found
    assert poisoned() == []


def test_a_child_looks_where_this_process_does_but_for_the_current_directory(tmp_path, monkeypatch):
    home, here, lib = str(paths.PACKAGE.parent), tmp_path / "here", tmp_path / "lib"
    for folder in (here, lib, here / "lib", tmp_path / "a:b"):
        folder.mkdir()
    (tmp_path / "link").symlink_to(here)
    monkeypatch.chdir(here)
    entries = ["", str(lib), ".", str(here), "../here", str(tmp_path / "link"), "lib", str(tmp_path / "a:b"), home]
    monkeypatch.setattr(sys, "path", entries)
    monkeypatch.setenv("PYTHONPATH", ":.")
    found = child.environment()
    assert found["PYTHONPATH"].split(":") == [str(lib), str(here / "lib"), home]
    assert found["PYTHONSAFEPATH"] == "1"
    monkeypatch.setattr(paths, "PACKAGE", here / "gemma_deploy")  # a checkout, and its owner works in it
    assert child.environment()["PYTHONPATH"].split(":")[1] == str(here)
    here.rename(tmp_path / "renamed")
    shutil.rmtree(tmp_path / "renamed")
    assert child.environment()["PYTHONPATH"].split(":")[0] == str(lib)


PLACES = """
import sys
print(sys.path[0])
"""


def test_code_and_modules_start_without_the_current_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "module_of_here.py").write_text(PLACES)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert child.run("-m", "module_of_here", stderr=child.PIPE).returncode == 1
    said = child.run("-c", PLACES, stdout=child.PIPE, text=True).stdout.strip()
    assert said
    assert os.path.realpath(said) != os.path.realpath(tmp_path)


SERVANT = """
import os, signal, sys, time
from gemma_deploy.child import serve
from gemma_deploy.errors import ExportError
def handle(request):
    if request == "raise":
        raise ExportError("what", problems=["one"])
    if request == "fault":
        1 / 0
    if request == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    print("noise")
    return request, os.getpid()
serve(handle)
"""


@pytest.fixture
def worker(tmp_path, monkeypatch):
    (tmp_path / "servant.py").write_text(SERVANT)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    made = child.Worker("servant")
    yield made
    made.stop()
    made.close()


def test_a_worker_answers_raises_and_dies(worker):
    large = "x" * 1_000_000
    assert worker.ask(large)[0] == large
    pid = worker.ask(1)[1]
    with pytest.raises(ExportError) as caught:
        worker.ask("raise")
    assert caught.value.problems == ("one",)
    with pytest.raises(ZeroDivisionError) as caught:
        worker.ask("fault")
    assert "in handle" in caught.value.__notes__[0]
    assert worker.ask(2) == (2, pid)
    with pytest.raises(EOFError):
        worker.ask("die")
    with pytest.raises(EOFError):
        worker.ask(3)


def test_a_closed_worker_is_gone(worker):
    pid = worker.ask(1)[1]
    worker.close()
    assert not psutil.pid_exists(pid)


# What starts processes, as `import` or attribute of os.
STARTERS = {"subprocess", "multiprocessing", "pty", "ProcessPoolExecutor"}
STARTERS |= {"create_subprocess_exec", "create_subprocess_shell", "subprocess_exec", "subprocess_shell"}  # of asyncio
OF_OS = re.compile(r"(exec|spawn|posix_spawn|popen|system|fork)")


def starters(source):
    """Lines of a module that start another program in another way than gemma_deploy.child."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(alias.name for alias in node.names)]
            if node.module == "os":
                names += [f"subprocess {alias.name}" for alias in node.names if OF_OS.match(alias.name)]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            names = ["subprocess"] if OF_OS.match(node.attr) else []
        elif isinstance(node, ast.Attribute):
            names = [node.attr]
        found += [node.lineno for name in names if STARTERS & set(re.split(r"[. ]", name))]
    return found


def test_nothing_else_starts_a_process():
    package = ROOT / "gemma_deploy"
    wrong = {
        str(file.relative_to(ROOT)): starters(file.read_text(encoding="utf-8"))
        for file in package.rglob("*.py")
        if file != package / "child.py"
    }
    assert {file: lines for file, lines in wrong.items() if lines} == {}


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("import subprocess", 1),
        ("from multiprocessing import connection", 1),
        ("import multiprocessing.connection", 1),
        ("from concurrent.futures import ProcessPoolExecutor", 1),
        ("import concurrent.futures as f\nf.ProcessPoolExecutor()", 1),
        ("import os\nos.execv('a', [])\nos.system('b')\nos.fork()", 3),
        ("from os import popen", 1),
        ("import asyncio\nasyncio.create_subprocess_exec('a')\nasyncio.run(f())", 1),
        ("import os\nos.path.join('a')\nos.fsync(1)", 0),
        ("from gemma_deploy import child\nchild.run('-c', '')", 0),
    ],
)
def test_the_check_sees_what_starts_a_process(source, count):
    assert len(starters(source)) == count


@pytest.fixture
def elsewhere(poisoned, tmp_path):
    """A Ray cluster that somebody else started, in another directory."""
    pytest.importorskip("ray", reason='ray is not installed: pip install -c constraints.txt ".[ray]"')
    from ray.cluster_utils import Cluster

    here = os.getcwd()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", ".", here)])
        node = {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=node)
    yield cluster
    cluster.shutdown()


@pytest.mark.slow
def test_tasks_of_a_ray_cluster(poisoned, elsewhere, checkpoint, tmp_path):
    """Ray tells its workers to look in the driver's current directory first."""
    from gemma_deploy.calibration.executors import open_executor
    from gemma_deploy.calibration.ranges import run_layers

    ids = np.random.default_rng(5).integers(3, 500, (2, 12))
    with open_executor(tmp_path / "shards", cluster=elsewhere.address) as executor:
        found = run_layers(checkpoint, ids, scratch=tmp_path, executor=executor)
    assert "model.layers.0.out" in found
    assert poisoned() == []


@pytest.mark.slow
def test_actors_of_a_ray_cluster(poisoned, elsewhere, demo_artifact):
    from gemma_deploy.artifact.check import open_whole
    from gemma_deploy.engine import open_engine
    from gemma_deploy.serve.cluster.opening import Joined

    joined = Joined(elsewhere.address, [open_whole(demo_artifact)], replicas=1, threads=1)
    try:
        limits = {"together": 1, "queue": 1, "context": 0, "cache_bytes": 1 << 20}
        found = joined.computing(open_engine(demo_artifact), limits)
        assert [one.up for one in found.actors()] == [True]
    finally:
        joined.close()
    assert poisoned() == []
