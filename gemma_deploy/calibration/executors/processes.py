"""Shards in processes of this machine. Weights, hidden states and moments go through files, not through pipes."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from gemma_deploy.calibration.executors.ordered import in_order
from gemma_deploy.calibration.shards import LayerPass, Model, Work, description
from gemma_deploy.errors import CalibrationError


class Processes:
    """A pool of processes with one thread of torch each, alive from enter to exit.

    Args:
        workers: processes.
        scratch: directory made for the weights of the layer at work, and removed.
    """

    shares: Literal["memory", "disk", "nothing"] = "disk"

    def __init__(self, workers: int, scratch: Path) -> None:
        self.width, self.scratch, self.versions = workers, scratch, 0

    def __enter__(self) -> Processes:
        shutil.rmtree(self.scratch, ignore_errors=True)
        context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads in an unknown state
        self.pool = ProcessPoolExecutor(self.width, context, initializer=_begin)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error nobody wants the shards that are still being computed.
        children = list((getattr(self.pool, "_processes", None) or {}).values()) if kind else []
        for child in children:
            child.terminate()
        self.pool.shutdown(wait=True, cancel_futures=True)
        shutil.rmtree(self.scratch, ignore_errors=True)

    def map(self, work: Work, layer: LayerPass, items: Iterable[Any]) -> Generator[Any, None, None]:
        """See `Executor`."""
        from safetensors.torch import save_file

        self.versions += 1
        self.scratch.mkdir(parents=True, exist_ok=True)
        file = self.scratch / f"layer-{self.versions}.safetensors"
        try:
            save_file(layer.tensors(), file)
            told = (*description(layer), file)
            # One more than there are workers, so that none waits while a result is being taken.
            yield from in_order(
                lambda item: self.pool.submit(_call, work, told, item), Future.result, items, self.width + 1
            )
        except BrokenProcessPool as broken:
            raise CalibrationError(
                "a process that computed calibration shards was killed or died",
                where=layer.name,
                expected=f"{self.width} processes that live as long as the calibration",
                next_step="run the same command again: it continues at this layer; if memory was short, "
                "set workspace.workers to a smaller number (the results are the same)",
            ) from broken
        finally:
            file.unlink(missing_ok=True)


_loaded: tuple[Path, LayerPass] | None = None


def _begin() -> None:
    """In a worker: one thread, Ctrl-C left to the parent, and an end when the parent ends, however it does."""
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)  # the main thread may be anywhere; nothing of a worker's needs closing

    threading.Thread(target=watch, daemon=True, name="parent").start()


def _call(work: Work, told: tuple[Model, int, Path], item: Any) -> Any:
    """In a worker: do it on the layer in the file, which is read when it is another than the last."""
    global _loaded
    from safetensors import safe_open

    from gemma_deploy.calibration.shards import frame_of

    model, index, file = told
    if _loaded is None or _loaded[0] != file:
        _loaded = None
        with safe_open(file, framework="pt") as opened:
            # Copied: a mapped file would be read again and again when memory is short.
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
        _loaded = file, LayerPass.restored(frame_of(model), index, tensors)
    layer = _loaded[1]
    with layer.hooked():
        return work(layer, item)
