"""Measures a server that speaks OpenAI's protocol: so many requests at a time, of random tokens.

Prompts are lists of token ids drawn at random, a new one for each request, so that their length is exact whatever the
tokenizer is and no server finds one that it has read. `ignore_eos` and `min_tokens`, which vLLM and
llama.cpp know, make every answer as long as was asked; one that is shorter fails.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_deploy.bench.requests import Answer, Load, summary
from gemma_deploy.client import PROBLEM_CHARACTERS, Target, beginning, connected, model_of, reason, said
from gemma_deploy.errors import DeployError

if TYPE_CHECKING:
    import httpx2

EVENT_BYTES = 1 << 20  # of one event of a stream, at most
DONE = "[DONE]"


def measure_server(
    target: Target,
    loads: Sequence[Load],
    *,
    limits: Mapping[str, float] | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
    transport: httpx2.AsyncBaseTransport | None = None,
) -> dict[str, Any]:
    """Figures of all loads, one behind another, each behind one request of its size that does not count.

    Args:
        limits: what counts as good, milliseconds by name of `MEASURES`.
        seed: of the prompts.
        say: told what begins.
        transport: instead of a network.

    Returns:
        server, model, loads: for each its `summary`.

    Raises:
        UsageError: the server has several models and none is named, or not this one.
        DeployError: there is no such server, or it refuses the request that does not count.
    """
    return asyncio.run(_measured(target, loads, limits or {}, np.random.default_rng(seed), say, transport))


async def _measured(
    target: Target,
    loads: Sequence[Load],
    limits: Mapping[str, float],
    random: np.random.Generator,
    say: Callable[[str], None],
    transport: httpx2.AsyncBaseTransport | None,
) -> dict[str, Any]:
    most = max(load.concurrency for load in loads)
    async with connected(target, most, transport) as client:
        model = str((await model_of(client, target))["id"])
        asker = _Asker(client, target, model=model, random=random)
        found = []
        for load in loads:
            sizes = f"{load.input_tokens} tokens in and {load.output_tokens} out"
            say(f"{load.requests} requests of {sizes}, {load.concurrency} at a time")
            first = await asker.ask(load)
            if first.problem:
                raise DeployError(
                    f"a request of {load.input_tokens} tokens for {load.output_tokens} failed: {first.problem}",
                    where=target.base,
                    next_step="see the server's log; ask for shorter lengths, or name another --model",
                )
            found.append(summary(load, await asker.run(load), limits))
    return {"server": target.base, "model": model, "limits_ms": dict(limits), "loads": found}


class _Asker:
    """Sends requests and keeps the time."""

    def __init__(self, client: httpx2.AsyncClient, target: Target, *, model: str, random: np.random.Generator) -> None:
        self._client, self._target, self._model, self._random = client, target, model, random

    async def run(self, load: Load) -> list[Answer]:
        """All answers of a load; as many requests as `concurrency` are under way until the last have been sent."""
        left, answers = iter(range(load.requests)), []

        async def worker() -> None:
            for _ in left:
                answers.append(await self.ask(load))

        await asyncio.gather(*(worker() for _ in range(min(load.concurrency, load.requests))))
        return answers

    async def ask(self, load: Load) -> Answer:
        """One request, and what came of it."""
        import httpx2

        body = {
            "model": self._model,
            "prompt": self._random.integers(1, self._target.vocabulary, load.input_tokens).tolist(),
            "max_tokens": load.output_tokens,
            "min_tokens": load.output_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        answer = Answer(time.perf_counter())
        try:
            async with self._client.stream("POST", f"{self._target.base}/completions", json=body) as response:
                if response.status_code != 200:
                    answer.problem = said(response.status_code, await beginning(response))
                else:
                    await self._read(httpx2.EventSource(response, max_event_size=EVENT_BYTES), answer)
        except httpx2.HTTPError as error:
            answer.problem = reason(error)
        answer.ended = time.perf_counter()
        if not answer.problem and answer.tokens != load.output_tokens:
            answer.problem = f"answered {answer.tokens} tokens instead of {load.output_tokens}"
        return answer

    async def _read(self, events: httpx2.EventSource, answer: Answer) -> None:
        """Put down when pieces come, and what the server counted."""
        async for event in events:
            if event.data == DONE:
                if not answer.pieces:
                    answer.problem = "an answer without text"
                return
            try:
                told = json.loads(event.data)
                if (error := told.get("error")) is not None:
                    answer.problem = str(error.get("message", error))[:PROBLEM_CHARACTERS]
                    return
                if any(_is_piece(choice, answer) for choice in told.get("choices", ())):
                    answer.pieces.append(time.perf_counter())
                if (usage := told.get("usage")) is not None:
                    answer.tokens = int(usage["completion_tokens"])
                    answer.cached = int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
            except (ValueError, TypeError, KeyError, AttributeError):
                answer.problem = "a piece of the stream is not what OpenAI's servers send"
                return
        answer.problem = "the stream ended early"


def _is_piece(choice: Mapping[str, Any], answer: Answer) -> bool:
    """Whether a token came: some have no text, but what only says why the answer ended is none."""
    text = choice.get("text")
    return text is not None and bool(text or choice.get("finish_reason") is None or not answer.pieces)
