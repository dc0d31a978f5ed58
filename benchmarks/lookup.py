"""Decoding that looks ahead beside decoding a token a step, in one process, in turns.

    python benchmarks/lookup.py ARTIFACT [FILE ...] --tokens 128 --json result.json
    python benchmarks/lookup.py ARTIFACT --draft SMALLER_ARTIFACT

The text itself guesses what comes next (`run --lookup`), or a smaller model does (`run --draft`). Each FILE is a
prompt; without any, three are made of this repository's own files: prose that goes on, code that goes on, and a text
to be repeated. Both ways run on one model that is open; a difference of tokens is listed with how far the two
largest logits lay apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from gemma_deploy import paths
from gemma_deploy.engine import open_engine
from gemma_deploy.runtime import Sampling, Tokenizer
from gemma_deploy.runtime.draft import Draft
from gemma_deploy.runtime.lookup import History
from gemma_deploy.runtime.speculative import Decider, Guesser, Speculative, best_of

ROOT = Path(__file__).resolve().parent.parent


def own_prompts() -> dict[str, str]:
    """Name -> text."""
    prose = (paths.demo_checkpoint_dir() / "heldout.txt").read_text(encoding="utf-8")
    code = (ROOT / "gemma_deploy" / "backends" / "tvm_vacc" / "runner.py").read_text(encoding="utf-8")
    return {
        "prose": prose[5000:6200],
        "code": code[3000:4500],
        "repeat": f"{prose[:800]}\n\nThe same text again:\n{prose[:100]}",
    }


def plain(model: Decider, prompt: list[int], count: int) -> tuple[list[int], list[float], float]:
    """A token a step: tokens, by how much each was ahead of the next best, seconds after the first."""
    sequence, tokens, leads = model.sequence(len(prompt) + count), [], []
    rows, started = sequence.read(prompt, 2), 0.0
    while True:
        token, lead = best_of(rows[-1], model.path)
        tokens.append(token)
        leads.append(lead)
        if len(tokens) == 1:
            started = time.perf_counter()
        if len(tokens) == count:
            return tokens, leads, time.perf_counter() - started
        rows = sequence.feed(tokens[-1:], 2)


def ahead(model: Decider, prompt: list[int], count: int, draft: Decider | None) -> tuple[list[int], Speculative, float]:
    """Looking ahead: tokens, what the search did, seconds after the first."""
    room = len(prompt) + count
    guesser: Guesser = History(prompt, model.most_tokens)
    if draft is not None:
        guesser = Draft(
            draft,
            room,
            vocab_size=model.vocab_size,
            sampler=Sampling().sampler(),
            most_tokens=model.most_tokens,
        )
        guesser.follow(prompt)
    greedy = Speculative(model, prompt, room, guesser=guesser)
    tokens = [greedy.first()]
    started = time.perf_counter()
    while len(tokens) < count:
        tokens += greedy.next()
    return tokens, greedy, time.perf_counter() - started


def measure(model: Decider, prompt: list[int], count: int, *, repeat: int, draft: Decider | None) -> dict[str, Any]:
    """Both ways, in turns: medians."""
    runs = [(plain(model, prompt, count), ahead(model, prompt, count, draft)) for _ in range(repeat)]
    (tokens, leads, _), (found, greedy, _) = runs[0]
    first = next((at for at, (a, b) in enumerate(zip(tokens, found, strict=False)) if a != b), None)
    one, several = (statistics.median(run[way][2] for run in runs) for way in (0, 1))
    return {
        "prompt_tokens": len(prompt),
        "tokens": count,
        "tok_s": (count - 1) / one,
        "ahead_tok_s": (len(found) - 1) / several,
        "ratio": (len(found) - 1) / (count - 1) * one / several,
        "tokens_a_step": (len(found) - 1) / greedy.steps,
        "guessed": greedy.guessed,
        "right": greedy.right,
        "first_difference": None if first is None else {"at": first, "lead": leads[first]},
    }


def opened(artifact: Path, threads: int) -> Decider:
    """An artifact that may look ahead, in ONNX Runtime or in the native library."""
    return open_engine(artifact, threads=threads).decider()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("prompts", type=Path, nargs="*")
    parser.add_argument("--draft", type=Path, help="an artifact of a smaller model of the same vocabulary")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    texts = {file.name: file.read_text(encoding="utf-8") for file in arguments.prompts} or own_prompts()
    model = opened(arguments.artifact, arguments.threads)
    draft = None if arguments.draft is None else opened(arguments.draft, arguments.threads)
    tokenizer, results = Tokenizer(arguments.artifact), {}
    for name, text in texts.items():
        results[name] = one = measure(
            model, tokenizer.encode(text), arguments.tokens, repeat=arguments.repeat, draft=draft
        )
        print(
            f"{name}: {one['tok_s']:.1f} -> {one['ahead_tok_s']:.1f} tokens/s ({one['ratio']:.2f} x, "
            f"{one['tokens_a_step']:.2f} a step, {one['right']} of {one['guessed']} guesses right), "
            f"first difference: {one['first_difference'] or 'none'}",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
