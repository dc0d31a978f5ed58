"""Texts of one step with adapters of their own: what they cost through the scheduler of `gemma-deploy serve`.

    python benchmarks/adapters_served.py ARTIFACT --adapter DIR --adapter DIR ... [--rows 8] [--tokens 128]

ARTIFACT is of `backend.type: native` with `adapters: {rank: N}`. So many rows say so many tokens behind random prompts,
in turns: without adapters, all with the first, and each with one of all of them (rows with the same one not beside each
other when they are asked for). Medians of the rates of what is said and of prompts, with their ratio to the first way;
the ratio is taken within each turn. `cpu` is seconds of the processor for a step of `rows` tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from gemma_deploy.engine import open_engine
from gemma_deploy.names import MIB
from gemma_deploy.serve.opening import scheduling_of
from gemma_deploy.serve.request import Request, Scheduling
from gemma_deploy.tables import console, table_of


def spoken(scheduling: Scheduling, prompts: list[list[int]], adapters: list[int], tokens: int) -> dict[str, float]:
    """Rates of reading the prompts and of saying `tokens` behind each, every row with its adapter."""
    for prompt, adapter in zip(prompts, adapters, strict=True):
        scheduling.add(Request(prompt, max_tokens=tokens, adapter=adapter))
    started, before = time.perf_counter(), scheduling.counts()
    while scheduling.counts().prompt_tokens - before.prompt_tokens < sum(map(len, prompts)):
        scheduling.step()
    read, said = time.perf_counter(), scheduling.counts()
    processor = time.process_time()
    while not scheduling.idle:
        scheduling.step()
    seconds, after = time.perf_counter() - read, scheduling.counts()
    return {
        "tok_s": (after.tokens - said.tokens) / seconds,
        "prompt_tok_s": (after.prompt_tokens - before.prompt_tokens) / (read - started),
        "cpu": (time.process_time() - processor) / (after.steps - said.steps),
    }


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--adapter", type=Path, action="append", required=True)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    engine = open_engine(given.artifact, threads=given.threads)
    scheduling = scheduling_of(engine, together=given.rows, cache_bytes=4096 * MIB)
    numbers = [scheduling.load(scheduling.prepare(adapter)) for adapter in given.adapter]
    ways = {
        "without": [0] * given.rows,
        "one adapter": [numbers[0]] * given.rows,
        f"{len(numbers)} adapters": [numbers[row % len(numbers)] for row in range(given.rows)],
    }
    random, found = np.random.default_rng(1), dict[str, list[dict[str, float]]]()
    for turn in range(given.repeat + 1):
        for name, adapters in ways.items():
            prompts = random.integers(100, engine.vocab_size // 2, (given.rows, given.prompt_tokens)).tolist()
            one = spoken(scheduling, prompts, adapters, given.tokens)
            if turn:  # the first does not count
                found.setdefault(name, []).append(one)
    result: dict[str, Any] = {}
    for name, runs in found.items():
        result[name] = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for key in runs[0]:
            ratios = [run[key] / base[key] for run, base in zip(runs, found["without"], strict=True)]
            result[name][f"{key}_ratio"] = statistics.median(ratios)
        result[name]["runs"] = runs
    if given.json:
        given.json.write_text(json.dumps(result, indent=1))
    rows = [
        [name, f"{one['tok_s']:.0f}", f"{one['tok_s_ratio']:.2f}", f"{one['prompt_tok_s']:.0f}",
         f"{one['prompt_tok_s_ratio']:.2f}", f"{1000 * one['cpu']:.1f} ms", f"{one['cpu_ratio']:.2f}"]
        for name, one in result.items()
    ]  # fmt: skip
    console().print(
        table_of(("rows", "tokens/s", "ratio", "prompt tokens/s", "ratio", "processor a step", "ratio"), rows)
    )


if __name__ == "__main__":
    main()
