"""An artifact's graph in ONNX Runtime itself, with a cache that is written in place and can be set back.

Tokens may be read several at a time, with logits for each of the last few (backends/onnxruntime/last_positions.py):
that is what looks ahead (speculative.py) decides by.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gemma_deploy.artifact.manifest import Manifest
from gemma_deploy.backends.onnxruntime.looked_up import SHORT, leave_tables
from gemma_deploy.backends.onnxruntime.options import GRAPH
from gemma_deploy.backends.onnxruntime.window import CACHES, capacity_of, empty_caches, most_ahead
from gemma_deploy.errors import ArtifactError, UsageError
from gemma_deploy.runtime.generate import stop_token_ids
from gemma_deploy.runtime.session import VERIFY, as_compiled, load_file, open_graph
from gemma_deploy.runtime.speculative import MOST_TOKENS

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, OrtValue

TOGETHER = 512  # tokens of a prompt, see CHUNKS in backend.py
# Logits. Alone and among others the lead of a token differs by 2e-5 in fp32; with int8 kernels, real 270M, 440 tokens
# of WikiText-2, by 0.06 (median), 0.3 to 0.4 (99 %), 0.7 (most); where the head alone is such a kernel, and linears are
# integer products, by 0.015, 0.08, 0.11.
NEAR_TIE = {"fp32": 1e-3, "int8": 0.5, "integer": 0.25}


class OrtModel:
    """An artifact's graph in ONNX Runtime, with a cache that is written in place.

    Args:
        artifact_dir: directory with model.onnx and params.safetensors; manifest: of the artifact.
        threads: of one operator; 0 for as many as there are cores.
        states: whether hidden states are given as well, which a drafter reads.

    Attributes:
        context_length: positions there are; load_seconds: what opening took.
        windows: caches that hold a window alone, and how many positions that is.
        states: name of the output of hidden states, "" where they are not given.
        near_tie: largest logits closer than this are not told apart by several tokens in one step.

    Raises:
        UsageError: an artifact for a GPU. ArtifactError: a file is missing or damaged, or refused by ONNX Runtime.
    """

    def __init__(self, artifact_dir: str | Path, manifest: Manifest, threads: int = 0, *, states: bool = False) -> None:
        from gemma_deploy.backends.onnxruntime.joined import give_states
        from gemma_deploy.backends.onnxruntime.last_positions import last_positions
        from gemma_deploy.backends.onnxruntime.window import windows_of

        self.path = Path(artifact_dir).resolve()
        dtype = manifest.recipe.backend.dtype
        if dtype not in NEAR_TIE:
            raise UsageError(
                f"ONNX Runtime itself, and with it --lookup and --draft, is for CPUs; this artifact's dtype is {dtype}",
                where=str(self.path),
                expected="backend.dtype fp32 or int8",
                next_step="leave --lookup and --draft out",
            )
        integer = manifest.kernels is not None and manifest.kernels.integer
        self.near_tie, self.stop_ids = NEAR_TIE["integer" if integer else dtype], frozenset(stop_token_ids(manifest))
        self.context_length = manifest.contract.context
        started = time.perf_counter()
        model = load_file(self.path / GRAPH)
        with as_compiled(self.path / GRAPH):
            last_positions(model, MOST_TOKENS)
            self.states = give_states(model) if states else ""
            self.windows = windows_of(model.graph)
        self.session = open_graph(model, self.path, threads=threads, lean=True)
        self.load_seconds = time.perf_counter() - started
        if not any(value.name.startswith(CACHES) for value in self.session.get_inputs()):
            raise ArtifactError("its graph has no cache", where=str(self.path / GRAPH), next_step=VERIFY)
        self.vocab_size = int(next(v for v in self.session.get_outputs() if v.name == "logits").shape[2])
        self.slots, self.most_tokens = manifest.contract.adapters, MOST_TOKENS
        self.adapters: dict[str, Mapping[str, OrtValue]] = {}  # loaded ones, their matrices by input

    def embedded(self, token: int) -> np.ndarray:
        """The scaled embedding of a token, [hidden] float32."""
        feeds = {"input_ids": np.array([[token]], np.int64), "attention_mask": np.ones((1, 1), np.int64)}
        given = {value.name for value in self._embedding.get_inputs()}
        (row,) = self._embedding.run(None, {name: value for name, value in feeds.items() if name in given})
        found: np.ndarray = row[0, 0]
        return found

    @functools.cached_property
    def _embedding(self) -> InferenceSession:
        """The same graph without all that stands behind the embedding; the table is mapped, not read."""
        from gemma_deploy.backends.onnxruntime.joined import cut_to_embedding

        model = load_file(self.path / GRAPH)
        with as_compiled(self.path / GRAPH):
            cut_to_embedding(model)
        return open_graph(model, self.path, threads=1)

    def sequence(self, room: int) -> OrtSequence:
        """A new one, of so many tokens at most."""
        return OrtSequence(self, room)


class OrtSequence:
    """One sequence in a cache of fixed size.

    Args:
        room: tokens there may be, at most.
        adapter: matrices of an adapter, by input of the graph.

    Attributes:
        length: tokens that count; it may be set back by as many as `ahead` gave, if these were more than one.
        caches: keys and values, by input of the graph.
    """

    def __init__(self, model: OrtModel, room: int, adapter: Mapping[str, OrtValue] | None = None) -> None:
        from onnxruntime import OrtValue

        self.model, self.length, self._adapter = model, 0, dict(adapter or {})
        empty = empty_caches(model.session, model.windows, room)
        self.caches = {name: OrtValue.ortvalue_from_numpy(array) for name, array in empty.items()}
        self._windows = set(model.windows.values())
        self._states: dict[int, np.ndarray] = {}  # position -> hidden state, of the last that were read

    def ahead(self, wanted: int) -> int:
        """Of so many tokens to read next, as many as can be taken back; one that cannot where there is none."""
        counts = (most_ahead(self.length, window, capacity_of(window), wanted=wanted) for window in self._windows)
        return min(counts, default=wanted)

    def read(self, tokens: Sequence[int], top: int = 0) -> np.ndarray:
        """As `feed`, any number of tokens: in pieces, whose activations alone are alive at once."""
        for start in range(0, len(tokens), TOGETHER):
            last = start + TOGETHER >= len(tokens)
            rows = self.feed(tokens[start : start + TOGETHER], shrink=last and len(tokens) >= SHORT)
        leave_tables(self.model.path, len(tokens))
        return rows

    def feed(self, tokens: Sequence[int], top: int = 0, *, shrink: bool = False) -> np.ndarray:
        """Read tokens behind the `length` that count; logits [min(tokens, MOST_TOKENS), V] of the last of them.

        Args:
            top: all are given whatever it says.
            shrink: give memory back that the session took for this step.
        """
        from onnxruntime import RunOptions

        binding = self.model.session.io_binding()
        total = self.length + len(tokens)
        binding.bind_cpu_input("input_ids", np.array([tokens], np.int64))
        binding.bind_cpu_input("attention_mask", np.ones((1, total), np.int64))
        binding.bind_output("logits", "cpu")
        for name, cache in self.caches.items():
            binding.bind_ortvalue_input(name, cache)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), cache)
        if self.model.states:
            binding.bind_output(self.model.states, "cpu")
        # Bound like any input: ONNX Runtime 1.32 ignores RunOptions.add_active_adapter where inputs are bound.
        for name, matrix in self._adapter.items():
            binding.bind_ortvalue_input(name, matrix)
        options = RunOptions()
        if shrink:
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self.model.session.run_with_iobinding(binding, options)
        self.length = total
        outputs = binding.get_outputs()  # in the order in which they were bound
        logits: np.ndarray = outputs[0].numpy()[0]
        if self.model.states:
            rows = outputs[-1].numpy()[0][-len(logits) :]
            self._states = {place: row for place, row in self._states.items() if place >= total - 2 * MOST_TOKENS}
            self._states |= {total - len(rows) + place: row for place, row in enumerate(rows)}
        return logits

    def state(self, position: int) -> np.ndarray | None:
        """The hidden state [hidden] of a position that was read lately; None of any other."""
        return self._states.get(position)
