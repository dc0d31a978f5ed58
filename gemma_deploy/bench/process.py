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

from gemma_deploy.backends.onnxruntime.genai import GenaiModel, GenaiSession
from gemma_deploy.backends.tvm_vacc.generate import stream
from gemma_deploy.backends.tvm_vacc.runner import StaticRunner
from gemma_deploy.errors import DeployError
from gemma_deploy.machine import peak_rss_bytes
from gemma_deploy.runtime.generate import GenerationStats
from gemma_deploy.text import Tokenizer


@dataclass(frozen=True)
class Job:
    """One process's work.

    Args:
        kind: cold: load, first token, memory; warm: speed after prompts of `lengths`, `repeat` times each.
        genai: whether onnxruntime-genai runs the artifact.
        lengths: of prompts, in tokens; of a cold job one.
        decode_tokens: steps after each prompt; 0 for none.
    """

    kind: str
    artifact: str
    genai: bool
    threads: int
    lengths: list[int]
    decode_tokens: int
    repeat: int = 1


class _Genai:
    def __init__(self, job: Job) -> None:
        self.model = GenaiModel(job.artifact, job.threads)
        started = time.perf_counter()
        self.tokenizer = Tokenizer(job.artifact)
        self.tokenizer_seconds = time.perf_counter() - started
        self.vocab_size, self.rows = self.model.vocab_size, 1

    @property
    def load_seconds(self) -> float:
        return self.model.load_seconds

    def say(self, ids: list[int], tokens: int) -> GenerationStats:
        """Generate so many tokens; a stop token does not end it."""
        stats, length = GenerationStats(), len(ids) + tokens
        session = GenaiSession(self.model, self.tokenizer, max_length=length, min_length=length)
        for _ in session.reply(ids, max_new_tokens=tokens, stats=stats):
            pass
        return stats


class _Static:
    def __init__(self, job: Job) -> None:
        self.runner = StaticRunner(job.artifact, "fast", job.threads)
        started = time.perf_counter()
        self.tokenizer = Tokenizer(job.artifact)
        self.tokenizer_seconds = time.perf_counter() - started
        self.vocab_size, self.rows = self.runner.contract.vocab_size, self.runner.batch

    @property
    def load_seconds(self) -> float:
        return self.runner.load_seconds

    def say(self, ids: list[int], tokens: int) -> GenerationStats:
        """The same in every row of the batch."""
        stats = GenerationStats()
        for _ in stream(self.runner, self.tokenizer, ids, max_new_tokens=tokens, stop_ids=(), stats=stats):
            pass
        return stats


def run(job: Job, started: float) -> dict[str, Any]:
    """The figures of a job.

    Args:
        started: of the process, by `time.monotonic`.
    """
    engine: _Genai | _Static = _Genai(job) if job.genai else _Static(job)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, engine.vocab_size, length).tolist() for length in job.lengths]
    if job.kind == "cold":
        engine.say(prompts[0], 1)
        ttft = time.monotonic() - started
        engine.say(prompts[0], 1 + job.decode_tokens)
        return {
            "ttft_s": ttft,
            "load_s": engine.load_seconds,  # of our runner: of both its graphs, one of them after the first token
            "tokenizer_s": engine.tokenizer_seconds,
            "peak_rss_bytes": peak_rss_bytes(),
        }
    points = []
    for prompt in prompts:
        engine.say(prompt, 1 + min(job.decode_tokens, 4))  # pages, pools and the processor's clock
        said = [engine.say(prompt, 1 + job.decode_tokens) for _ in range(job.repeat)]
        points.append(
            {
                "tokens": len(prompt),
                "prefill_tok_s": [engine.rows * len(prompt) / stats.prefill_seconds for stats in said],
                "decode_tok_s": [engine.rows * stats.tokens_per_second for stats in said if stats.decode_seconds],
            }
        )
    return {"points": points}


def arguments(job: Job) -> list[str]:
    """What `gemma_deploy.child` starts a process of its own with."""
    return ["-m", "gemma_deploy.bench.process", json.dumps(asdict(job)), repr(time.monotonic())]


if __name__ == "__main__":
    try:
        print(json.dumps(run(Job(**json.loads(sys.argv[1])), float(sys.argv[2]))))
    except DeployError as error:
        sys.exit(f"error: {error}")
