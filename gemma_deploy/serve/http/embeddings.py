"""`/v1/embeddings`: vectors of texts, of an encoder's artifact."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.errors import UsageError
from gemma_deploy.runtime.embedding import Embedder
from gemma_deploy.serve.http.errors import ApiError, told, wrong
from gemma_deploy.serve.http.fields import Fields
from gemma_deploy.serve.http.served import card

MOST_TEXTS = 2048  # of one request, as OpenAI has it
MOST_WAITING = 64  # requests


class EmbeddingFields(Fields):
    """`/v1/embeddings`; `prompt_name` is the kind of the texts, which the model's own prompts are for."""

    input: Any = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    encoding_format: Literal["float", "base64"] | None = None
    prompt_name: str | None = None

    def texts(self) -> list[str]:
        """The texts.

        Raises:
            ApiError: it is something else; these encoders put prompts in front of texts, not of token ids.
        """
        given = [self.input] if isinstance(self.input, str) else self.input
        if not isinstance(given, list) or not given or not all(isinstance(one, str) for one in given):
            raise wrong("input", "a text, or a list of texts that is not empty")
        if len(given) > MOST_TEXTS:
            raise wrong("input", f"{len(given)} texts: at most {MOST_TEXTS}")
        return given


class ServedEncoder:
    """An encoder that is served, one request after the other.

    Args:
        names: under which it is asked for, its own first.
    """

    def __init__(self, embedder: Embedder, artifact: Artifact, names: Sequence[str]) -> None:
        self.names, self._embedder, self._created = tuple(names), embedder, int(time.time())
        self._backend = artifact.manifest.recipe.backend.type
        self._turn, self._waiting = asyncio.Lock(), 0

    def card(self, name: str) -> Mapping[str, Any]:
        """Of `/v1/models`."""
        longest = self._embedder.longest
        known = card(name, root=self.names[0], created=self._created, longest=longest, backend=self._backend)
        return {**known, "dimensions": self._embedder.dimensions}

    async def answer(self, fields: EmbeddingFields, name: str) -> dict[str, Any]:
        """Vectors of the texts, in their order.

        Raises:
            ApiError: the model has no such prompt or size, or too many requests wait.
        """
        texts, embedder = fields.texts(), self._embedder
        if fields.prompt_name is not None and fields.prompt_name not in embedder.prompts:
            raise wrong("prompt_name", f"one of {', '.join(embedder.prompts) or 'none: the model has no prompts'}")
        if fields.dimensions is not None and fields.dimensions not in embedder.sizes:
            raise wrong("dimensions", f"one of {', '.join(map(str, embedder.sizes))}")
        if self._waiting >= MOST_WAITING:
            raise ApiError(429, f"{self._waiting} requests are waiting already", code="queue_full")
        self._waiting += 1
        try:
            async with self._turn:
                vectors, tokens = await asyncio.to_thread(self._computed, texts, fields)
        except UsageError as error:
            raise told(error, "input") from None
        finally:
            self._waiting -= 1
        data = [
            {"object": "embedding", "index": index, "embedding": _written(vector, fields.encoding_format)}
            for index, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "model": name, "data": data, "usage": usage}

    def _computed(self, texts: list[str], fields: EmbeddingFields) -> tuple[np.ndarray, int]:
        vectors = self._embedder.embed(texts, prompt_name=fields.prompt_name, dimensions=fields.dimensions)
        prompt = self._embedder.prompt(fields.prompt_name)
        longest = self._embedder.longest
        return vectors, sum(len(self._embedder.tokenizer.encode_framed(prompt + text, longest)[0]) for text in texts)


def _written(vector: np.ndarray, form: str | None) -> list[float] | str:
    """A vector as it was asked for; base64 is of float32, the least byte first."""
    if form == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    found: list[float] = vector.tolist()
    return found
