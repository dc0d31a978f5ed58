"""Runs an artifact: left-padded prefill, then one token at a time into a cache that no step copies.

With static graphs the cache has its size from the start. With dynamic ones prompts are padded to the longest of them,
and the cache starts little larger than that and grows by whole blocks of slots.

Sessions and contract come from sessions.py and contract.py; which token comes next is decided in sampling.py.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gemma_deploy.artifact.manifest import Manifest
from gemma_deploy.backends.tvm_vacc.contract import (
    StaticContract,
    check_session,
    read_contract,
    read_manifest,
    stages_of,
)
from gemma_deploy.backends.tvm_vacc.sessions import Mode, load_graph, open_session
from gemma_deploy.errors import UsageError
from gemma_deploy.runtime.limits import check_tokens

if TYPE_CHECKING:
    import onnxruntime as ort


GROWTH = 256  # cache slots of a dynamic artifact


class _Decoder(NamedTuple):
    """iter1, bound once: every array is read and written by ORT where it lies."""

    session: ort.InferenceSession
    binding: Any
    ids: np.ndarray  # [B, 1]
    mask: np.ndarray  # [B, C+1]
    positions: np.ndarray  # [B, 1]
    logits: np.ndarray  # [B, 1, V]
    presents: list[np.ndarray]  # per cache [B, Hk, 1, D]
    extra: list[str]


class StaticGraphs:
    """Prefill and decode graphs, each opened when it is first needed; runners of one artifact may share them.

    Args:
        artifact_dir: directory with iter0.onnx, iter1.onnx, params.safetensors and (when finished) manifest.json. The
            parts of a divided artifact run joined, in one session on this machine.
        mode: see sessions.py.
        threads: of one operator; 0 for as many as there are cores.
        outputs: inner values (`MODULE.out`) to return after every call; those a graph lacks are left out.
        manifest: the manifest of an artifact that is not finished.
        one_prompt: give the prefill session's memory back after each prefill. Fast int8 sessions hold the weights once
            more each, packed for their kernel.

    Attributes:
        load_seconds: spent opening sessions so far.
    """

    def __init__(
        self,
        artifact_dir: str | Path,
        mode: Mode = "fast",
        threads: int = 0,
        *,
        outputs: Sequence[str] = (),
        manifest: Manifest | None = None,
        one_prompt: bool = False,
    ) -> None:
        self.path, self.mode, self.threads = Path(artifact_dir), mode, threads
        self.manifest: Manifest | None = manifest if manifest is not None else read_manifest(self.path)
        self.contract = read_contract(self.path, self.manifest)
        self.one_prompt = one_prompt
        self.load_seconds = 0.0
        self._stages = stages_of(self.manifest)
        self._outputs = list(dict.fromkeys(outputs))
        self._arrays: dict[str, np.ndarray] = {}
        self._opened: dict[str, tuple[ort.InferenceSession, list[str]]] = {}
        self._opening = threading.Lock()

    def session(self, graph: str) -> tuple[ort.InferenceSession, list[str]]:
        """The session of `iter0` or `iter1`, and the inner values that it returns.

        Raises:
            ArtifactError: a file is missing or damaged, or is not what the manifest says.
        """
        with self._opening:
            if graph not in self._opened:
                self._opened[graph] = self._open(graph)
            return self._opened[graph]

    def prefilled(self) -> None:
        """A prompt has been read."""
        if self.one_prompt:
            self._opened.pop("iter0", None)

    def _open(self, graph: str) -> tuple[ort.InferenceSession, list[str]]:
        file = self.path / f"{graph}.onnx"
        extra = []
        if self._outputs:
            known = {value.name for node in load_graph(file, self._stages).graph for value in node.outputs}
            extra = [name for name in self._outputs if name in known]
        started = time.perf_counter()
        session = open_session(file, self.mode, self.threads, outputs=extra, arrays=self._arrays, stages=self._stages)
        self.load_seconds += time.perf_counter() - started
        check_session(session, self.contract, graph, where=file)
        return session, extra


def slots_of(contract: StaticContract, filled: int) -> int:
    """Slots of a cache that has `filled` of them in use; of a dynamic artifact it grows by blocks."""
    return min(contract.context, (filled // GROWTH + 1) * GROWTH) if contract.dynamic else contract.context


class StaticRunner:
    """Prompts and their caches, on graphs of their own or shared ones.

    Args:
        artifact_dir, mode, threads, outputs, manifest, one_prompt: see `StaticGraphs`.

    Attributes:
        values: name -> float32 array of the last call, for each of `outputs`.
        lengths: [B] real tokens seen per row, padding not counted.
        position: cache slots filled, padding counted; P after a prefill.
    """

    def __init__(
        self,
        artifact_dir: str | Path,
        mode: Mode = "fast",
        threads: int = 0,
        *,
        outputs: Sequence[str] = (),
        manifest: Manifest | None = None,
        one_prompt: bool = False,
    ) -> None:
        graphs = StaticGraphs(artifact_dir, mode, threads, outputs=outputs, manifest=manifest, one_prompt=one_prompt)
        self._take(graphs)

    @classmethod
    def on(cls, graphs: StaticGraphs) -> StaticRunner:
        """One with caches of its own, on graphs that others use too."""
        made = cls.__new__(cls)
        made._take(graphs)
        return made

    def _take(self, graphs: StaticGraphs) -> None:
        self.graphs, self.path, self.contract, self.manifest = graphs, graphs.path, graphs.contract, graphs.manifest
        self.values: dict[str, np.ndarray] = {}
        self._decoder: _Decoder | None = None
        self._sizes = self.contract
        self._caches = [] if self.contract.dynamic else self._empty_caches()
        self.reset()

    @property
    def load_seconds(self) -> float:
        """Spent opening the graphs so far; they are opened when first needed."""
        return self.graphs.load_seconds

    @property
    def batch(self) -> int:
        """B: prompts of one prefill; of a dynamic artifact those of the last prefill, 1 before it."""
        return self._sizes.batch

    @property
    def prefill_length(self) -> int:
        """P: tokens of the longest prompt there may be."""
        return self.contract.prefill

    @property
    def context_length(self) -> int:
        """C: cache slots there may be."""
        return self.contract.context

    @property
    def remaining(self) -> int:
        """Steps until the cache is full."""
        return self.context_length - self.position

    def reset(self) -> None:
        """Forget the prompts, and the caches of a dynamic artifact."""
        if self.contract.dynamic:
            self._sizes, self._decoder = self.contract.sized(1, 0, 0), None
            self._caches = self._empty_caches()
        self.position = 0
        self.lengths = np.zeros(self.batch, np.int64)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """Run the prompts and fill cache slots 0 .. P-1 (of a dynamic artifact: as many as the longest prompt has).

        Args:
            prompts: [B] token lists of 1 .. P tokens each; any number of them for a dynamic artifact.

        Returns:
            [B, V] float32: logits after each prompt's last token.

        Raises:
            UsageError: wrong number of prompts, or prompts that are empty, too long or hold no tokens of this model.
        """
        self._check_prompts(prompts)
        if self.contract.dynamic:
            longest = max(map(len, prompts))
            self._sizes = self.contract.sized(len(prompts), longest, self._slots(longest))
            self._caches, self._decoder = self._empty_caches(), None
        batch, width = self.batch, self._sizes.prefill
        ids, mask, positions = (np.zeros((batch, width), np.int64) for _ in range(3))
        for row, prompt in enumerate(prompts):
            start = width - len(prompt)
            ids[row, start:], mask[row, start:] = prompt, 1
            positions[row, start:] = np.arange(len(prompt))
        logits = self._read({"input_ids": ids, "attention_mask": mask, "position_ids": positions})
        self.position, self.lengths = width, mask.sum(axis=1)
        self._prompt_mask = mask
        if self._decoder is not None:
            self._start_mask(self._decoder.mask)
        return np.asarray(logits[:, -1], np.float32)

    def _read(self, feeds: dict[str, np.ndarray]) -> np.ndarray:
        """Run prompts that are padded to one length: [B, 1, V]."""
        session, extra = self.graphs.session("iter0")
        logits, *rest = session.run(["logits", *self._present_names(), *extra], feeds)
        del session
        self.graphs.prefilled()
        for cache in self._caches:
            cache[:, :, : self._sizes.prefill] = rest.pop(0)
        self.values = {name: value.astype(np.float32) for name, value in zip(extra, rest, strict=True)}
        return np.asarray(logits)

    def step(self, tokens: Sequence[int]) -> np.ndarray:
        """Feed one token per row.

        Args:
            tokens: [B].

        Returns:
            [B, V] float32.

        Raises:
            UsageError: no prefill before it, the cache is full, or the tokens are not tokens of this model.
        """
        if self.position == 0:
            raise UsageError("a step needs a prefill before it", next_step="call prefill(prompts) first")
        if self.position >= self.context_length:
            raise UsageError(
                f"the context is full: all {self.context_length} cache slots are used "
                f"({self._sizes.prefill} by the prompt with its padding, "
                f"{self.context_length - self._sizes.prefill} by generated tokens)",
                next_step="generate fewer tokens, or compile with a longer second length in frontend.shape.input_ids",
            )
        if len(tokens) != self.batch:
            raise UsageError(
                f"{len(tokens)} tokens for a batch of {self.batch}",
                where=str(self.path),
                next_step="give one token for each sequence",
            )
        check_tokens(tokens, self.contract.vocab_size, "tokens")
        if self.position == self._sizes.context:
            self._grow()
        logits = self._feed(tokens)
        self.position += 1
        self.lengths = self.lengths + 1
        return logits

    def _feed(self, tokens: Sequence[int]) -> np.ndarray:
        """Run one token a row: [B, V], memory of its own."""
        decoder = self._decoder or self._bind()
        decoder.ids[:, 0], decoder.positions[:, 0] = tokens, self.lengths
        decoder.session.run_with_iobinding(decoder.binding)
        for cache, present in zip(self._caches, decoder.presents, strict=True):
            cache[:, :, self.position] = present[:, :, 0]
        decoder.mask[:, self.position] = 1
        if decoder.extra:
            values = decoder.binding.get_outputs()[-len(decoder.extra) :]
            self.values = {
                name: value.numpy().astype(np.float32) for name, value in zip(decoder.extra, values, strict=True)
            }
        return decoder.logits[:, 0].copy()

    def _bind(self) -> _Decoder:
        import onnxruntime as ort

        session, extra = self.graphs.session("iter1")
        batch = self.batch
        ids, positions = np.zeros((batch, 1), np.int64), np.zeros((batch, 1), np.int64)
        mask = np.zeros((batch, self._sizes.context + 1), np.int64)
        logits = np.zeros((batch, 1, self.contract.vocab_size), np.float32)
        presents = [np.zeros_like(cache[:, :, :1]) for cache in self._caches]
        binding = session.io_binding()
        feeds: dict[str, np.ndarray] = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        feeds |= {port.name: cache for port, cache in zip(self.contract.caches, self._caches, strict=True)}
        for name, array in feeds.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        for name, array in {"logits": logits, **dict(zip(self._present_names(), presents, strict=True))}.items():
            binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(array))
        for name in extra:
            binding.bind_output(name, "cpu")
        self._start_mask(mask)
        self._decoder = _Decoder(session, binding, ids, mask, positions, logits, presents, extra)
        return self._decoder

    def _start_mask(self, mask: np.ndarray) -> None:
        mask[:] = 0
        mask[:, : self._sizes.prefill] = self._prompt_mask
        mask[:, self._sizes.prefill : self.position] = 1
        mask[:, -1] = 1

    def _slots(self, filled: int) -> int:
        """Size of a cache with room for at least one block more, unless the context ends before."""
        return slots_of(self.contract, filled)

    def _grow(self) -> None:
        """Give a dynamic artifact's cache another block of slots."""
        old = self._caches
        self._sizes = self._sizes.sized(self.batch, self._sizes.prefill, self._slots(self.position))
        self._caches, self._decoder = self._empty_caches(), None
        for cache, before in zip(self._caches, old, strict=True):
            cache[:, :, : self.position] = before

    def _empty_caches(self) -> list[np.ndarray]:
        return [np.zeros([int(dim) for dim in port.shape], port.dtype) for port in self._sizes.caches]

    def _present_names(self) -> list[str]:
        return [port.name.replace("past_key_values", "present") for port in self.contract.caches]

    def _check_prompts(self, prompts: Sequence[Sequence[int]]) -> None:
        if not prompts:
            raise UsageError("no prompts", where=str(self.path), next_step="give at least one")
        if len(prompts) != self.batch and not self.contract.dynamic:
            raise UsageError(
                f"{len(prompts)} prompts for graphs of batch {self.batch}",
                where=str(self.path),
                next_step=f"give {self.batch}, or compile with frontend.shape.batch: {len(prompts)}",
            )
        problems = []
        for row, prompt in enumerate(prompts):
            if len(prompt) == 0:
                problems.append(f"prompt {row} is empty: it needs at least the BOS token")
            elif len(prompt) > self.prefill_length:
                problems.append(f"prompt {row} has {len(prompt)} tokens, {len(prompt) - self.prefill_length} too many")
        if problems:
            raise UsageError(
                f"prompts must have 1 to {self.prefill_length} tokens",
                problems=problems,
                next_step="shorten it, or compile with a longer first length in frontend.shape.input_ids",
            )
        for row, prompt in enumerate(prompts):
            check_tokens(prompt, self.contract.vocab_size, f"prompt {row}")
