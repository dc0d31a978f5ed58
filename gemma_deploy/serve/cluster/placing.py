"""Where actors lie: places of as many processors as they compute with, which Ray spreads over the nodes."""

from __future__ import annotations

import contextlib
from typing import Any

from gemma_deploy.cluster import Setting
from gemma_deploy.errors import DeployError, UsageError

CLUSTER = Setting(
    "--cluster", "without --cluster this machine serves the artifact", forms="auto or HOST:PORT of the cluster's head"
)
PLACE_SECONDS = 30.0  # in which Ray has to find places


class Places:
    """Places of one artifact's actors. An actor that died gets another one in its place.

    Args:
        ray: the module, connected; address: of the cluster, for messages.
        count: of places; threads: that an actor computes with, and processors of its place; 0: as many as the smallest
            node has.

    Attributes:
        threads: as given, or as many as the smallest node has.

    Raises:
        UsageError: the cluster is too small. DeployError: others have its processors.
    """

    def __init__(self, ray: Any, address: str, *, count: int, threads: int) -> None:
        from ray.util.placement_group import placement_group

        self._ray, self._where = ray, f"{CLUSTER.name}: {address}"
        nodes = {one["NodeID"]: int(one["Resources"].get("CPU", 0)) for one in ray.nodes() if one["Alive"]}
        sizes = [cpus for cpus in nodes.values() if cpus > 0]
        self.threads = threads or min(sizes, default=1)
        room = sum(cpus // self.threads for cpus in sizes)
        told = ", ".join(f"node {name[:8]} {cpus}" for name, cpus in nodes.items())
        if room < count:
            raise UsageError(
                f"the cluster has room for {room} of {count} actors of {self.threads} processors each ({told})",
                where=self._where,
                next_step="give fewer --replicas or --threads, or add nodes (ray start --address=... --num-cpus=N)",
            )
        self._group = placement_group([{"CPU": self.threads}] * count, strategy="SPREAD")
        if not self._group.wait(PLACE_SECONDS):
            self.close()
            raise DeployError(
                f"others use the cluster's processors: {count} times {self.threads} are not free ({told})",
                where=self._where,
                next_step="look at `ray status`; end what uses them, or give fewer --replicas or --threads",
            )

    def actor(self, kind: type[Any], place: int, *, calls: int | None = None) -> Any:
        """An actor of a class, in a place; Ray starts it when it can.

        Args:
            calls: at a time, each in a thread; None: in its event loop.
        """
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        there = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=place)
        made = self._ray.remote(kind)
        more = {} if calls is None else {"max_concurrency": calls}
        return made.options(num_cpus=self.threads, max_restarts=0, scheduling_strategy=there, **more).remote()

    def end(self, actor: Any) -> None:
        """End an actor, be it alive or not."""
        with contextlib.suppress(self._ray.exceptions.RayError, ValueError):
            self._ray.kill(actor, no_restart=True)

    def close(self) -> None:
        """Give the places back; what is in them ends. Others' things on the cluster are not touched."""
        from ray.util.placement_group import remove_placement_group

        with contextlib.suppress(self._ray.exceptions.RayError, ValueError):
            remove_placement_group(self._group)

    def error(self, problem: BaseException, what: str) -> DeployError:
        """An actor that could not be had, in words."""
        lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
        return DeployError(
            f"{what}: {lines[-1] if lines else type(problem).__name__}",
            where=self._where,
            next_step="see that every node has this version of gemma-deploy, and look at `ray list actors`",
        )
