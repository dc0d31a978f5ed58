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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_deploy.bench.requests import Answer, Load, summary
from gemma_deploy.errors import DeployError, UsageError

if TYPE_CHECKING:
    import httpx2

EVENT_BYTES = 1 << 20  # of one event of a stream, at most
ERROR_BYTES = 1 << 16  # of an answer that is an error
PROBLEM_CHARACTERS = 200  # of what a server says of an error
CONNECT_SECONDS = 10.0
DONE = "[DONE]"


@dataclass(frozen=True)
class Target:
    """A server and what it is asked with.

    Args:
        url: up to `/v1`, or without it; model: "" for the only one that it has.
        key: for its Authorization, "" for none.
        vocabulary: ids are drawn below that.
        seconds: in which a request must send something.
    """

    url: str
    model: str = ""
    key: str = ""
    vocabulary: int = 256_000
    seconds: float = 600.0

    @property
    def base(self) -> str:
        """Where its endpoints are, without a slash at the end."""
        base = self.url.rstrip("/")
        return base if base.endswith("/v1") else f"{base}/v1"


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
    import httpx2

    most = max(load.concurrency for load in loads)
    options: dict[str, Any] = {
        "headers": {"Authorization": f"Bearer {target.key}"} if target.key else {},
        "timeout": httpx2.Timeout(target.seconds, connect=CONNECT_SECONDS),
        "limits": httpx2.Limits(max_connections=most, max_keepalive_connections=most),
        "trust_env": False,  # a proxy would be measured too
        "follow_redirects": False,
    }
    async with httpx2.AsyncClient(transport=transport, **options) as client:
        model = await _model(client, target)
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


async def _model(client: httpx2.AsyncClient, target: Target) -> str:
    """The name of the model that is asked for."""
    import httpx2

    where = f"{target.base}/models"
    try:
        answer = await client.get(where)
        if answer.status_code != 200:
            raise DeployError(
                f"the server answers {_said(answer.status_code, answer.content)}",
                where=where,
                next_step="name the server's address up to /v1, and its key with --api-key-file",
            )
        names = [str(one["id"]) for one in answer.json()["data"]]
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise DeployError(
            f"no answer: {_reason(error)}", where=where, next_step="start the server, or name its address in --server"
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DeployError(
            "the answer is no list of models",
            where=where,
            expected='{"data": [{"id": NAME}, ...]}, as OpenAI\'s servers answer',
            next_step="name the address of such a server in --server",
        ) from error
    if target.model in names or (not target.model and len(names) == 1):
        return target.model or names[0]
    raise UsageError(
        f"the server has no model named {target.model!r}" if target.model else "the server has several models",
        where=where,
        expected=", ".join(names[:20]) or "one: it has none",
        next_step="name one with --model",
    )


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
                    answer.problem = _said(response.status_code, await _beginning(response))
                else:
                    await self._read(httpx2.EventSource(response, max_event_size=EVENT_BYTES), answer)
        except httpx2.HTTPError as error:
            answer.problem = _reason(error)
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
                if any(choice.get("text") is not None for choice in told.get("choices", ())):
                    answer.pieces.append(time.perf_counter())
                if (usage := told.get("usage")) is not None:
                    answer.tokens = int(usage["completion_tokens"])
                    answer.cached = int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
            except (ValueError, TypeError, KeyError, AttributeError):
                answer.problem = "a piece of the stream is not what OpenAI's servers send"
                return
        answer.problem = "the stream ended early"


async def _beginning(response: httpx2.Response) -> bytes:
    """What a server says of an error, as far as anybody reads it."""
    content = b""
    async for part in response.aiter_bytes():
        content += part
        if len(content) > ERROR_BYTES:
            break
    return content[:ERROR_BYTES]


def _said(status: int, content: bytes) -> str:
    """An answer that is an error, as a sentence."""
    try:
        message = json.loads(content)["error"]["message"]
    except (ValueError, TypeError, KeyError):
        message = content.decode(errors="replace")
    return f"{status}: {' '.join(str(message).split())[:PROBLEM_CHARACTERS]}"


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}{f': {error}' if str(error) else ''}"
