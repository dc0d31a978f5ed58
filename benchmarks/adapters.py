"""An adapter beside an artifact: what it costs, how long a change takes, and whether tokens are the merged weights'.

    python benchmarks/adapters.py WITH --plain PLAIN --adapter DIR [--other DIR] [--merged MERGED]

WITH was compiled with `adapters: {rank: N}`, PLAIN from the same recipe without that section, MERGED from the same
recipe with the adapter merged (frontend.adapter). Speeds are medians of runs in turns, in onnxruntime-genai: so many
tokens behind a prompt of so many. Tokens: MERGED decodes greedily behind 16 passages of a text; WITH sees the same
tokens, and at every decoded position its largest logit counts. A near tie is a difference where the two models' logits
are off by more than what separates the merged one's choice from its second.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from gemma_deploy.engine import Engine, open_engine
from gemma_deploy.evaluation.texts import read_text
from gemma_deploy.parity.cases import Case
from gemma_deploy.runtime.generate import GenerationStats
from gemma_deploy.tables import console, table_of


def passages(engine: Engine, text: Path | None, count: int, length: int) -> list[list[int]]:
    """`count` passages of `length` tokens, BOS included, evenly spread."""
    whole, _ = read_text(text)
    step = len(whole) // count
    return [engine.tokenizer.encode(whole[i * step : i * step + 16 * length])[:length] for i in range(count)]


def spoken(engine: Engine, prompt: list[int], count: int, adapter: str | None = None) -> tuple[list[int], float, float]:
    """`count` greedy tokens behind a prompt, seconds until the first, and tokens a second after it."""
    session = engine.session(max_length=len(prompt) + count, endless=True)
    session.use(adapter)
    stats, moments = GenerationStats(), []
    started = time.perf_counter()
    for _ in session.reply(prompt, max_new_tokens=count, stats=stats):
        moments.append((len(stats.tokens), time.perf_counter()))
    first, last = moments[0], moments[-1]
    return stats.tokens, first[1] - started, (last[0] - first[0]) / (last[1] - first[1])


def speeds(ways: dict[str, tuple[Engine, str | None]], prompt: list[int], tokens: int, repeat: int) -> dict[str, Any]:
    """Every way in turns, `repeat` times, after one that does not count: medians."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for turn in range(repeat + 1):
        for name, (engine, adapter) in ways.items():
            _, first, rate = spoken(engine, prompt, tokens, adapter)
            found[name] += [(first, rate)] if turn else []
    return {
        name: {
            "first_token_s": statistics.median(first for first, _ in runs),
            "tok_s": statistics.median(rate for _, rate in runs),
            "tok_s_runs": [rate for _, rate in runs],
        }
        for name, runs in found.items()
    }


def changes(engine: Engine, names: list[str | None], prompt: list[int], repeat: int) -> dict[str, float]:
    """Seconds of a change: a session alone, and until the prompt it holds was read again with the other adapter."""
    session = engine.session()
    session.use(names[0])
    session.read(prompt)
    alone, again = [], []
    for turn in range(2 * repeat):
        started = time.perf_counter()
        session.use(names[(turn + 1) % len(names)])
        alone.append(time.perf_counter() - started)
        session.read(prompt[-1:])
        again.append(time.perf_counter() - started)
    return {"change_s": statistics.median(alone), "change_and_read_again_s": statistics.median(again)}


def agreement(merged: Engine, beside: Engine, adapter: str, prompts: list[list[int]], count: int) -> dict[str, Any]:
    """How often both choose the same token behind the same ones."""
    made = [spoken(merged, prompt, count)[0] for prompt in prompts]
    free = [spoken(beside, prompt, count, adapter)[0] for prompt in prompts]
    sources = merged.source("shipped"), beside.source("shipped", adapter)
    same, total, listed = 0, 0, []
    for number, (prompt, tokens) in enumerate(zip(prompts, made, strict=True)):
        case = Case("text", (tuple(prompt),), (tuple(tokens[:-1]),))
        rows = [source.run([case])[0][0][len(prompt) - 1 :] for source in sources]
        reference, tested = (source.head(row) for source, row in zip(sources, rows, strict=True))
        for at, (one, other) in enumerate(zip(reference, tested, strict=True)):
            total += 1
            choice, chosen = int(one.argmax()), int(other.argmax())
            same += choice == chosen
            if choice != chosen:
                margin = float(one[choice] - np.partition(one, -2)[-2])
                off = float(np.abs(one - other).max())
                listed.append({"prompt": number, "token": at, "margin": margin, "near_tie": margin < off})
    return {
        "prompts": len(prompts),
        "decoded_tokens_each": count,
        "agreement": same / total,
        "whole_texts_equal": sum(one == other for one, other in zip(made, free, strict=True)),
        "near_ties": sum(one["near_tie"] for one in listed),
        "listed": listed,
    }


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--plain", type=Path)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--other", type=Path, help="another adapter to change to; without it, to none and back")
    parser.add_argument("--merged", type=Path)
    parser.add_argument("--text", type=Path, help="of the passages; the bundled C4 sample by default")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    beside = open_engine(arguments.artifact, threads=arguments.threads)
    started = time.perf_counter()
    name = beside.load_adapter(arguments.adapter)
    converted = time.perf_counter() - started
    prompts = passages(beside, arguments.text, arguments.prompts, arguments.prompt_tokens)
    ways: dict[str, tuple[Engine, str | None]] = {"no adapter": (beside, None), f"adapter {name}": (beside, name)}
    if arguments.plain:
        ways = {"without the section": (open_engine(arguments.plain, threads=arguments.threads), None)} | ways
    result: dict[str, Any] = {"speeds": speeds(ways, prompts[0], arguments.tokens, arguments.repeat)}
    names: list[str | None] = [name, beside.load_adapter(arguments.other) if arguments.other else None]
    result |= {"load_adapter_s": converted, **changes(beside, names, prompts[0], arguments.repeat)}
    if arguments.merged:
        merged = open_engine(arguments.merged, threads=arguments.threads)
        result["merged"] = agreement(merged, beside, name, prompts, arguments.tokens)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))
    rows = [
        [way, f"{one['tok_s']:.1f}", f"{1000 * one['first_token_s']:.0f} ms"] for way, one in result["speeds"].items()
    ]
    console().print(table_of(("artifact", "tokens/s", "first token"), rows))
    print(json.dumps({key: value for key, value in result.items() if key != "speeds"}, indent=1))


if __name__ == "__main__":
    main()
