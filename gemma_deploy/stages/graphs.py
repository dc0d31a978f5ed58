"""Graphs without weights that point into the parameter file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gemma_deploy.backends.base import ExportJob
from gemma_deploy.job import Job
from gemma_deploy.machine import give_memory_back
from gemma_deploy.params import ParamTable
from gemma_deploy.quantization.rescaling import Rescaling

DONE = "graphs.done"


def export_graphs(
    job: Job,
    out: Path,
    table: ParamTable,
    *,
    key: str,
    rescaling: Rescaling | None = None,
    kept: Sequence[str] | None = None,
) -> int | None:
    """Write every graph of the artifact.

    Args:
        table: of the parameter files; key: what the graphs depend on besides.
        kept: linears whose inputs are not rounded to 8 bits; None where none are.

    Returns:
        Peak RSS in bytes of a process that did it, 0 when it was this one; None when it was done already.

    Raises:
        ExportError: see graph/export.py and external.py.
    """
    done, mark = out / DONE, f"{key} {table.digest}"
    if done.exists() and done.read_text() == mark and all((out / file).exists() for file in job.graph_files):
        return None
    from gemma_deploy.graph.external import write_graph

    give_memory_back()  # of the parameters' row blocks
    graphs, peak = job.backend.export(ExportJob(job.spec, job.config, job.contract, job.parts, table, rescaling, kept))
    for file, graph in graphs.items():
        write_graph(graph, out / file)
    done.write_text(mark)
    return peak
