"""What every runtime is asked for in a process of its own, and the one JSON line that the process ends with.

    RUNNER ARTIFACT IDS.json --threads 2 --repeats 3
    RUNNER ARTIFACT IDS.json --threads 2 --quality REFERENCE.npy

The first form measures speed: load, the first token after a prompt of 512 seen from the start of the process, then,
warm, the prefill of 512 and 64 greedy steps after a prompt of 128, `--repeats` times, each time with other text so that
no cache of prefixes helps; `--prompt` and `--behind` are other lengths than 512 and 128, and `--together 8` decodes 8
texts at once where a runtime can. The second compares log-probabilities with those of `reference.py`. Imported by the
runners only; each runs in its peer's environment, where gemma-deploy is not installed.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

LONG, SHORT, STEPS, WINDOW = 512, 128, 64, 512
LEAST = 1024  # tokens of cache; onnxruntime-genai's Gemma 3 graphs refuse less than their window of 512
BLOCK = 64  # rows of logits compared at a time


@dataclass(frozen=True)
class Generated:
    """Greedy text: seconds to the first token, its ids, and seconds of the steps after the first."""

    first_s: float
    tokens: list[int]
    decode_s: float


@dataclass(frozen=True)
class Sizes:
    """What a runtime is opened for.

    Args:
        threads: it computes with; prompt: tokens of the long prompt; behind: of the short one; together: texts at once.
    """

    threads: int
    prompt: int = LONG
    behind: int = SHORT
    together: int = 1

    @property
    def room(self) -> int:
        """Tokens of cache that a text needs."""
        return max(LEAST, self.prompt, self.behind + 2 * STEPS)


class Engine(Protocol):
    """A loaded model; a runtime of several texts has `together(prompts, steps)` too: seconds of the steps."""

    def generate(self, prompt: list[int], steps: int) -> Generated:
        """One token after the prompt and `steps` more, end of text ignored, the cache empty before."""

    def logits(self, window: list[int]) -> np.ndarray:
        """Float [tokens, vocabulary] of a window, the cache empty before."""


def main(load: Callable[[Path, Sizes], Engine]) -> None:
    """Run what the command line asks for; `load` takes the artifact and sizes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("artifact", type=Path)
    parser.add_argument("ids", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=LONG)
    parser.add_argument("--behind", type=int, default=SHORT)
    parser.add_argument("--together", type=int, default=1)
    parser.add_argument("--quality", type=Path)
    arguments = parser.parse_args()
    text = json.loads(arguments.ids.read_text())
    started = time.perf_counter()
    sizes = Sizes(arguments.threads, arguments.prompt, arguments.behind, arguments.together)
    engine = load(arguments.artifact, sizes)
    load_s = time.perf_counter() - started
    if arguments.quality:
        result = quality(engine, windows(text), np.load(arguments.quality, mmap_mode="r"), arguments.threads)
    else:
        result = {"load_s": load_s, **speed(engine, text, arguments.repeats, sizes)}
    print(json.dumps(result), flush=True)


def speed(engine: Engine, text: dict[str, Any], repeats: int, sizes: Sizes) -> dict[str, Any]:
    """Seconds, rates and the memory at the end; the first token's seconds hold Python's start and all imports."""
    first = engine.generate(piece(text, 0, sizes.prompt), 0)
    ttft_s = seconds_since_start()
    step = sizes.prompt + sizes.behind
    engine.generate(piece(text, sizes.prompt, sizes.behind), 4)
    prefill, decode, tokens = [], [], first.tokens
    for start in range(step, (repeats + 1) * step, step):
        prefill.append(sizes.prompt / engine.generate(piece(text, start, sizes.prompt), 0).first_s)
        generated = engine.generate(piece(text, start + sizes.prompt, sizes.behind), STEPS)
        if len(generated.tokens) != STEPS + 1:
            raise RuntimeError(f"{len(generated.tokens)} tokens came, {STEPS + 1} were asked for")
        decode.append(STEPS / generated.decode_s)
        tokens = generated.tokens
    if sizes.together > 1:
        together = getattr(engine, "together", None)
        if together is None:
            raise RuntimeError(f"{type(engine).__name__} decodes one text at a time")
        texts = [piece(text, at * sizes.behind, sizes.behind) for at in range(sizes.together)]
        decode = [sizes.together * STEPS / together(texts, STEPS) for _ in range(repeats)]
    return {
        "ttft_s": ttft_s,
        "prefill_tok_s": float(np.median(prefill)),
        "decode_tok_s": float(np.median(decode)),
        "peak_rss_bytes": peak_rss_bytes(),
        "prefill_all": prefill,
        "decode_all": decode,
        "tokens": tokens[:16],
    }


def piece(text: dict[str, Any], start: int, length: int) -> list[int]:
    """BOS and `length` - 1 tokens of the text."""
    found = text["ids"][start : start + length - 1]
    if len(found) != length - 1:
        raise ValueError(f"the text has {len(text['ids'])} tokens, fewer than {start + length - 1}")
    return [text["bos"], *found]


def windows(text: dict[str, Any]) -> list[list[int]]:
    """All whole windows side by side, BOS in front of each."""
    step = WINDOW - 1
    return [[text["bos"], *text["ids"][at : at + step]] for at in range(0, len(text["ids"]) - step + 1, step)]


def quality(engine: Engine, texts: list[list[int]], reference: np.ndarray, threads: int) -> dict[str, Any]:
    """Perplexity, mean KL to the reference and top-1 agreement, over all tokens but BOS.

    Args:
        reference: float32 log-probabilities [windows, tokens - 1, vocabulary].
    """
    import torch

    torch.set_num_threads(threads)
    nll = exact_nll = divergence = 0.0
    same = count = 0
    for window, exact in zip(texts, reference, strict=False):
        logits, targets = engine.logits(window), torch.tensor(window[1:])
        if len(logits) != len(window):
            raise RuntimeError(f"logits of {len(logits)} positions came, {len(window)} were asked for")
        for at in range(0, len(targets), BLOCK):
            rows = slice(at, min(at + BLOCK, len(targets)))
            wanted = torch.from_numpy(np.array(exact[rows]))
            found = torch.from_numpy(np.array(logits[rows], dtype=np.float32)[:, : wanted.shape[1]]).log_softmax(-1)
            target = targets[rows, None]
            nll -= float(found.gather(1, target).double().sum())
            exact_nll -= float(wanted.gather(1, target).double().sum())
            divergence += float((wanted.exp() * (wanted - found)).sum(dtype=torch.float64))
            same += int((wanted.argmax(-1) == found.argmax(-1)).sum())
            count += len(target)
    return {
        "perplexity": float(np.exp(nll / count)),
        "perplexity_reference": float(np.exp(exact_nll / count)),
        "mean_kl": divergence / count,
        "top1": same / count,
        "scored_tokens": count,
    }


def seconds_since_start() -> float:
    """Of this process, to the clock tick (10 ms) that /proc counts in."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


def peak_rss_bytes() -> int:
    """VmHWM: mapped files count as far as they were touched."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
