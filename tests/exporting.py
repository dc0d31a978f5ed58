"""Artifacts as `compile` leaves them before the manifest is written."""

from pathlib import Path

from gemma_deploy.backends.base import Exported
from gemma_deploy.checkpoint import Checkpoint, ModelConfig
from gemma_deploy.graph import worker
from gemma_deploy.graph.contract import GraphContract
from gemma_deploy.graph.export import export_graphs
from gemma_deploy.graph.external import attach_external, serialized, write_graph
from gemma_deploy.params import build_plan, write_params

SIZES = 32, 80  # four windows of 8
DYNAMIC_SIZES = 272, 288  # more than one block of the cache


def contract_of(config: ModelConfig, scheme, batch=2, dynamic=False) -> GraphContract:
    """What the graphs take and give."""
    return GraphContract.of(config, scheme, batch, *(DYNAMIC_SIZES if dynamic else SIZES), dynamic)


_REMEMBERED: dict = {}


def remembered_export(config, *arguments):
    """`export_graphs`, each export done once a process: for tests of what happens around it."""
    key = (str(config), *arguments)
    if key not in _REMEMBERED:
        _REMEMBERED[key] = export_graphs(config, *arguments)
    return {name: graph.clone() for name, graph in _REMEMBERED[key].items()}


def export_in_this_process(task):
    """`worker.export_apart` without a process of its own."""
    return Exported(worker.export_here(task), 1)


def write_artifact(checkpoint_dir, out: Path, scheme, *, batch=2, dynamic=False) -> None:
    """Parameters and graphs of a checkpoint."""
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = Checkpoint.open(checkpoint_dir)
    contract = contract_of(checkpoint.config, scheme, batch, dynamic)
    plan = build_plan(checkpoint.config, scheme, contract.context)
    table = write_params(checkpoint, plan, out / "params.safetensors", journal=out / "params.journal")
    graphs = export_graphs(checkpoint.config, scheme, contract)
    attach_external(graphs, table.rows, "params.safetensors")
    for name, graph in graphs.items():
        write_graph(serialized(graph), out / f"{name}.onnx")
