"""Runs the processes of a benchmark and puts their figures together."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gemma_deploy import child
from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.bench.memory import artifact_bytes, bandwidth_bytes_s, weight_bytes
from gemma_deploy.bench.process import BenchJob, arguments
from gemma_deploy.engine import Engine, Limits
from gemma_deploy.errors import DeployError, UsageError
from gemma_deploy.machine import usable_cpus

DECODE_AFTER = 128  # tokens of context at which decode_tok_s is measured
LIBRARIES = ("gemma-deploy", "onnxruntime", "onnxruntime-genai")


def lengths_that_fit(engine: Engine, lengths: Sequence[int]) -> list[int]:
    """Prompts that an artifact takes, of these lengths; static graphs take one, which is measured anyway.

    A prompt as long as the whole context leaves out its last token: the answer needs a place.
    """
    room = engine.limits
    most = room.context if room.prompt == room.context - 1 else room.prompt
    return [] if room.fixed else sorted({min(length, room.prompt) for length in lengths if length <= most})


def measure(
    engine: Engine,
    *,
    prompt_tokens: int = 512,
    decode_tokens: int = 64,
    repeat: int = 5,
    threads: int = 0,
    contexts: Sequence[int] = (),
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """All figures of an artifact, medians of `repeat`; each process opens it anew.

    With static graphs every prompt is P tokens long, and decoding is measured after it.

    Args:
        prompt_tokens: of the prompt whose prefill and first token are timed.
        decode_tokens: steps that are timed.
        threads: of one operator; 0 for as many as there are cores.
        contexts: prompt lengths to measure both at; those that do not fit are left out, and named in `left_out`.
        say: told what begins.

    Raises:
        UsageError: the artifact has no room for the prompt or the steps, or what computes it is not installed.
        DeployError: a process failed.
    """
    artifact, room = engine.artifact, engine.limits
    engine.check_runtime()
    if room.fixed:
        prompt_tokens = after = room.prompt
        decode_tokens = min(decode_tokens, room.context - room.prompt)
    else:
        _refuse_too_long(artifact, room, prompt_tokens, decode_tokens)
        after = min(DECODE_AFTER, room.prompt, room.context - decode_tokens - 1)
    wanted = lengths_that_fit(engine, contexts)

    def job(kind: str, lengths: Sequence[int], steps: int, times: int = 1) -> dict[str, Any]:
        return _apart(BenchJob(kind, str(artifact.path), threads, list(lengths), steps, times))

    load_average = os.getloadavg()[0]
    say("memory bandwidth")
    bandwidth = bandwidth_bytes_s(threads or usable_cpus())
    say(f"load and first token of a cold process, {repeat} times")
    cold = [job("cold", [prompt_tokens], decode_tokens) for _ in range(repeat)]
    say(f"prefill of {prompt_tokens} tokens, and {decode_tokens} steps after {after}")
    prefill = job("warm", [prompt_tokens], 0, repeat)["points"][0]["prefill_tok_s"]
    decode = job("warm", [after], decode_tokens, repeat)["points"][0]["decode_tok_s"]
    points = []
    for length in wanted:
        steps = min(decode_tokens, room.context - length - 1)
        say(f"context of {length} tokens")
        point = job("warm", [length], steps, repeat)["points"][0]
        speeds = {key: _median(point[key]) for key in ("prefill_tok_s", "decode_tok_s")}
        points.append({"tokens": length, "decode_steps": steps, **speeds})
    bandwidth = max(bandwidth, bandwidth_bytes_s(threads or usable_cpus()))
    read, speed = weight_bytes(artifact, room.rows) + room.cache_bytes, _median(decode)
    return {
        "artifact": artifact.manifest.name,
        "runtime": engine.runtime,
        "level": engine.level,
        "prompt_tokens": prompt_tokens,
        "decode_after_tokens": after,
        "decode_tokens": decode_tokens,
        "repeat": repeat,
        "threads": threads or usable_cpus(),
        "all_cores": threads == 0,
        **{key: _median([one[key] for one in cold]) for key in ("load_s", "tokenizer_s", "ttft_s")},
        "peak_rss_bytes": max(one["peak_rss_bytes"] for one in cold),
        "prefill_tok_s": _median(prefill),
        "decode_tok_s": speed,
        "artifact_bytes": artifact_bytes(artifact),
        "weight_bytes": sum(row.nbytes for row in artifact.manifest.table.rows),
        "bytes_per_token": read,
        "bandwidth_bytes_s": bandwidth,
        "share_of_bandwidth": None if speed is None else read * speed / room.rows / bandwidth,
        "contexts": points,
        "left_out": sorted({length for length in contexts if not lengths_that_fit(engine, [length])}),
        "context_length": room.context,
        "prompt_limit": room.prompt,
        "samples": {"prefill_tok_s": prefill, "decode_tok_s": decode, "cold": cold},
        "machine": {"processor": processor(), "cpus": os.cpu_count(), "load_average_before": load_average},
        "versions": {name: _version(name) for name in LIBRARIES},
    }


def _refuse_too_long(artifact: Artifact, room: Limits, prompt_tokens: int, decode_tokens: int) -> None:
    if prompt_tokens > room.prompt or prompt_tokens + 1 + decode_tokens > room.context:
        raise UsageError(
            f"{prompt_tokens} prompt tokens and {decode_tokens} steps do not fit",
            where=str(artifact.path),
            expected=f"prompts of {room.prompt} tokens at most, and {room.context - 1} tokens with the steps",
            next_step="give a smaller --prompt-tokens or --decode-tokens",
        )


def _apart(job: BenchJob) -> dict[str, Any]:
    """Do a job in a process of its own."""
    done = child.run(*arguments(job), capture_output=True, text=True)
    if done.returncode:
        raise DeployError(
            f"a measuring process ended with exit code {done.returncode}",
            where=job.artifact,
            problems=done.stderr.strip().splitlines()[-3:],
            next_step="see whether `gemma-deploy run` works on the artifact",
        )
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def processor() -> str:
    """What this machine's processor calls itself, "" where it does not say."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
