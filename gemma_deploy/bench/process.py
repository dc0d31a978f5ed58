"""What a process of a benchmark does; `python -m gemma_deploy.bench.process JOB` prints its figures as JSON.

Imports no more than a program that runs the artifact would: the cold job's clock starts with the process.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gemma_deploy.engine import open_engine
from gemma_deploy.errors import DeployError
from gemma_deploy.machine import peak_rss_bytes
from gemma_deploy.runtime.generate import GenerationStats


@dataclass(frozen=True)
class BenchJob:
    """One process's work.

    Args:
        kind: cold: load, first token, memory; warm: speed after prompts of `lengths`, `repeat` times each.
        lengths: of prompts, in tokens; of a cold job one.
        decode_tokens: steps after each prompt; 0 for none.
    """

    kind: str
    artifact: str
    threads: int
    lengths: list[int]
    decode_tokens: int
    repeat: int = 1


class Subject:
    """What is measured, and its tokenizer.

    Attributes:
        tokenizer_seconds: what opening the tokenizer took.
    """

    def __init__(self, artifact: str, threads: int) -> None:
        self.engine = open_engine(artifact, threads=threads)
        self.rows = self.engine.limits.rows
        started = time.perf_counter()
        _ = self.engine.tokenizer
        self.tokenizer_seconds = time.perf_counter() - started

    def say(self, ids: list[int], tokens: int) -> GenerationStats:
        """Generate so many tokens, in every row of the batch; a stop token does not end it."""
        stats = GenerationStats()
        session = self.engine.session(max_length=len(ids) + tokens, endless=True)
        for _ in session.reply(ids, max_new_tokens=tokens, stats=stats):
            pass
        return stats


def run(job: BenchJob, started: float) -> dict[str, Any]:
    """The figures of a job.

    Args:
        started: of the process, by `time.monotonic`.
    """
    subject = Subject(job.artifact, job.threads)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, subject.engine.vocab_size, length).tolist() for length in job.lengths]
    if job.kind == "cold":
        subject.say(prompts[0], 1)
        ttft = time.monotonic() - started
        subject.say(prompts[0], 1 + job.decode_tokens)
        return {
            "ttft_s": ttft,
            "load_s": subject.engine.load_seconds,  # of the static pair: of both graphs, one after the first token
            "tokenizer_s": subject.tokenizer_seconds,
            "peak_rss_bytes": peak_rss_bytes() + subject.engine.apart_bytes,
        }
    points = []
    for prompt in prompts:
        subject.say(prompt, 1 + min(job.decode_tokens, 4))  # pages, pools and the processor's clock
        said = [subject.say(prompt, 1 + job.decode_tokens) for _ in range(job.repeat)]
        points.append(
            {
                "tokens": len(prompt),
                "prefill_tok_s": [subject.rows * len(prompt) / stats.prefill_seconds for stats in said],
                "decode_tok_s": [subject.rows * stats.tokens_per_second for stats in said if stats.decode_seconds],
            }
        )
    return {"points": points}


def arguments(job: BenchJob) -> list[str]:
    """What `gemma_deploy.child` starts a process of its own with."""
    return ["-m", "gemma_deploy.bench.process", json.dumps(asdict(job)), repr(time.monotonic())]


if __name__ == "__main__":
    try:
        print(json.dumps(run(BenchJob(**json.loads(sys.argv[1])), float(sys.argv[2]))))
    except DeployError as error:
        sys.exit(f"error: {error}")
