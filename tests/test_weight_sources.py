"""All that read weights read them through one protocol, and need nothing of a checkpoint that it does not have."""

import ast

import numpy as np
import pytest

from gemma_deploy.calibration.ranges import run_layers
from gemma_deploy.checkpoint import Checkpoint, WeightSource
from gemma_deploy.params import build_plan, write_params
from gemma_deploy.parity.cases import Case
from gemma_deploy.parity.reference import TorchSource
from gemma_deploy.quantization.layers import quantize_layers
from gemma_deploy.quantization.solver import Settings
from gemma_deploy.quantization.table import scale_table
from gemma_deploy.schemes import Codes
from gemma_deploy.testing import write_tiny_checkpoint
from tests.test_house import MODULES, PACKAGE

IDS = np.random.default_rng(3).integers(3, 500, (2, 16))
# What opens files of weights, and what for; everyone else is given a `WeightSource`.
OPENERS = {
    "artifact/weights.py": "an artifact's own",
    "params/quantized.py": "the quantizer's results",
    "quantization/results.py": "the quantizer's results, which it writes",
    "calibration/executors/worker.py": "tasks of a process, which the parent writes",
    "calibration/store.py": "a calibration's statistics, which are no weights",
    "calibration/beside.py": "vectors of tokens, keys and values of a calibration, which are no weights",
    "split/factory.py": "a divided model's own",
    "backends/asked.py": "logits that an engine in another Python computed, which are no weights",
    "backends/gguf/apart/llama_reader.py": "the same, which it writes",
    "backends/vllm/apart/vllm_reader.py": "the same, which it writes",
    "parity/adapted.py": "an adapter's, which PEFT is to read in its own way",
}
MEMBERS = {name for name in vars(WeightSource) if not name.startswith("_")}
OPENING = {"safe_open", "load_file", "memmap", "fromfile", "SafetensorsFile", "GgufFile"}


def opened_in(source: str) -> list[str]:
    """What of `OPENING` a module calls; `load_file` of safetensors alone (graphs have one too)."""
    tree = ast.parse(source)
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("safetensors")
        for alias in node.names
    }
    called = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    names = [getattr(func, "id", None) or getattr(func, "attr", None) for func in called]
    return sorted({name for name in names if name in OPENING and (name != "load_file" or name in imported)})


def readers_of_checkpoints(source: str) -> list[str]:
    """Functions and classes that read rows of what they say is a `Checkpoint`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            given = {arg.arg: arg.annotation for arg in (*node.args.args, *node.args.kwonlyargs)}
        elif isinstance(node, ast.ClassDef):
            given = {one.target.id: one.annotation for one in node.body
                     if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)}  # fmt: skip
        else:
            continue
        checkpoints = {name for name, said in given.items() if said is not None and "Checkpoint" in ast.unparse(said)}
        reads = {
            getattr(call.func.value, "attr", None) or getattr(call.func.value, "id", None)
            for call in ast.walk(node)
            if isinstance(call, ast.Call)
            and isinstance(call.func, ast.Attribute)
            and call.func.attr in ("rows", "raw_rows")
        }
        found += [f"{node.name} reads {name}" for name in sorted(checkpoints & reads)]
    return found


def protocols_of_rows(source: str) -> list[str]:
    """Protocols with rows by name."""
    return [
        node.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ClassDef) and any("Protocol" in ast.unparse(base) for base in node.bases)
        for method in node.body
        if isinstance(method, ast.FunctionDef)
        and [arg.arg for arg in method.args.args][1:] == ["name", "start", "stop"]
    ]


def each_module():
    return [(file.relative_to(PACKAGE).as_posix(), file.read_text(encoding="utf-8")) for file in MODULES]


def test_no_one_else_opens_files_of_weights():
    found = {name: calls for name, source in each_module() if (calls := opened_in(source))}
    assert {name for name in found if not name.startswith("checkpoint/")} == set(OPENERS)


def test_rows_are_read_of_a_weight_source():
    wrong = [f"{name}: {one}" for name, source in each_module() if not name.startswith("checkpoint/")
             for one in readers_of_checkpoints(source)]  # fmt: skip
    assert not wrong, "\n".join(wrong)


def test_there_is_one_protocol():
    found = [(name, one) for name, source in each_module() for one in protocols_of_rows(source)]
    assert set(found) == {("checkpoint/source.py", "WeightSource")}


def test_the_searches_see_what_they_should():
    reader = "def f(model: Checkpoint, one: Source):\n    return model.rows('x', 0, 1), one.rows('y', 0, 1)"
    holder = "class A:\n    held: Checkpoint | None\n    def f(self):\n        return self.held.raw_rows('x', 0, 1)"
    protocol = "class P(Protocol):\n    def rows(self, name, start, stop): ..."
    assert readers_of_checkpoints(reader) == ["f reads model"]
    assert readers_of_checkpoints(holder) == ["A reads held"]
    assert protocols_of_rows(protocol) == ["P"]
    assert opened_in("import numpy as np\nnp.fromfile('x')\nload_file('x')") == ["fromfile"]
    assert opened_in("from safetensors.numpy import load_file\nload_file('x')") == ["load_file"]


class Bare:
    """A checkpoint's weights with the protocol's members and no other."""

    def __init__(self, checkpoint):
        for member in MEMBERS:
            setattr(self, member, getattr(checkpoint, member))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("sources") / "c"
    return Checkpoint.open(write_tiny_checkpoint(path, "gemma3_text", num_hidden_layers=2, sliding_window_pattern=2))


def test_the_members_of_the_protocol():
    assert {
        "config", "embedding_scale", "path", "raw_rows", "rows", "tensors", "weights_fingerprint",
    } == MEMBERS  # fmt: skip


def ranges(source, folder):
    folder.mkdir()
    found = run_layers(source, IDS, scratch=folder)
    return {point: (one.minimum.tolist(), one.maximum.tolist()) for point, one in found.items()}


def quantized(source, folder):
    quantize_layers(source, IDS, Settings(), folder=folder, key="k")
    scale_table(source, IDS.shape, folder, codes=Codes())
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


def parameters(source, folder):
    folder.mkdir()
    write_params(source, build_plan(source.config, "w8a16", 48), folder / "p.safetensors", journal=folder / "journal")
    return (folder / "p.safetensors").read_bytes()


def logits(source, folder):
    case = Case("text", (tuple(IDS[0].tolist()),), ((5, 6),))
    sides = [TorchSource(source, "hf"), TorchSource(source, "patched"), TorchSource(source, "patched", "w8a16")]
    return [side.head(side.run([case])[0][0]).tolist() for side in sides]


@pytest.mark.parametrize("read", [ranges, quantized, parameters, logits])
def test_whoever_reads_needs_nothing_else(checkpoint, tmp_path, read):
    assert read(Bare(checkpoint), tmp_path / "bare") == read(checkpoint, tmp_path / "whole")
