"""Static graphs of one stage in a process of its own, and a runner whose graphs are elsewhere."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.backends.tvm_vacc.contract import GRAPHS, read_contract
from gemma_deploy.backends.tvm_vacc.join import PASSED
from gemma_deploy.backends.tvm_vacc.runner import StaticGraphs, StaticRunner, slots_of
from gemma_deploy.backends.tvm_vacc.sessions import open_session
from gemma_deploy.graph.contract import BORROWED, PAST_CACHE, PRESENT
from gemma_deploy.runtime.staged import Arrays, Chain

LOGITS = "logits"


class StaticStage:
    """See `Stage`; its ranks, where there are several, are joined.

    Args:
        artifact: whose files have been checked; name: of the stage; threads: of an operator.

    Raises:
        ArtifactError: a file is missing or damaged.
    """

    def __init__(self, artifact: Artifact, name: str, threads: int) -> None:
        folders = tuple(part.folder for part in artifact.manifest.parts if part.stage == name)
        arrays: dict[str, np.ndarray] = {}
        self._sessions = {
            graph: open_session(
                artifact.path / f"{graph}.onnx", "fast", threads, arrays=arrays, stages=(folders,), whole=False
            )
            for graph in GRAPHS
        }
        self._inputs = {graph: [port.name for port in one.get_inputs()] for graph, one in self._sessions.items()}
        self._outputs = {graph: [port.name for port in one.get_outputs()] for graph, one in self._sessions.items()}
        self.takes: Collection[str] = {name for name in self._inputs["iter1"] if name.startswith(f"{BORROWED}.")}
        self._contract = read_contract(artifact.path, artifact.manifest)
        self._caches: dict[str, np.ndarray] = {}
        self.position = 0

    def prefill(self, given: Arrays, passing: Collection[str]) -> dict[str, np.ndarray]:
        """See `Stage`."""
        self.position, self._caches = 0, {}
        found = self._run("iter0", given)
        batch, width = given["attention_mask"].shape
        slots = slots_of(self._contract, width)
        for name in self._inputs["iter1"]:
            if name.startswith(f"{PAST_CACHE}."):
                new = self._new(name, found, given)
                self._caches[name] = _with_slots(new, slots)
        self._mask = np.zeros((batch, slots + 1), np.int64)
        self._mask[:, :width], self._mask[:, -1] = given["attention_mask"], 1
        self.position = width
        return self._passed(found, given, passing)

    def step(self, given: Arrays, passing: Collection[str]) -> dict[str, np.ndarray]:
        """See `Stage`."""
        if self.position == self._mask.shape[1] - 1:
            self._grow()
        found = self._run("iter1", {**given, "attention_mask": self._mask, **self._caches})
        for name, cache in self._caches.items():
            cache[:, :, self.position] = self._new(name, found, given)[:, :, 0]
        self._mask[:, self.position] = 1
        self.position += 1
        return self._passed(found, given, passing)

    def _run(self, graph: str, feeds: Arrays) -> dict[str, np.ndarray]:
        names = self._outputs[graph]
        found = self._sessions[graph].run(names, {name: feeds[name] for name in self._inputs[graph]})
        return dict(zip(names, found, strict=True))

    @staticmethod
    def _new(cache: str, found: Arrays, given: Arrays) -> np.ndarray:
        """What is new of a cache: made here, or by an earlier stage whose layer it is of."""
        place = cache.removeprefix(PAST_CACHE)
        return found[f"{PRESENT}{place}"] if f"{PRESENT}{place}" in found else given[f"{BORROWED}{place}"]

    @staticmethod
    def _passed(found: Arrays, given: Arrays, passing: Collection[str]) -> dict[str, np.ndarray]:
        passed = {taken: found[name] for name, taken in PASSED.items() if name in found}
        if LOGITS in found:
            passed[LOGITS] = found[LOGITS]
        for name in passing:
            made = f"{PRESENT}{name.removeprefix(BORROWED)}"
            if made in found or name in given:  # else a stage between makes it
                passed[name] = found[made] if made in found else given[name]
        return passed

    def _grow(self) -> None:
        """Give the caches of a dynamic artifact another block of slots."""
        slots = slots_of(self._contract, self.position)
        self._caches = {name: _with_slots(cache, slots) for name, cache in self._caches.items()}
        mask = np.zeros((len(self._mask), slots + 1), np.int64)
        mask[:, : self.position], mask[:, -1] = self._mask[:, : self.position], 1
        self._mask = mask


def _with_slots(filled: np.ndarray, slots: int) -> np.ndarray:
    """[B, H, n, D] with more slots behind, of zeros."""
    batch, heads, count, size = filled.shape
    made = np.zeros((batch, heads, slots, size), filled.dtype)
    made[:, :, :count] = filled
    return made


class ChainRunner(StaticRunner):
    """See `StaticRunner`: padding and positions are its own, graphs and caches those of a chain."""

    _chain: Chain

    @classmethod
    def through(cls, graphs: StaticGraphs, chain: Chain) -> ChainRunner:
        """One whose steps a chain computes; none of `graphs` is opened."""
        made = cls.__new__(cls)
        made._chain = chain
        made._take(graphs)
        return made

    def _read(self, feeds: dict[str, np.ndarray]) -> np.ndarray:
        return self._chain.prefill(feeds)

    def _feed(self, tokens: Sequence[int]) -> np.ndarray:
        ids, positions = np.array(tokens, np.int64)[:, None], self.lengths.astype(np.int64)[:, None]
        return self._chain.step({"input_ids": ids, "position_ids": positions})[:, 0].astype(np.float32)

    def _empty_caches(self) -> list[np.ndarray]:
        return []
