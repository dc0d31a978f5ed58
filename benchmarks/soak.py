"""A server under requests of all kinds for a long time: errors, pages that are lost, memory that grows.

    gemma-deploy serve ARTIFACT --cache-mib 256 --port 9000 &
    python benchmarks/soak.py --server http://127.0.0.1:9000 --pid $! --requests 2000 --minutes 30

Requests of random lengths come evenly over the time, or faster where the server is slower than that: completions of
token ids and of texts, conversations, streamed or whole, greedy or drawn, some after a grammar, some with
log-probabilities or with several answers. Some begin alike, as conversations do. A quarter leaves on the way. Every
answer is looked at: its status, that it ends, and how many tokens it has. At the end nothing runs or waits, and as many
sequences are held as beginnings of texts are kept: none is lost. Memory is what /proc says of the process and its
children, after each tenth of the requests. What it has grown by is the mean of the last two tenths against that of two
behind the warm-up, whose length is `--warm` tenths: until then the cache fills.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2

from gemma_deploy.client import Target, connected, model_of, reason, said

WORDS = ("the", "of", "a", "window", "layer", "sees", "model", "text", "token", "cache", "page", "returns", "name")
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "n"],
    "additionalProperties": False,
}
GRAMMARS: tuple[dict[str, Any], ...] = (
    {"guided_json": SCHEMA},
    {"guided_regex": "[a-z]{3,12}( [a-z]{3,12}){0,5}"},
    {"guided_choice": ["yes", "no", "perhaps"]},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
)
BRIEF = ("stop", *{name for one in GRAMMARS for name in one})  # what may end an answer early
GAUGES = ("requests_running", "requests_waiting", "cache_bytes", "prefixes_kept", "sequences_held", "preemptions_total")


def words(draw: random.Random, count: int) -> str:
    """So many, at random."""
    return " ".join(draw.choice(WORDS) for _ in range(count))


def body_of(
    draw: random.Random, model: str, *, vocabulary: int, longest: int, openings: list[str], talks: bool
) -> tuple[str, dict[str, Any]]:
    """The path and the body of a request at random.

    Args:
        longest: tokens of a text, the answer included; openings: that some texts begin with.
        talks: whether the model has a chat template.
    """
    most = draw.randint(1, max(1, longest // 8))
    body: dict[str, Any] = {"model": model, "max_tokens": most, "ignore_eos": draw.random() < 0.7}
    body |= (
        {"temperature": 0}
        if draw.random() < 0.4
        else {"temperature": draw.uniform(0.3, 1.5), "seed": draw.randrange(1 << 31)}
    )
    if body["temperature"]:
        body |= draw.choice(
            ({}, {"top_p": 0.9}, {"top_k": 40}, {"min_p": 0.05}, {"repetition_penalty": 1.2, "presence_penalty": 0.5})
        )
    if draw.random() < 0.15:
        body |= draw.choice(GRAMMARS)
    if draw.random() < 0.1:
        body["n"] = draw.randint(2, 4)
    if draw.random() < 0.2:
        body["stop"] = ["\n\n", "the of"]
    if draw.random() < 0.5:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    room = max(4, int(draw.random() ** 2 * (longest * 3 // 4 - most)))  # more short ones than long ones
    opening = draw.choice(openings) if draw.random() < 0.4 else ""
    if talks and draw.random() < 0.5:
        if draw.random() < 0.3:
            body |= {"logprobs": True, "top_logprobs": draw.randint(0, 5)}
        messages = [{"role": "user", "content": f"{opening} {words(draw, max(1, room // 3))}"}]
        if draw.random() < 0.3:
            messages += [{"role": "assistant", "content": words(draw, 5)}, {"role": "user", "content": words(draw, 5)}]
        return "chat/completions", body | {"messages": messages}
    if draw.random() < 0.3:
        body |= {"logprobs": draw.randint(0, 5), "echo": draw.random() < 0.3 and room < 400}
    ids = [draw.randrange(3, vocabulary) for _ in range(room)]
    return "completions", body | {
        "prompt": ids if draw.random() < 0.5 else f"{opening} {words(draw, max(1, room // 3))}"
    }


class Soak:
    """Sends the requests and counts what comes of them."""

    def __init__(self, client: httpx2.AsyncClient, target: Target, arguments: argparse.Namespace) -> None:
        self._client, self._target, self._arguments = client, target, arguments
        self.outcomes: Counter[str] = Counter()
        self.problems: list[str] = []

    async def one(self, path: str, body: dict[str, Any], leave: float | None) -> None:
        """A request.

        Args:
            leave: seconds after which its client leaves; None: it stays.
        """
        try:
            async with asyncio.timeout(leave):
                outcome = await self._asked(f"{self._target.base}/{path}", body)
        except TimeoutError:
            outcome = "left"
        except httpx2.HTTPError as error:
            outcome = f"problem: {reason(error)}"
        self.outcomes[outcome.partition(":")[0]] += 1
        if outcome.startswith("problem"):
            self.problems.append(f"{path} {json.dumps(body)[:300]}: {outcome}")

    async def _asked(self, url: str, body: dict[str, Any]) -> str:
        if not body.get("stream"):
            answer = await self._client.post(url, json=body)
            if answer.status_code != 200:
                return f"problem: {said(answer.status_code, answer.content)}"
            found = answer.json()
            ends = [choice["finish_reason"] for choice in found["choices"]]
            return self._judged(body, ends, found["usage"]["completion_tokens"])
        async with self._client.stream("POST", url, json=body) as answer:
            if answer.status_code != 200:
                return f"problem: {said(answer.status_code, await answer.aread())}"
            lines = [line[6:] async for line in answer.aiter_lines() if line.startswith("data: ")]
        if lines[-1] != "[DONE]":
            return f"problem: the stream ends with {lines[-1][:200]}"
        events = [json.loads(line) for line in lines[:-1]]
        ends = [c["finish_reason"] for event in events for c in event["choices"] if c["finish_reason"] is not None]
        return self._judged(body, ends, events[-1]["usage"]["completion_tokens"])

    @staticmethod
    def _judged(body: dict[str, Any], ends: list[str], tokens: int) -> str:
        copies = body.get("n", 1)
        if len(ends) != copies or not set(ends) <= {"stop", "length", "tool_calls"}:
            return f"problem: {copies} answers end with {ends}"
        free = not body.get("stop") and body["ignore_eos"] and not any(set(one) & set(body) for one in GRAMMARS)
        if tokens > copies * body["max_tokens"] or (free and tokens != copies * body["max_tokens"]):
            return f"problem: {tokens} tokens in {copies} answers of {body['max_tokens']}"
        return "answered"

    async def counts(self) -> dict[str, float]:
        """Of /metrics."""
        text = (await self._client.get(f"{self._target.root}/metrics")).text
        found = {name: re.search(rf"^gemma_deploy_{name}{{.*}} (\S+)$", text, re.MULTILINE) for name in GAUGES}
        return {name: float(one[1]) for name, one in found.items() if one is not None}

    async def idle(self) -> dict[str, float]:
        """Counts when nothing runs or waits any more.

        Raises:
            SystemExit: something still does after a minute.
        """
        for _ in range(600):
            counts = await self.counts()
            if not counts["requests_running"] and not counts["requests_waiting"]:
                return counts
            await asyncio.sleep(0.1)
        raise SystemExit(f"something runs that nobody waits for: {counts}")


def resident(pid: int) -> int:
    """Bytes of a process and of those it started that are in memory, anonymous and of files."""
    total = 0
    for one in [pid, *map(int, " ".join(c.read_text() for c in Path(f"/proc/{pid}/task").glob("*/children")).split())]:
        total += sum(
            int(kib) << 10
            for kib in re.findall(r"^VmRSS:\s+(\d+)", Path(f"/proc/{one}/status").read_text(), re.MULTILINE)
        )
    return total


async def soak(arguments: argparse.Namespace) -> int:
    """All of it: how many problems there were."""
    draw = random.Random(arguments.seed)
    target = Target(arguments.server, arguments.model, seconds=600)
    async with connected(target, 4 * arguments.together) as client:
        card = await model_of(client, target)
        one, places = Soak(client, target, arguments), asyncio.Semaphore(arguments.together)
        longest = min(int(card["max_model_len"]), arguments.longest)
        model, hello = str(card["id"]), {"max_tokens": 1, "messages": [{"role": "user", "content": "a"}]}
        tried = await client.post(f"{target.base}/chat/completions", json={"model": model, **hello})
        if not (talks := tried.status_code == 200):
            print("no conversations: the model has no chat template")
        openings = [words(draw, longest // 8) for _ in range(6)]
        rss, rows, tasks = [], [], set()
        started, tenth = time.monotonic(), max(1, arguments.requests // 10)
        for number in range(arguments.requests):
            due = started + number * arguments.minutes * 60 / arguments.requests
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            await places.acquire()
            path, body = body_of(
                draw, model, vocabulary=arguments.vocabulary, longest=longest, openings=openings, talks=talks
            )
            leave = None
            if draw.random() < 0.25:  # of an answer that takes longer than that
                leave = draw.uniform(0, arguments.leave)
                body = {name: value for name, value in body.items() if name not in BRIEF}
                body |= {"max_tokens": longest // 4, "ignore_eos": True}
            task = asyncio.create_task(one.one(path, body, leave))
            tasks.add(task)
            task.add_done_callback(lambda done: (tasks.discard(done), places.release()))
            if (number + 1) % tenth == 0:
                await asyncio.gather(*tasks)
                counts = await one.idle()
                rss.append(resident(arguments.pid))
                rows.append(counts)
                print(
                    f"{time.monotonic() - started:6.0f} s, {number + 1} requests, {dict(one.outcomes)}: resident "
                    f"{rss[-1] / (1 << 20):.1f} MiB, cache {counts['cache_bytes'] / (1 << 20):.1f} MiB, "
                    f"{counts['prefixes_kept']:.0f} beginnings, {counts['preemptions_total']:.0f} set back",
                    flush=True,
                )
        last = await one.idle()
        for problem in one.problems[:20]:
            print(problem)
        before, after = sum(rss[arguments.warm : arguments.warm + 2]) / 2, sum(rss[-2:]) / 2
        grown, lost = (after - before) / before, last["sequences_held"] - last["prefixes_kept"]
        print(
            f"{len(one.problems)} problems of {sum(one.outcomes.values())} requests; {lost:.0f} sequences lost; keys "
            f"and values {last['cache_bytes'] / (1 << 20):.1f} MiB; resident {before / (1 << 20):.1f} -> "
            f"{after / (1 << 20):.1f} MiB, {grown:+.2%} behind the warm-up"
        )
        return len(one.problems) + (lost != 0) + (grown > arguments.grow)


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="http://127.0.0.1:9000")
    parser.add_argument("--pid", type=int, required=True, help="of the server")
    parser.add_argument("--model", default="")
    parser.add_argument("--vocabulary", type=int, default=256_000, help="token ids are below that")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--together", type=int, default=24, help="requests under way, at most")
    parser.add_argument("--longest", type=int, default=1024, help="tokens of a text, the answer included")
    parser.add_argument("--leave", type=float, default=1.0, help="seconds in which those who leave do so")
    parser.add_argument("--warm", type=int, default=2, help="tenths of the requests that warm up")
    parser.add_argument("--grow", type=float, default=0.02, help="part that memory may grow by behind the warm-up")
    parser.add_argument("--seed", type=int, default=0)
    return min(1, asyncio.run(soak(parser.parse_args())))


if __name__ == "__main__":
    raise SystemExit(main())
