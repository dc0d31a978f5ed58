"""Exports of tests: each is done once and kept for the next run, as long as the code that makes it is the same.

Tests that change that code with `monkeypatch` need an export of their own: `export_in_this_process`.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from gemma_deploy.backends.base import Exported
from gemma_deploy.checkpoint import Checkpoint, ModelConfig
from gemma_deploy.graph import worker
from gemma_deploy.graph.contract import GraphContract
from gemma_deploy.graph.export import export_graphs
from gemma_deploy.graph.external import attach_external, serialized, write_graph
from gemma_deploy.params import build_plan, write_params
from gemma_deploy.provenance import Code, code_of
from gemma_deploy.schemes import Codes, Storage, dividing_group
from gemma_deploy.stages.graph_cache import GraphCache

SIZES = 32, 80  # four windows of 8
DYNAMIC_SIZES = 272, 288  # more than one block of the cache


def contract_of(config: ModelConfig, scheme, batch=2, dynamic=False) -> GraphContract:
    """What the graphs take and give."""
    prefill, context = DYNAMIC_SIZES if dynamic else SIZES
    return GraphContract.of(config, scheme, batch=batch, prefill=prefill, context=context, dynamic=dynamic)


KEPT = Path(os.environ.get("GEMMA_DEPLOY_TEST_CACHE") or Path(__file__).parent.parent / ".pytest_cache" / "exports")


def kept(what: str, given, names, make) -> dict[str, bytes]:
    """Files of an export: those of an earlier run where nothing that decides about them has changed, else `make()`.

    Args:
        what: the kind of export; given: all that it is made from, its `repr` says everything.
        names: of the files.
    """
    assert isinstance(vars(Code)["sha256"], property), "a test says itself what the code is: its graphs are its own"
    code = code_of(("gemma_deploy.graph.worker",))
    key = hashlib.sha256(repr((what, given, code.sha256, sorted(code.versions.items()))).encode()).hexdigest()
    cache = GraphCache(KEPT)
    files = cache.get(key, names)
    if files is None:
        files = make()
        cache.put(key, files)
    return files


def export_in_this_process(task):
    """`worker.export_apart` without a process of its own."""
    return Exported(worker.export_here(task), 1)


def export_once(task):
    """`worker.export_apart`, without a process of its own and done once."""
    return Later(task)


@dataclass(frozen=True)
class Later:
    """An `Export` that begins when its result is asked for: what fails before makes none."""

    task: worker.Task

    def result(self):
        names = [part.file(f"{name}.onnx") for part, _ in self.task.rows for name in self.task.contract.graph_names]
        return kept("parts", self.task, names, lambda: worker.export_here(self.task)), 1

    def cancel(self):
        """Nothing is at work."""


def write_artifact(checkpoint_dir, out: Path, scheme, *, batch=2, dynamic=False) -> None:
    """Parameters and graphs of a checkpoint."""
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = Checkpoint.open(checkpoint_dir)
    contract = contract_of(checkpoint.config, scheme, batch, dynamic)
    vectors = checkpoint.config.per_layer
    groups = None if vectors is None else Codes(8, dividing_group(vectors.size))
    storage = Storage(per_layer=groups)
    plan = build_plan(checkpoint.config, scheme, contract.context, storage=storage)
    table = write_params(checkpoint, plan, out / "params.safetensors", journal=out / "params.journal")

    def make():
        graphs = export_graphs(checkpoint.config, scheme, contract, storage=storage)
        attach_external(graphs, table.rows, "params.safetensors")
        return {f"{name}.onnx": serialized(graph) for name, graph in graphs.items()}

    names = [f"{name}.onnx" for name in contract.graph_names]
    for name, graph in kept("graphs", (checkpoint.config, scheme, contract, table.rows), names, make).items():
        write_graph(graph, out / name)
