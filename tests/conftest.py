"""Shared fixtures: tiny checkpoints, the compiled demo; deterministic and offline."""

import fcntl
import gc
import os
import shutil
import sys

os.environ["GEMMA_DEPLOY_CACHE"] = "off"  # graphs of a test that breaks the export must not be found by another
os.environ.pop("COLUMNS", None)  # 80 in xdist's workers: tables look alike wherever tests run
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # there is a process for each core already
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest

from gemma_deploy.testing import write_tiny_checkpoint
from tests.rotation import COSTLY, all_but_a_few, left_out, of_others

# What is compiled is kept, of tests and of what they start: to rewrite all assertions takes seconds in each worker.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


@pytest.hookimpl(tryfirst=True)  # before cases are chosen by their marks
def pytest_collection_modifyitems(items):
    """Of the generations of a costly test one is in the default run, of many cases a few; the others are `slow`."""
    costly = [item for item in items if item.nodeid.startswith(COSTLY) and hasattr(item, "callspec")]
    cases = [(item.nodeid.partition("[")[0], item.callspec.params) for item in costly]
    for number in left_out(cases) | of_others(cases):
        costly[number].add_marker(pytest.mark.slow)
    quick = [item for item in items if not item.get_closest_marker("slow")]
    for number in all_but_a_few([item.nodeid.partition("[")[0] for item in quick]):
        quick[number].add_marker(pytest.mark.slow)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish():
    """What is there by now stays: modules and thousands of tests, which the collector need not walk through again."""
    gc.collect()
    gc.freeze()
    if "PYTEST_XDIST_WORKER" in os.environ and "onnxruntime" in sys.modules:
        let_sessions_have_one_thread()


def pytest_sessionfinish():
    gc.unfreeze()


def let_sessions_have_one_thread():
    """Where nobody says how many: there is a process for each core, and to start threads takes longer than to run."""
    import onnxruntime

    Options = onnxruntime.SessionOptions

    class OneThread(Options):
        def __init__(self):
            super().__init__()
            self.intra_op_num_threads = 0

        @property
        def intra_op_num_threads(self):
            return Options.intra_op_num_threads.fget(self)

        @intra_op_num_threads.setter
        def intra_op_num_threads(self, count):
            Options.intra_op_num_threads.fset(self, count or 1)

    onnxruntime.SessionOptions = OneThread


@pytest.fixture(scope="session", autouse=True)
def real_export_apart():
    """`worker.export_apart` as it is. While tests run, compiles export in this process, and each graph once.

    Tests of the process itself put it back. Those that change the code of an export take `export_in_this_process`.
    """
    from gemma_deploy.graph import worker

    def export(task):
        from tests.exporting import export_once  # needs torch

        return export_once(task)

    real = worker.export_apart
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "export_apart", export)
        yield real


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk():
    """No test cuts the power, so what was written need not have reached the disk: thousands of milliseconds."""

    def sync(file):
        os.fstat(file if isinstance(file, int) else file.fileno())  # an error where it is none

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", sync)
        patch.setattr(os, "fdatasync", sync)
        yield


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """(name, make) -> directory that `make(directory)` filled, in whichever test process asked first; read only."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    shared.mkdir(exist_ok=True)

    def get(name, make):
        with (shared / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (shared / f"{name}.done").exists():
                shutil.rmtree(shared / name, ignore_errors=True)
                make(shared / name)
                (shared / f"{name}.done").touch()
        return shared / name

    return get


@pytest.fixture(scope="session")
def artifacts(once):
    """(model type, scheme, batch, dynamic) -> directory without a manifest, read only, its checkpoint beside it."""

    def artifact(model_type, scheme, batch=2, dynamic=False):
        def make(root):
            from tests.exporting import write_artifact  # needs torch; some tests are about doing without

            checkpoint = write_tiny_checkpoint(root / "checkpoint", model_type)
            write_artifact(checkpoint, root / "artifact", scheme, batch=batch, dynamic=dynamic)

        name = f"{model_type}-{scheme}-{batch}" + "-dynamic" * dynamic
        return once(f"exported-{name}", make) / "artifact"

    return artifact


@pytest.fixture(scope="session")
def genai_artifact(once):
    """model type -> artifact for onnxruntime-genai, its checkpoint two directories above; read only."""

    def artifact(model_type, dtype="fp32"):
        def make(root):
            from tests.runtime.make import compile_tiny

            compile_tiny(root, model_type, {"type": "onnxruntime", "dtype": dtype})

        return once(f"genai-{model_type}-{dtype}", make) / "workspace" / "tiny"

    return artifact


@pytest.fixture(scope="session")
def demo_artifact(once):
    """The bundled demo in int8, compiled with its gate; read only."""

    def make(folder):
        from gemma_deploy.compile import compile_recipe
        from gemma_deploy.recipe import Recipe

        compile_recipe(Recipe.load("build_in/hf_gemma_int8.yaml", [f"workspace.path={folder}"]))

    return once("demo-workspace", make) / "gemma-demo-int8-128-256"


@pytest.fixture
def demo_copy(demo_artifact, tmp_path):
    """A copy of it to break."""
    return shutil.copytree(demo_artifact, tmp_path / demo_artifact.name)


@pytest.fixture(scope="session", params=["gemma", "gemma2", "gemma3_text", "vaultgemma", "gemma4_text"])
def model_type(request):
    return request.param


@pytest.fixture(scope="session")
def checkpoint_dir(model_type, tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp(model_type) / "checkpoint", model_type)


@pytest.fixture(scope="session")
def staged_dir(checkpoint_dir, tmp_path_factory):
    from gemma_deploy.staging import stage_checkpoint

    return stage_checkpoint(checkpoint_dir, tmp_path_factory.mktemp("staged") / "model")
