"""The graph of an encoder in ONNX Runtime, whatever back end made it: token ids to hidden states and vectors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gemma_deploy.artifact.manifest import ContractRecord
from gemma_deploy.errors import ArtifactError, UsageError
from gemma_deploy.graph.contract import TEXT_VECTORS, TOKEN_STATES
from gemma_deploy.runtime.limits import REBUILD, check_tokens

if TYPE_CHECKING:
    import onnxruntime as ort


class EncoderGraph:
    """A session on an encoder's graph.

    Args:
        session: open; contract: of the artifact; where: the graph's file, for messages.

    Attributes:
        dimensions: of a vector; longest: tokens of a text, at most.
        rows: texts that one run computes where that is fixed, else 0.

    Raises:
        ArtifactError: graph and manifest disagree.
    """

    def __init__(self, session: ort.InferenceSession, contract: ContractRecord, *, where: Path) -> None:
        self.session, self.vocab_size, self.where = session, contract.vocab_size, where
        self.longest, self.rows = contract.context, 0 if contract.dynamic else contract.batch
        found = {port.name: list(port.shape) for port in (*session.get_inputs(), *session.get_outputs())}
        said = {
            port.name: list(port.shape)
            for graph in contract.graphs.values()
            for port in (*graph.inputs, *graph.outputs)
        }
        names = ("input_ids", "attention_mask", TOKEN_STATES, TEXT_VECTORS)
        problems = [
            f"{name}: {said.get(name, 'not')} in the manifest, {found.get(name, 'not')} in the graph"
            for name in names
            if name not in said or found.get(name) != said[name]
        ]
        if self.rows and found.get("input_ids") != [self.rows, self.longest]:
            problems.append(f"input_ids: {[self.rows, self.longest]} by the contract's batch and context")
        if problems:
            raise ArtifactError("graph and manifest disagree", where=str(where), problems=problems, next_step=REBUILD)
        self.dimensions = found[TEXT_VECTORS][-1]

    def vectors(self, texts: Sequence[Sequence[int]]) -> np.ndarray:
        """Vectors [n, dimensions] float32 of texts, each a list of 1 to `longest` token ids.

        Raises:
            UsageError: a text that is empty or too long, or holds ids that are no tokens.
        """
        return np.concatenate([vectors[: len(run)] for run, (_, vectors) in self._runs(texts)])

    def both(self, texts: Sequence[Sequence[int]]) -> tuple[list[np.ndarray], np.ndarray]:
        """Hidden states behind the last norm of each text's tokens, [tokens, hidden] float32, and `vectors`.

        Raises:
            UsageError: see `vectors`.
        """
        states: list[np.ndarray] = []
        vectors: list[np.ndarray] = []
        for run, (hidden, made) in self._runs(texts):
            states += [hidden[row, : len(text)].copy() for row, text in enumerate(run)]
            vectors.append(made[: len(run)])
        return states, np.concatenate(vectors)

    def _runs(
        self, texts: Sequence[Sequence[int]]
    ) -> Iterator[tuple[Sequence[Sequence[int]], tuple[np.ndarray, np.ndarray]]]:
        """The texts of each run, and what it gives; rows of padding at the end where the batch is fixed."""
        problems = []
        for number, text in enumerate(texts):
            if not 0 < len(text) <= self.longest:
                problems.append(f"text {number} has {len(text)} tokens")
        if problems:
            raise UsageError(
                f"texts must have 1 to {self.longest} tokens",
                where=str(self.where),
                problems=problems[:20],
                next_step="shorten them, or compile with a longer length in frontend.shape.input_ids",
            )
        for number, text in enumerate(texts):
            check_tokens(text, self.vocab_size, f"text {number}")
        count = self.rows or len(texts)
        for start in range(0, len(texts), max(1, count)):
            run = texts[start : start + count]
            length = self.longest if self.rows else max(map(len, run))
            ids, mask = np.zeros((count, length), np.int64), np.zeros((count, length), np.int64)
            for row, text in enumerate(run):
                ids[row, : len(text)], mask[row, : len(text)] = text, 1
            states, vectors = self.session.run([TOKEN_STATES, TEXT_VECTORS], {"input_ids": ids, "attention_mask": mask})
            yield run, (states, vectors)
