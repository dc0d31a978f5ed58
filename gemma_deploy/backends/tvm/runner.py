"""Runs a compiled pair: as the static runner does, with TVM's functions in the place of graphs.

Functions read weights where the parameter file is mapped, read-only, and caches where they lie; a step writes its new
entries into their slots.
"""

from __future__ import annotations

import ctypes
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gemma_deploy.artifact.check import open_whole
from gemma_deploy.backends.tvm.export import require_tvm
from gemma_deploy.backends.tvm.target import missing_level
from gemma_deploy.backends.tvm_vacc.contract import GRAPHS
from gemma_deploy.backends.tvm_vacc.runner import StaticGraphs, StaticRunner
from gemma_deploy.errors import ArtifactError, UsageError
from gemma_deploy.machine import usable_cpus
from gemma_deploy.names import MANIFEST, TVM_LIBRARY, TVM_OBJECTS
from gemma_deploy.reading import exists
from gemma_deploy.runtime.session import VERIFY, load_file

if TYPE_CHECKING:
    from collections.abc import Sequence

ALIGNED = 64  # bytes: where TVM's vectors begin
EVERY_CORE = 1  # TVM's word for threads that are bound to cores as there are


class Compiled(NamedTuple):
    """The library, open: a function for each graph, and the weights that each takes behind its inputs."""

    functions: dict[str, Any]
    weights: dict[str, list[Any]]


class CompiledGraphs(StaticGraphs):
    """The library of an artifact, opened when it is first needed; see `StaticGraphs`."""

    _library: Compiled | None = None

    def opened(self) -> Compiled:
        """The library, and what it reads.

        Raises:
            UsageError: TVM is not installed, or the library is for another machine.
            ArtifactError: a file is missing or damaged.
        """
        with self._opening:
            if self._library is None:
                started = time.perf_counter()
                self._library = self._load()
                self.load_seconds += time.perf_counter() - started
            return self._library

    def _load(self) -> Compiled:
        self.check()
        if exists(self.path / MANIFEST):
            open_whole(self.path, hashes=True)  # what is cut off ends the process that loads it
        import tvm
        from tvm import relax

        from gemma_deploy.backends.tvm.lower import weights_of

        tvm.get_global_func("runtime.config_threadpool")(EVERY_CORE, self.threads or usable_cpus())
        try:
            machine = relax.VirtualMachine(tvm.runtime.load_module(str(self.path / TVM_LIBRARY)), tvm.cpu())
            functions = {graph: machine[graph] for graph in GRAPHS}
        except (RuntimeError, ValueError, AttributeError) as error:
            raise ArtifactError(
                f"TVM cannot load the library: {str(error).splitlines()[0]}",
                where=str(self.path / TVM_LIBRARY),
                next_step=VERIFY,
            ) from error
        weights: dict[str, list[Any]] = {}
        for graph in GRAPHS:
            weights[graph] = [
                _mapped(value.const_value) for value in weights_of(load_file(self.path / f"{graph}.onnx"))
            ]
        return Compiled(functions, weights)

    def check(self) -> None:
        """See that what runs it is here.

        Raises:
            UsageError: TVM is not installed, or the library is for another machine.
        """
        require_tvm("an artifact of backend.type tvm")
        if not (self.path / TVM_LIBRARY).exists() and (self.path / TVM_OBJECTS).exists():
            raise UsageError(
                "this artifact was compiled for another machine",
                where=str(self.path / TVM_OBJECTS),
                next_step="link it there (docs/tvm.md), or compile without backend.compile.triple for this one",
            )
        cpu = self.manifest.contract.cpu if self.manifest is not None else None
        missing = missing_level(cpu or "")
        if missing:
            raise UsageError(
                f"the library is for processors of the level {cpu}, and this one has no {', '.join(sorted(missing))}",
                where=str(self.path / TVM_LIBRARY),
                next_step="compile it again on this machine",
            )


class CompiledRunner(StaticRunner):
    """See `StaticRunner`."""

    graphs: CompiledGraphs

    def _read(self, feeds: dict[str, np.ndarray]) -> np.ndarray:
        library = self.graphs.opened()
        given = [_tensor(_aligned(array)) for array in feeds.values()]
        logits, *present = library.functions["iter0"](*given, *library.weights["iter0"])
        for cache, made in zip(self._caches, present, strict=True):
            cache[:, :, : self._sizes.prefill] = made.numpy()
        found: np.ndarray = logits.numpy()
        self._mask = _aligned(np.zeros((self.batch, self._sizes.context + 1), np.int64))
        self._bound = [_tensor(cache) for cache in self._caches]
        return found

    def _feed(self, tokens: Sequence[int]) -> np.ndarray:
        library = self.graphs.opened()
        if self.position == self._sizes.prefill:
            self._start_mask(self._mask)
        ids = _aligned(np.array(tokens, np.int64)[:, None])
        positions = _aligned(np.array(self.lengths, np.int64)[:, None])
        inputs = [*map(_tensor, (ids, self._mask, positions)), *self._bound]
        logits, *present = library.functions["iter1"](*inputs, *library.weights["iter1"])
        for cache, made in zip(self._caches, present, strict=True):
            cache[:, :, self.position] = made.numpy()[:, :, 0]
        self._mask[:, self.position] = 1
        found: np.ndarray = logits.numpy()
        return found[:, 0].copy()

    def _empty_caches(self) -> list[np.ndarray]:
        return [_aligned(cache) for cache in super()._empty_caches()]


def open_runner(path: Path, threads: int = 0) -> CompiledRunner:
    """An artifact's, finished or not.

    Raises:
        ArtifactError: it is none, or damaged.
    """
    made = CompiledRunner.on(CompiledGraphs(path, threads=threads))
    assert isinstance(made, CompiledRunner)
    return made


def _aligned(array: np.ndarray) -> np.ndarray:
    """A copy that begins where TVM's vectors may."""
    memory = np.empty(array.nbytes + ALIGNED, np.uint8)
    start = -memory.ctypes.data % ALIGNED
    made = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    made[...] = array
    return made


def _tensor(array: np.ndarray) -> Any:
    """The same memory as TVM's tensor."""
    from tvm import runtime

    return runtime.from_dlpack(array)


def _mapped(tensor: Any) -> Any:
    """A weight where its file is mapped. The pages stay read-only, whatever NumPy is told."""
    array: np.ndarray = tensor.numpy()
    memory = (ctypes.c_uint8 * array.nbytes).from_address(array.ctypes.data)
    memory.kept = array  # type: ignore[attr-defined] # as long as the memory is used
    shown = np.ctypeslib.as_array(memory).view(array.dtype).reshape(array.shape)
    return _tensor(shown if shown.ctypes.data % ALIGNED == 0 else _aligned(shown))
