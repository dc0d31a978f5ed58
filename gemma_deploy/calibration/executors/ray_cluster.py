"""Shards as tasks of a Ray cluster (https://docs.ray.io).

Nodes need no common disk: weights and hidden states go through Ray's object store, and results come back through it.

`auto` is the cluster that this machine belongs to (or RAY_ADDRESS), `HOST:PORT` the same by the address of its head,
`ray://HOST:PORT` a cluster reached through its client server. Every node needs this version of gemma-deploy.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Generator, Iterable
from types import TracebackType
from typing import Any, Literal

import torch

from gemma_deploy import cluster
from gemma_deploy.calibration.address import CLUSTER
from gemma_deploy.calibration.executors.ordered import in_order
from gemma_deploy.calibration.shards import LayerPass, LayerSetting, Work, description, stack_of
from gemma_deploy.errors import CalibrationError, DeployError
from gemma_deploy.machine import one_torch_thread


class RayCluster:
    """Tasks of one CPU each on a cluster, connected from enter to exit.

    Args:
        address: see above.

    Raises:
        UsageError: ray is not installed here, or the address is none.
        CalibrationError: no cluster answers there, or it has no CPU.
    """

    shares: Literal["memory", "disk", "nothing"] = "nothing"

    def __init__(self, address: str) -> None:
        self.address, self.width = address, 0

    def __enter__(self) -> RayCluster:
        ray = self.ray = CLUSTER.join(self.address)
        self.width = int(ray.cluster_resources().get("CPU", 0))
        if self.width < 1:
            ray.shutdown()
            raise CalibrationError(
                "this Ray cluster has no CPU",
                where=f"{CLUSTER.name}: {self.address}",
                next_step="add nodes with CPUs (ray start --address=... --num-cpus=N)",
            )
        self.task = ray.remote(num_cpus=1, max_retries=3)(_call)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ray.shutdown()

    def map(self, work: Work, layer: LayerPass, items: Iterable[Any]) -> Generator[Any, None, None]:
        """See `Executor`. A task whose process or node dies is run again elsewhere, up to three times."""
        ray, model, index = self.ray, *description(layer)
        tensors = ray.put({name: tensor.numpy() for name, tensor in layer.tensors().items()})
        head = ray.put((work, model, index, versions(work)))
        begun: set[Any] = set()

        def submit(item: Any) -> Any:
            ref = self.task.remote(head, tensors, item)
            begun.add(ref)
            return ref

        def result(ref: Any) -> Any:
            answer = ray.get(ref)
            begun.discard(ref)
            if isinstance(answer, DeployError):
                raise answer
            return answer

        try:
            yield from in_order(submit, result, items, ahead=self.width + 1)
        except ray.exceptions.RayError as error:
            raise CalibrationError(
                f"the Ray cluster lost a shard: {str(error).strip().splitlines()[-1]}",
                where=f"{layer.name} on workspace.cluster: {self.address}",
                next_step="look at the cluster (ray status), then run the same command again: it continues here",
            ) from error
        finally:
            for ref in begun:
                with contextlib.suppress(ray.exceptions.RayError):  # the cluster may be what has failed
                    ray.cancel(ref)


def versions(work: Work) -> dict[str, str]:
    """What must be the same on every node: the code of this package that does the work, and its libraries."""
    own = __name__.partition(".")[0]
    return cluster.versions([name for name in (__name__, work.__module__) if name.partition(".")[0] == own])


def _call(head: tuple[Work, LayerSetting, int, dict[str, Any]], tensors: dict[str, Any], item: Any) -> Any:
    """On a node: do it; an explained error is an answer, so that it comes back whole."""
    work, model, index, expected = head
    if versions(work) != expected:
        return CalibrationError(
            f"this Ray node has {versions(work)}",
            where=socket.gethostname(),
            expected=str(expected),
            next_step="install the same versions on every node",
        )
    # Copied: arrays in the object store are read-only, and torch wants to own what it multiplies.
    weights = {name: torch.from_numpy(array.copy()) for name, array in tensors.items()}
    layer = LayerPass.restored(stack_of(model), index, weights)
    with one_torch_thread(), layer.hooked():
        try:
            return work(layer, item)
        except DeployError as error:
            return error
