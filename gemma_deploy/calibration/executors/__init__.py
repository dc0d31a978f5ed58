"""Where shards are computed: in this process, in processes of this machine, or on a Ray cluster.

executor.shares   what workers see of this process: its "memory", its "disk", or "nothing"
executor.width    shards computed at a time
executor.map      results in the order of the items, a bounded number of them ahead
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

from gemma_deploy.calibration.executors.threads import Here
from gemma_deploy.calibration.shards import LayerPass, Work


class Executor(Protocol):
    """Runs a function on items, several at a time."""

    shares: Literal["memory", "disk", "nothing"]
    width: int

    def map(self, work: Work, layer: LayerPass, items: Iterable[Any]) -> Generator[Any, None, None]:
        """work(layer, item) of every item, in their order; close it when you leave early.

        Raises:
            CalibrationError: a worker ended; DeployError: as `work` raised it.
        """


@contextmanager
def open_executor(scratch: Path, *, processes: int = 1, cluster: str | None = None) -> Iterator[Executor]:
    """The executor of a recipe.

    Args:
        scratch: directory for what processes of this machine hand to each other.
        processes: more than one: so many processes; cluster: a Ray cluster in their place (see ray_cluster.py).

    Raises:
        CalibrationError: the cluster does not answer; UsageError: ray is not installed.
    """
    if cluster is not None:
        from gemma_deploy.calibration.executors.ray_cluster import RayCluster

        with RayCluster(cluster) as on_ray:
            yield on_ray
    elif processes > 1:
        from gemma_deploy.calibration.executors.processes import Processes

        with Processes(processes, scratch) as pool:
            yield pool
    else:
        yield Here()


__all__ = ["Executor", "Here", "open_executor"]
