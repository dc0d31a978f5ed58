"""Shards in threads of this process, which share its memory: the default."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import torch

from gemma_deploy.calibration.executors.ordered import in_order
from gemma_deploy.calibration.shards import LayerPass, Work
from gemma_deploy.machine import one_torch_thread


class Here:
    """As many shards at a time as torch would use threads (OMP_NUM_THREADS).

    Args:
        threads: another number of them.
    """

    shares: Literal["memory", "disk", "nothing"] = "memory"

    def __init__(self, threads: int | None = None) -> None:
        self.width = threads or torch.get_num_threads()

    def map(self, work: Work, layer: LayerPass, items: Iterable[Any]) -> Generator[Any, None, None]:
        """See `Executor`."""
        with one_torch_thread(), layer.hooked():
            if self.width == 1:
                yield from (work(layer, item) for item in items)
                return
            pool = ThreadPoolExecutor(self.width, "shard", initializer=torch.set_num_threads, initargs=(1,))
            try:
                yield from in_order(lambda item: pool.submit(work, layer, item), Future.result, items, ahead=self.width)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
