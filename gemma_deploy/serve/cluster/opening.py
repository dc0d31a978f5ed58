"""What `serve --cluster` refuses, and what computes its artifacts then."""

from __future__ import annotations

from collections.abc import Sequence

from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.errors import UsageError
from gemma_deploy.runtime.engine import Engine
from gemma_deploy.serve.cluster.node import wanted_of
from gemma_deploy.serve.cluster.placing import CLUSTER, Places
from gemma_deploy.serve.opening import Limits, scheduling_of, worker_of
from gemma_deploy.serve.worker import Computing


def refuse(cluster: str | None, *, replicas: int | None, adapters: bool) -> None:
    """Refuse what does not go together, and a cluster that does not answer, before any work.

    Args:
        replicas: as given, None: not; adapters: whether any are asked for, or may be.

    Raises:
        UsageError: it does not. DeployError: nobody answers.
    """
    if cluster is None:
        if replicas is not None:
            raise UsageError("--replicas: of which cluster?", next_step="give --cluster HOST:PORT, or leave it out")
        return
    if adapters:
        raise UsageError(
            "--adapter, --allow-adapters: replicas on a cluster take no adapters",
            next_step="merge it into the checkpoint (`gemma-deploy merge`), or leave --cluster out",
        )
    CLUSTER.require(cluster)


class Joined:
    """A cluster that this process has joined, to have artifacts computed there.

    Args:
        address: of its head; opened: all artifacts, with whole files.
        replicas: of each; threads: of an operator, 0: as many as the smallest node has processors.

    Raises:
        UsageError: an artifact cannot be served like this. DeployError: the cluster refuses.
    """

    def __init__(self, address: str, opened: Sequence[Artifact], *, replicas: int, threads: int) -> None:
        for one in opened:
            if one.manifest.model.sentence is not None:
                raise UsageError(
                    "an artifact that makes vectors is not computed on a cluster",
                    where=str(one.path),
                    next_step="serve it without --cluster",
                )
            if replicas > 1 and len({part.stage for part in one.manifest.parts}) > 1:
                raise UsageError(
                    f"--replicas {replicas}: this artifact is divided into stages, which are placed once",
                    where=str(one.path),
                    next_step="leave --replicas out, or compile without split.points",
                )
        self._ray, self._address = CLUSTER.join(address), address
        self._replicas, self._threads = replicas, threads
        self._places: list[Places] = []

    def computing(self, engine: Engine, limits: Limits) -> Computing:
        """Have an artifact computed on the cluster.

        Args:
            engine: of the artifact, which computes nothing here; limits: of each replica.

        Raises:
            UsageError: the cluster is too small. DeployError: a node refuses, by name.
        """
        from gemma_deploy.serve.cluster.replicas import Replicas
        from gemma_deploy.serve.cluster.stages import Stages

        if engine.stages:
            places = self._placed(len(engine.stages))
            chain = Stages(places, wanted_of(engine.artifact, places.threads), engine.stages)
            across = engine.across(chain)
            return worker_of(across, scheduling_of(across, **limits), chain)
        places = self._placed(self._replicas)
        return Replicas(places, wanted_of(engine.artifact, places.threads), limits, count=self._replicas)

    def _placed(self, count: int) -> Places:
        places = Places(self._ray, self._address, count=count, threads=self._threads)
        self._places.append(places)
        return places

    def close(self) -> None:
        """Give the places back, and leave the cluster as it is."""
        for one in self._places:
            one.close()
        self._ray.shutdown()
