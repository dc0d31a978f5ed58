"""Ours without HTTP, in the environment of this program: what a server adds shows beside it.

    python engine_serve.py ARTIFACT scheduler|session --threads N

`scheduler` is what `gemma-deploy serve` computes with, in its own loop; `session` one text after the other, as
`gemma-deploy run` makes it. Loads come and answers go as with openvino_serve.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gemma_deploy.engine import Engine, open_engine
from gemma_deploy.runtime.generate import GenerationStats
from gemma_deploy.serve.choosing import Choice
from gemma_deploy.serve.opening import scheduling_of
from gemma_deploy.serve.request import Ended, Failed, Request, Said, Scheduling

Load, Answers = dict[str, int], list[dict[str, Any]]
CACHE_BYTES = 4 << 30


def prompts_of(load: Load) -> list[list[int]]:
    """Random ids of all requests."""
    random = np.random.default_rng(load["seed"])
    return [random.integers(1, load["vocabulary"], load["input_tokens"]).tolist() for _ in range(load["requests"])]


def scheduled(scheduler: Scheduling, load: Load) -> Answers:
    """So many requests at a time, the next when one has ended."""
    waiting, answers = iter(prompts_of(load)), []
    running: dict[int, dict[str, Any]] = {}

    def begin() -> None:
        for prompt in waiting:
            choice = Choice(temperature=0.0)
            answer = {"sent": time.perf_counter(), "pieces": [], "tokens": 0}
            running[scheduler.add(Request(prompt, choice, load["output_tokens"], frozenset()))] = answer
            return

    for _ in range(load["concurrency"]):
        begin()
    while running:
        for number, event in scheduler.step():
            answer = running[number]
            if isinstance(event, Said):
                answer["pieces"].append(time.perf_counter())
                answer["tokens"] += 1
            elif isinstance(event, Failed):
                raise event.error
            elif isinstance(event, Ended):
                answers.append(running.pop(number) | {"ended": time.perf_counter()})
                begin()
    return answers


def one_by_one(engine: Engine, load: Load) -> Answers:
    """One request after the other."""
    answers = []
    for prompt in prompts_of(load):
        session = engine.session(max_length=len(prompt) + load["output_tokens"], endless=True)
        stats, pieces, sent = GenerationStats(), [], time.perf_counter()
        for _ in session.reply(prompt, max_new_tokens=load["output_tokens"], stats=stats):
            pieces.append(time.perf_counter())
        answers.append({"sent": sent, "pieces": pieces, "tokens": len(stats.tokens), "ended": time.perf_counter()})
    return answers


def main() -> None:
    """Answer loads until standard input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("artifact", type=Path)
    parser.add_argument("way", choices=("scheduler", "session"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--together", type=int, default=16)
    arguments = parser.parse_args()
    engine = open_engine(arguments.artifact, threads=arguments.threads)
    answer: Callable[[Load], Answers] = lambda load: one_by_one(engine, load)  # noqa: E731
    if arguments.way == "scheduler":
        scheduler = scheduling_of(engine, together=arguments.together, cache_bytes=CACHE_BYTES)
        answer = lambda load: scheduled(scheduler, load)  # noqa: E731
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
