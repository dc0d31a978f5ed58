"""The artifact's own graphs in ONNX Runtime, strict, a decoder layer at a time.

The graphs are cut where a layer's result is named `model.layers.{i}.out`. As the tokens are known beforehand, every
layer can run prefill and all decode steps before the next one is opened: its weights are read once, and not the whole
model for every token. The layer is cut again around its linears, so that one matrix is in memory at a time and is
dequantized once and not once a token. The pieces are the graph's own nodes and read the artifact's own parameters;
nothing is rebuilt. Differs from running the whole graph in the number of rows of a decode GEMM only.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gemma_deploy.architectures import branches, find
from gemma_deploy.artifact.manifest import Manifest
from gemma_deploy.backends.tvm_vacc.contract import Port, StaticContract, read_contract, read_manifest, stages_of
from gemma_deploy.backends.tvm_vacc.cutting import (
    DECODE_INPUTS,
    EMBEDDED,
    LAST_HIDDEN,
    LAST_VECTORS,
    LOGITS,
    NORMED,
    Cutter,
    by_position,
    layer_input,
)
from gemma_deploy.backends.tvm_vacc.passing import CaseState
from gemma_deploy.machine import give_memory_back
from gemma_deploy.names import PER_LAYER_VECTORS, STREAMS
from gemma_deploy.parity.cases import Case
from gemma_deploy.parity.sources import Features
from gemma_deploy.progress import Tick
from gemma_deploy.quantization.rescaling import Rescaling

EXPERTS_MODULE = "experts"
UNROUNDED = "strict, activations unrounded"
CHOSEN = "lm_head.in"  # what the LM head reads: in prefill a slice of the final norm


@dataclass(frozen=True)
class Run:
    """One execution of a layer: the values it has so far, and in decode the cache and the slot that is written."""

    feeds: dict[str, np.ndarray]
    cache: dict[str, np.ndarray] | None = None
    slot: int = 0


class StrictSource:
    """The artifact, computed to the letter.

    Args:
        path: the artifact's directory, finished or not.
        manifest: of an artifact that is not finished.
        rounding: round activations where the graphs say so. Rounding makes a jump of any difference, however small,
            so what is around it can be proven without it alone.
        every: compute every position of prompts, where layers of the prefill graph compute the last one alone: each
            position then goes through these layers as the last one does.
    """

    def __init__(
        self, path: Path, manifest: Manifest | None = None, rounding: bool = True, *, every: bool = False
    ) -> None:
        self.name = "strict" if rounding else UNROUNDED
        self.path = Path(path).resolve()
        manifest = manifest if manifest is not None else read_manifest(self.path)
        self.contract = read_contract(self.path, manifest)
        row = None if manifest is None else find(manifest.model.model_type)
        self.positions_first = row is not None and row.positions_first
        self.rescaling = (manifest and manifest.rescaling) or Rescaling()
        stages = stages_of(manifest)
        self.graphs = {graph: Cutter(self.path, graph, stages, rounding=rounding) for graph in ("iter0", "iter1")}
        if not rounding:  # codes have become what they stand for
            self.contract = replace(self.contract, caches=tuple(map(self._as_read, self.contract.caches)))
        self.caches, self.every = caches_by_layer(self.contract), every
        self.layers = self.graphs["iter0"].layers
        self.progress: Tick | None = None
        self.unit = "layers"

    def _as_read(self, port: Port) -> Port:
        dtype = self.graphs["iter1"].values[port.name].dtype
        return port if dtype is None else replace(port, dtype=str(dtype.numpy()))

    def run(self, cases: Sequence[Case]) -> Features:
        """Hidden states after the final norm, [prompt + steps, H] of every row."""
        states = [self.start(case) for case in cases]
        for state in states:
            self.embed(state)
        for layer in range(self.layers):
            self.layer(layer, states)
            if self.progress is not None:
                self.progress(layer + 1, self.layers)
        self.finish(states)
        return [state.rows(CHOSEN) for state in states]

    def start(self, case: Case) -> CaseState:
        """The inputs of a case as the runtime would feed them."""
        contract = self.contract
        if contract.dynamic:
            width = max(map(len, case.prompts))
            contract = contract.sized(len(case.prompts), width, width + case.steps)
        return CaseState(case, contract, self.rescaling, positions_first=self.positions_first)

    @functools.cached_property
    def sources(self) -> dict[int, set[int]]:
        """Of the layers without caches of their own: whose caches they read, as the graphs have it."""
        return {
            layer: {one.layer for cutter in self.graphs.values() for one in cutter.shared(layer).values()}
            for layer in range(self.layers)
            if layer not in self.caches
        }

    def embed(self, state: CaseState, extra: Sequence[str] = ()) -> None:
        """Input ids -> the first layer's input, and what layers read beside it.

        Args:
            extra: inner values to keep in the states as well.
        """
        cutter = self.graphs["iter0"]
        names = [EMBEDDED, *(name for name in (PER_LAYER_VECTORS, STREAMS) if name in cutter.values), *extra]
        state.prefill.update(zip(names, cutter.piece(["input_ids"], names)(state.prefill), strict=True))
        piece = self.graphs["iter1"].piece(["input_ids"], names)
        for step in state.steps:
            step.update(zip(names, piece(step), strict=True))

    def layer(self, layer: int, states: Sequence[CaseState], extra: Sequence[str] = ()) -> None:
        """One layer, prefill and every step, with a cache of its own, or those of layers before it.

        Args:
            extra: inner values to keep in the states as well, `MODULE.out` or `MODULE.in`.
        """
        kept = (f"model.layers.{layer}.out", *extra)
        names = self.caches.get(layer, [])
        present = [name.replace("past_key_values", "present") for name in names]
        first = self.graphs["iter0"].first_at_last
        for state in states:  # one at a time: the values of P positions are wide
            if first is not None and layer >= first:
                state.cut_to_last(self.graphs["iter0"], layer, every=self.every)
            runs = [Run(feeds) for feeds in state.last or [state.prefill]]
            self._give("iter0", layer, runs, [state.made] * len(runs))
            self._through("iter0", layer, runs, (*kept, *present))
        steps = []
        read = any(layer in sources for sources in self.sources.values())
        for state in states:
            cache = {}
            width = state.contract.prefill
            ports = [port for port in state.contract.caches if port.name in names]
            for name, port in zip(present, ports, strict=True):
                cache[port.name] = np.zeros([int(dim) for dim in port.shape], port.dtype)
                cache[port.name][:, :, :width] = made = state.prefill.pop(name)
                state.made |= {name: made} if read else {}
            runs = [Run(feeds, cache or None, width + i) for i, feeds in enumerate(state.steps)]
            self._give("iter1", layer, runs, [state.new_at(run.slot) for run in runs])
            state.caches |= cache if read else {}
            steps += runs
        self._through("iter1", layer, steps, kept)

    def _give(self, graph: str, layer: int, runs: Sequence[Run], caches: Sequence[Mapping[str, np.ndarray]]) -> None:
        """Give a layer without caches of its own those that it reads.

        Args:
            caches: of each run, by the names of the graph's ports.
        """
        if layer in self.caches:
            return
        for name, one in self.graphs[graph].shared(layer).items():
            for run, values in zip(runs, caches, strict=True):
                run.feeds[name] = one.of(values[one.cache])

    def _through(self, graph: str, layer: int, runs: Sequence[Run], kept: Sequence[str]) -> None:
        """Take runs through a layer, cut around its linears; of the values made, only `kept` remain."""
        if not runs:
            return
        cutter = self.graphs[graph]
        at_last = [name for name in cutter.at_last if name in runs[0].feeds and name not in (LAST_HIDDEN, LAST_VECTORS)]
        known = [cutter.entering(layer), *(at_last or DECODE_INPUTS)]
        beside = [*cutter.beside(layer), *(cutter.shared(layer) if layer not in self.caches else ())]
        values = {name: cutter.value(name) for name in kept}
        for branch, group in ((one, group) for one in branches() for group in (one.entry, one.exit)):
            names = [f"model.layers.{layer}.{name}.out" for name in group.readers]
            linears = [share for name in names for share in cutter.linears(name) if share in cutter.values]
            inputs = [cutter.linear_input(linear) for linear in linears]
            attends, spent = branch.attends and group is branch.exit, []
            if group is branch.exit and not attends:  # what it is made from are the widest values there are
                only_for_it = tuple(f"{reader}.out" for reader in branch.entry.readers)
                spent = [name for name in known if name.endswith(only_for_it) and name not in values.values()]
            _between(cutter, layer, [*known, *beside] if attends else known, inputs, runs, attends=attends, spent=spent)
            known = [name for name in known if name not in spent]
            _drop(spent, runs)
            for name, linear in zip(inputs, linears, strict=True):
                _apply(cutter, name, linear, runs, together=graph == "iter1" or len(runs) > 1)
            _drop(set(inputs) - set(known) - set(values.values()), runs)
            known += linears
            give_memory_back()
        known += _experts(cutter, layer, known, runs)
        _between(cutter, layer, [*known, *beside], list(values.values()), runs, attends=True)
        for run in runs:
            results = {name: run.feeds[value] for name, value in values.items()}
            for name in set(run.feeds) - cutter.for_all_layers:
                del run.feeds[name]
            run.feeds.update(results)
        give_memory_back()

    def finish(self, states: Sequence[CaseState]) -> None:
        """The final norm, with the prefill graph's own choice of the last position."""
        cutter = self.graphs["iter0"]
        last = layer_input(self.layers, streams=cutter.streams)
        chosen = cutter.logits_input()
        outputs = list(dict.fromkeys([NORMED, chosen]))
        piece, step_piece = cutter.piece([last], outputs), self.graphs["iter1"].piece([last], [NORMED])
        for state in states:
            for feeds in state.last or [state.prefill]:
                made = piece(feeds)
                feeds[NORMED], feeds[CHOSEN] = made[0], made[0].copy()
                feeds[CHOSEN][:, -1:] = made[-1][:, -1:]
            for step in state.steps:
                step[NORMED] = step[CHOSEN] = step_piece(step)[0]

    def head(self, features: np.ndarray, prompt_end: bool = False) -> np.ndarray:
        """features: [n, H] -> [n, V]: the LM head of the graph that makes them, in blocks of the vocabulary."""
        cutter = self.graphs["iter0" if prompt_end else "iter1"]
        entering_name = cutter.logits_input()
        dtype = cutter.values[entering_name].dtype
        entering = features[None].astype(dtype.numpy() if dtype is not None else np.float32)
        shares = [cutter.in_blocks(entering_name, share, [entering])[0][0] for share in cutter.linears(LOGITS)]
        return np.concatenate(shares, axis=-1) if len(shares) > 1 else shares[0]


def _apply(cutter: Cutter, name: str, linear: str, runs: Sequence[Run], together: bool) -> None:
    """Run a linear, on all rows of all runs together or on one run after the other."""
    entering = [run.feeds[name] for run in runs]
    if not together:
        made = cutter.in_blocks(name, linear, entering)
    else:
        made = np.split(cutter.in_blocks(name, linear, [np.concatenate(entering)])[0], len(runs))
    for run, value in zip(runs, made, strict=True):
        run.feeds[linear] = value


def _experts(cutter: Cutter, layer: int, known: Sequence[str], runs: Sequence[Run]) -> list[str]:
    """Run the experts of a layer on one run after the other, and name what they make; nothing where it has none."""
    out = f"model.layers.{layer}.{EXPERTS_MODULE}.out"
    shares = [share for share in cutter.linears(out) if share in cutter.values]
    inputs = dict.fromkeys(name for share in shares for name in cutter.experts_inputs(share) if name not in known)
    if not shares:
        return []
    _between(cutter, layer, known, list(inputs), runs, attends=False)
    for run in runs:
        for share in shares:
            run.feeds[share] = cutter.experts(share, run.feeds)
    _drop(inputs, runs)
    return shares


def _drop(names: Iterable[str], runs: Sequence[Run]) -> None:
    """Forget values."""
    for run in runs:
        for name in names:
            del run.feeds[name]


def _between(
    cutter: Cutter,
    layer: int,
    known: Sequence[str],
    wanted: Sequence[str],
    runs: Sequence[Run],
    attends: bool,
    spent: Sequence[str] = (),
) -> None:
    """Compute values from known ones; where a run has a cache, its new keys and values are written there.

    Args:
        spent: known values that nobody reads after this; results may be written over them.
    """
    wanted = [name for name in dict.fromkeys(wanted) if name not in known]
    if not wanted:
        return
    cached = attends and runs[0].cache is not None
    past = list(runs[0].cache or {}) if cached else []
    present = [name.replace("past_key_values", "present") for name in past]
    outputs = list(dict.fromkeys([*wanted, *present]))
    piece = cutter.piece([*known, *past], outputs)
    for run in runs:
        values = piece({**run.feeds, **(run.cache or {})}) if attends else by_position(piece, run.feeds, spent)
        made = dict(zip(outputs, values, strict=True))
        run.feeds.update({name: made[name] for name in wanted})
        for name, new in zip(past, present, strict=True):
            assert run.cache is not None
            run.cache[name][:, :, run.slot] = made[new][:, :, 0]


def caches_by_layer(contract: StaticContract) -> dict[int, list[str]]:
    """Names of the caches of each layer that has some."""
    layers: dict[int, list[str]] = {}
    for port in contract.caches:
        layers.setdefault(int(port.name.split(".")[1]), []).append(port.name)
    return layers
