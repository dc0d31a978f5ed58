"""Shards in processes of this machine. Weights, hidden states and moments go through files, not through pipes."""

from __future__ import annotations

import queue
import shutil
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from gemma_deploy.calibration.executors.ordered import in_order
from gemma_deploy.calibration.executors.worker import Task
from gemma_deploy.calibration.shards import LayerPass, Work, description
from gemma_deploy.child import Worker
from gemma_deploy.errors import CalibrationError


class Processes:
    """Children with one thread of torch each, alive from enter to exit.

    Args:
        workers: children.
        scratch: directory made for the weights of the layer at work, and removed.
    """

    shares: Literal["memory", "disk", "nothing"] = "disk"

    def __init__(self, workers: int, scratch: Path) -> None:
        self.width, self.scratch, self.versions = workers, scratch, 0

    def __enter__(self) -> Processes:
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.workers = [Worker("gemma_deploy.calibration.executors.worker") for _ in range(self.width)]
        self.idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self.workers:
            self.idle.put(worker)
        self.threads = ThreadPoolExecutor(self.width, "shard")  # one waits for each child's answer
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind:  # nobody wants the shards that are still being computed
            for worker in self.workers:
                worker.stop()
        self.threads.shutdown(wait=True, cancel_futures=True)
        for worker in self.workers:
            worker.close()
        shutil.rmtree(self.scratch, ignore_errors=True)

    def map(self, work: Work, layer: LayerPass, items: Iterable[Any]) -> Generator[Any, None, None]:
        """See `Executor`."""
        from safetensors.torch import save_file

        self.versions += 1
        self.scratch.mkdir(parents=True, exist_ok=True)
        file = self.scratch / f"layer-{self.versions}.safetensors"
        model, index = description(layer)
        try:
            save_file(layer.tensors(), file)
            # One more than there are workers, so that none waits while a result is being taken.
            yield from in_order(
                lambda item: self.threads.submit(self._ask, Task(work, model, index, file, item)),
                Future.result,
                items,
                ahead=self.width + 1,
            )
        except EOFError as ended:
            raise CalibrationError(
                "a process that computed calibration shards was killed or died",
                where=layer.name,
                expected=f"{self.width} processes that live as long as the calibration",
                next_step="run the same command again: it continues at this layer; if memory was short, "
                "set workspace.workers to a smaller number (the results are the same)",
            ) from ended
        finally:
            file.unlink(missing_ok=True)

    def _ask(self, task: Task) -> Any:
        worker = self.idle.get()
        try:
            return worker.ask(task)
        finally:
            self.idle.put(worker)
