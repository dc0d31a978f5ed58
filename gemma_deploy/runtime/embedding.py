"""Vectors of texts: an encoder's artifact, open. `open_embedder` of gemma_deploy/engine.py makes one.

What sentence-transformers' `encode` does, without torch: prompt in front, tokens with their frame, one run for texts of
about the same length, vectors of length 1; cut to fewer channels, of length 1 again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from gemma_deploy.checkpoint.sentence import SentenceHead, cut
from gemma_deploy.errors import ArtifactError, UsageError
from gemma_deploy.runtime.encoder import EncoderGraph
from gemma_deploy.text import Tokenizer

log = logging.getLogger(__name__)
BATCH = 8  # texts of one run where the graph takes any number


class Embedder:
    """Makes vectors of texts.

    Args:
        path: of the artifact; head: what stands behind its encoder.

    Attributes:
        prompts: what is put in front of a text, by the kind of text; default_prompt: the kind that is meant where none
            is named, None for none.
        dimensions: channels of a whole vector; sizes: to which it may be cut, the whole first.
        longest: tokens of a text, at most; of a longer one the first are read, which is told.
    """

    def __init__(self, graph: EncoderGraph, tokenizer: Tokenizer, head: SentenceHead, *, path: Path) -> None:
        self.graph, self.tokenizer, self.head, self.path = graph, tokenizer, head, path
        self.prompts: Mapping[str, str] = head.prompts
        self.default_prompt, self.dimensions, self.sizes = head.default_prompt, head.dimensions, head.sizes
        self.longest = min(graph.longest, head.longest or graph.longest)

    def embed(
        self,
        texts: Sequence[str],
        *,
        prompt_name: str | None = None,
        dimensions: int | None = None,
        batch: int = BATCH,
        progress: Callable[[int, int], None] | None = None,
    ) -> np.ndarray:
        """Vectors of texts, [n, dimensions] float32, each of length 1, in the order of the texts.

        Args:
            prompt_name: kind of the texts, one of `prompts`; None for `default_prompt`.
            dimensions: one of `sizes`; None for the whole vector.
            batch: texts that run together, where the artifact does not say how many do.
            progress: called with (texts done, all of them).

        Raises:
            UsageError: a prompt or a size that the model does not have, no text, or one that is no Unicode.
            ArtifactError: a vector is no number.
        """
        if isinstance(texts, str):
            raise UsageError("texts is one string", expected="a list of texts", next_step="write [text]")
        size, prompt = self._size(dimensions), self.prompt(prompt_name)
        if not texts:
            raise UsageError("there is no text", where=str(self.path), next_step="give at least one")
        ids = [self._tokens(number, prompt + text) for number, text in enumerate(texts, 1)]
        order = sorted(range(len(ids)), key=lambda number: len(ids[number]))  # padding costs as much as tokens
        found = np.empty((len(ids), size), np.float32)
        for start in range(0, len(order), max(1, batch)):
            run = order[start : start + max(1, batch)]
            vectors = self.graph.vectors([ids[number] for number in run])
            found[run] = vectors if size == self.dimensions else cut(vectors, size)
            if progress is not None:
                progress(start + len(run), len(order))
        if not np.isfinite(found).all():
            raise ArtifactError(
                "gives NaN or infinity",
                where=str(self.path),
                expected="vectors of length 1",
                next_step="run `gemma-deploy verify` on the artifact, then compile it again",
            )
        return found

    def prompt(self, name: str | None) -> str:
        """The prompt of a kind of text; "" where there is none.

        Raises:
            UsageError: the model has no such kind.
        """
        name = self.default_prompt if name is None else name
        if name is None:
            return ""
        if name not in self.prompts:
            raise UsageError(
                f"the model has no prompt named {name!r}",
                where=str(self.path),
                expected=", ".join(self.prompts) or "none: it has no prompts",
                next_step="name one of these, or none",
            )
        return self.prompts[name]

    def _size(self, dimensions: int | None) -> int:
        if dimensions is None:
            return self.dimensions
        if dimensions not in self.sizes:
            raise UsageError(
                f"vectors are not cut to {dimensions} channels",
                where=str(self.path),
                expected=", ".join(map(str, self.sizes)),
                next_step="ask for one of these",
            )
        return dimensions

    def _tokens(self, number: int, text: str) -> list[int]:
        ids, left = self.tokenizer.encode_framed(text, self.longest)
        if left:
            log.warning(
                "text %d has %d tokens: only the first %d are read, the last %d are left out",
                number, len(ids) + left, len(ids), left,
            )  # fmt: skip
        return ids
