"""Runs the static graphs of an artifact: left-padded prefill, then one token at a time over a cache written in place.

The cache of each layer is one buffer [B, Hk, C, D], bound to the decode session once. A step copies only the new
entries [B, Hk, 1, D] into their slot; the cache itself is never copied.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemma_deploy.errors import ArtifactError, UsageError
from gemma_deploy.runtime.session import Mode, open_session

PREFILL, DECODE = "iter0", "iter1"


class StaticRunner:
    """One conversation (or batch) on one artifact.

    Args:
        path: the artifact's directory.
        mode: `strict` or `fast`, see session.py.
        threads: 0 takes all cores.
        outputs: intermediate values to keep in `values` after each call.

    Raises:
        ArtifactError: the directory is no artifact.
    """

    def __init__(self, path: Path, mode: Mode = "fast", *, threads: int = 0, outputs: Sequence[str] = ()) -> None:
        self.path, self.mode, self.threads, self.outputs = path, mode, threads, tuple(outputs)
        file = path / "manifest.json"
        try:
            self.manifest = json.loads(file.read_text(encoding="utf-8"))
            contract = self.manifest["contract"]
        except (OSError, json.JSONDecodeError, KeyError) as error:
            raise ArtifactError(
                f"no readable manifest ({error})", where=str(file), next_step="compile the recipe again"
            ) from error
        self._start(contract)

    @classmethod
    def of(cls, path: Path, contract: dict[str, Any], mode: Mode = "strict", **kwargs: Any) -> StaticRunner:
        """A runner on an artifact that has no manifest yet (the gate runs before it is written)."""
        runner = cls.__new__(cls)
        runner.path, runner.mode, runner.manifest = path, mode, {}
        runner.threads, runner.outputs = kwargs.get("threads", 0), tuple(kwargs.get("outputs", ()))
        runner._start(contract)
        return runner

    def _start(self, contract: dict[str, Any]) -> None:
        self.batch, self.prefill_length, self.context = contract["batch"], contract["prefill"], contract["context"]
        self.vocab_size = contract["vocab_size"]
        self.cache_shape = (self.batch, contract["kv_heads"], self.context, contract["head_dim"])
        self.cache_dtype = np.dtype(contract["cache_dtype"])
        self.layers = contract["layers"]
        self.values: dict[str, np.ndarray] = {}
        self._sessions: dict[str, Any] = {}
        self._decode: _Decode | None = None
        self.caches: list[np.ndarray] = []
        self.reset()

    @property
    def position(self) -> int:
        """Cache slots in use."""
        return self._slots

    def reset(self) -> None:
        """Forget the conversation."""
        self._slots = 0
        self._mask = np.zeros((self.batch, self.context + 1), np.int64)
        self._mask[:, -1] = 1
        self._lengths = np.zeros(self.batch, np.int64)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """Start a conversation.

        Args:
            prompts: token ids, one list per sequence of the batch, BOS included.

        Returns:
            Logits after the last token of each prompt, [B, V] float32.

        Raises:
            UsageError: a prompt is empty or longer than the artifact's prefill length.
        """
        self._check(prompts)
        self.reset()
        length = self.prefill_length
        ids, mask, positions = (np.zeros((self.batch, length), np.int64) for _ in range(3))
        for row, prompt in enumerate(prompts):
            ids[row, length - len(prompt) :] = prompt
            mask[row, length - len(prompt) :] = 1
            positions[row, length - len(prompt) :] = np.arange(len(prompt))
        feed = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        names = [output.name for output in self._session(PREFILL).get_outputs()]
        results = dict(zip(names, self._session(PREFILL).run(None, feed), strict=True))
        if not self.caches:
            self.caches = [np.zeros(self.cache_shape, self.cache_dtype) for _ in range(2 * self.layers)]
        for cache, name in zip(self.caches, self._presents(), strict=True):
            cache[:, :, :length] = results[name]
        self.values = {name: results[name] for name in self.outputs}
        self._mask[:, :length] = mask
        self._lengths = np.array([len(prompt) for prompt in prompts])
        self._slots = length
        return np.asarray(results["logits"][:, 0], np.float32)

    def step(self, tokens: Sequence[int]) -> np.ndarray:
        """Append one token to each sequence; returns logits [B, V] float32.

        Raises:
            UsageError: `prefill` was not called, or the cache is full.
        """
        if not self._slots:
            raise UsageError("step() before prefill()", next_step="call prefill() with the prompt first")
        if self._slots >= self.context:
            raise UsageError(
                f"the context is full: all {self.context} cache slots are used",
                where=str(self.path),
                next_step="compile the recipe with a larger second length in frontend.shape.input_ids",
            )
        if self._decode is None:
            self._decode = _Decode(self)
        logits = self._decode.run(np.asarray(tokens, np.int64)[:, None], self._lengths[:, None], self._mask)
        for cache, present in zip(self.caches, self._decode.presents, strict=True):
            cache[:, :, self._slots] = present[:, :, 0]
        self.values = self._decode.values
        self._mask[:, self._slots] = 1
        self._lengths = self._lengths + 1
        self._slots += 1
        return logits

    def _session(self, graph: str) -> Any:
        if graph not in self._sessions:
            self._sessions[graph] = open_session(
                self.path / f"{graph}.onnx", self.mode, threads=self.threads, outputs=self.outputs
            )
        return self._sessions[graph]

    def _presents(self) -> list[str]:
        return [f"present.{i}.{part}" for i in range(self.layers) for part in ("key", "value")]

    def _check(self, prompts: Sequence[Sequence[int]]) -> None:
        if len(prompts) != self.batch:
            raise UsageError(f"{len(prompts)} prompts for an artifact of batch {self.batch}", where=str(self.path))
        for row, prompt in enumerate(prompts):
            if not prompt:
                raise UsageError(f"prompt {row} is empty", expected="at least one token (BOS)")
            if len(prompt) > self.prefill_length:
                raise UsageError(
                    f"prompt {row} has {len(prompt)} tokens, the artifact takes {self.prefill_length}",
                    where=str(self.path),
                    next_step="shorten it, or compile with a larger first length in frontend.shape.input_ids",
                )


class _Decode:
    """The decode session with its inputs and outputs bound to buffers once."""

    def __init__(self, runner: StaticRunner) -> None:
        self.session = runner._session(DECODE)
        self.binding = self.session.io_binding()
        shape = (*runner.cache_shape[:2], 1, runner.cache_shape[3])
        self.presents = [np.empty(shape, runner.cache_dtype) for _ in runner.caches]
        self.logits = np.empty((runner.batch, 1, runner.vocab_size), np.float32)
        self.outputs = runner.outputs
        self.values: dict[str, np.ndarray] = {}
        for cache, present, name in zip(runner.caches, self.presents, runner._presents(), strict=True):
            self._input(name.replace("present", "past_key_values"), cache)
            self._output(name, present)
        self._output("logits", self.logits)
        for name in self.outputs:
            self.binding.bind_output(name, "cpu")

    def run(self, ids: np.ndarray, positions: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """One step; `presents` and `values` hold the rest. Returns a copy of the logits [B, V]."""
        self._input("input_ids", ids)
        self._input("position_ids", positions)
        self._input("attention_mask", mask)
        self.session.run_with_iobinding(self.binding)
        if self.outputs:
            names = [output.name for output in self.session.get_outputs()]
            found = dict(zip(self._bound(names), self.binding.get_outputs(), strict=True))
            self.values = {name: found[name].numpy() for name in self.outputs}
        return self.logits[:, 0].copy()

    def _bound(self, names: list[str]) -> list[str]:
        """Names in the order they were bound, which is the order `get_outputs` gives."""
        presents = [name for name in names if name.startswith("present.")]
        return [*presents, "logits", *self.outputs]

    def _input(self, name: str, array: np.ndarray) -> None:
        self.binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def _output(self, name: str, array: np.ndarray) -> None:
        self.binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
