"""What parity compares: anything that turns a case (prompts and the tokens forced after them) into logits.

A source is opened, asked and closed before the next one is opened, so that one model at a time is in memory. The torch
sources are in `reference.py`; `ArtifactSource` here runs the static graphs through `gemma_deploy.runtime`.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

Phase = Literal["prefill", "decode"]


@dataclass(frozen=True)
class Case:
    """One batch of teacher-forced sequences.

    Attributes:
        name: "text" or "random": where the tokens are from.
        prompts: [B] token lists, BOS included; lengths may differ.
        forced: [B][steps] tokens fed one by one after the prompt, whatever the model would have said.
    """

    name: str
    prompts: tuple[tuple[int, ...], ...]
    forced: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if len(self.prompts) != len(self.forced) or len({len(row) for row in self.forced}) != 1:
            raise ValueError("every prompt needs as many forced tokens as the others")
        if not all(self.prompts):
            raise ValueError("an empty prompt has no last token to predict from")

    @property
    def steps(self) -> int:
        """Decode steps after the prefill."""
        return len(self.forced[0])

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that a position attends to."""
        return max(map(len, self.prompts)) + self.steps

    def sequence(self, row: int) -> tuple[int, ...]:
        """Prompt and forced tokens of one row."""
        return self.prompts[row] + self.forced[row]

    def first(self, steps: int) -> Case:
        """The same prompts with fewer decode steps."""
        return Case(self.name, self.prompts, tuple(row[:steps] for row in self.forced))


class Source(Protocol):
    """A model, or a graph, or a fake of one."""

    name: str

    def logits(self, case: Case) -> Iterator[np.ndarray]:
        """[B, V] float32 after the prefill, then one after every forced token: `case.steps` + 1 arrays."""

    def values(self, case: Case, names: Sequence[str], phase: Phase) -> dict[str, list[np.ndarray]]:
        """Named intermediate values, `MODULE.out` or `MODULE.in`.

        Args:
            case: what to run.
            names: values wanted; those this source does not have are left out of the answer.
            phase: "prefill": of the prompt's positions; "decode": of the last forced token.

        Returns:
            name -> [B] arrays [positions, features], padding removed; fewer positions (the last ones) where the source
            drops the others on purpose.
        """

    def close(self) -> None:
        """Give the memory back."""


def rows_of(value: np.ndarray, lengths: Sequence[int], width: int) -> list[np.ndarray]:
    """Cut padding off one value.

    Args:
        value: [B, width, ...], [B, heads, width, D], or with one position where the graph kept only the last.
        lengths: [B] real tokens, at the right end.
        width: positions the graph computes, padding included.

    Returns:
        [B] arrays [positions, features].
    """
    if value.ndim == 4 and value.shape[1] != width and value.shape[2] == width:
        value = np.swapaxes(value, 1, 2)
    flat = value.reshape(value.shape[0], value.shape[1], -1)
    return [row[-min(n, row.shape[0]) :].astype(np.float32) for row, n in zip(flat, lengths, strict=True)]


class ArtifactSource:
    """The artifact's own graphs and parameters in ONNX Runtime.

    Args:
        path: the artifact's directory.
        mode: "strict" computes what the graph says; "fast" lets ORT rewrite it.
        threads: ORT threads, 0 for its default.
    """

    def __init__(self, path: Path, mode: Literal["strict", "fast"] = "strict", threads: int = 0) -> None:
        self.path, self.mode, self.threads = Path(path), mode, threads
        self.name = mode
        self._graphs: dict[str, Mapping[str, tuple[str, ...]]] = {}

    def _runner(self, outputs: Sequence[str] = ()) -> Any:
        from gemma_deploy.runtime import StaticRunner

        return StaticRunner(self.path, mode=self.mode, threads=self.threads, outputs=list(outputs))

    def logits(self, case: Case) -> Iterator[np.ndarray]:
        """See `Source.logits`."""
        runner = self._runner()
        yield np.asarray(runner.prefill([list(prompt) for prompt in case.prompts]))
        for step in range(case.steps):
            yield np.asarray(runner.step([row[step] for row in case.forced]))

    def values(self, case: Case, names: Sequence[str], phase: Phase) -> dict[str, list[np.ndarray]]:
        """See `Source.values`; `MODULE.in` is looked up in the graph as the first input of the node that makes `.out`."""
        available = self._values_of("iter0" if phase == "prefill" else "iter1")
        wanted = {name: available[name] for name in names if name in available}
        runner = self._runner(sorted(set(wanted.values())))
        runner.prefill([list(prompt) for prompt in case.prompts])
        lengths, width = [len(prompt) for prompt in case.prompts], int(runner.prefill_length)
        if phase == "decode":
            for step in range(case.steps):
                runner.step([row[step] for row in case.forced])
            lengths, width = [1] * len(case.prompts), 1
        return {name: rows_of(runner.values[value], lengths, width) for name, value in wanted.items()}

    def _values_of(self, graph: str) -> dict[str, str]:
        """Parity name -> value name in the graph, for every module value and every module input."""
        import onnx

        proto = onnx.load(str(self.path / f"{graph}.onnx"), load_external_data=False).graph
        made = {output: node for node in proto.node for output in node.output}
        names = {name: name for name in made if re.search(r"\.out$", name)}
        constants = {init.name for init in proto.initializer}
        for name in [name for name in names if name.endswith("_proj.out")]:
            dynamic = [value for value in made[name].input if value and value not in constants]
            if dynamic:
                names[name.removesuffix(".out") + ".in"] = dynamic[0]
        return names

    def close(self) -> None:
        """See `Source.close`."""
        gc.collect()
