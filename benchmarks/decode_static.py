"""Speed of a static artifact on ONNX Runtime (fast session), beside what this machine's memory can deliver.

usage: decode_static.py ARTIFACT [--threads 2] [--steps 64] [--mode fast|strict]

A decode step reads every weight once (of the token table only as LM head, of the rotary tables a row) and, the graph
being static, all C slots of the cache. Bytes per token x tokens per second / memory read bandwidth is the share that is
used. Bandwidth is the best of torch sums over 1 GiB in a process of its own, before and after. Times are medians.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from gemma_deploy.artifact import Artifact
from gemma_deploy.runtime import StaticRunner

BANDWIDTH = """
import sys, time, torch
torch.set_num_threads(int(sys.argv[1]))
x = torch.ones(1 << 28)
def once():
    started = time.perf_counter(); x.sum(); return x.numel() * 4 / (time.perf_counter() - started)
print(max(once() for _ in range(12)))
"""


def bandwidth(threads: int) -> float:
    """Bytes per second that a sum over 1 GiB reads."""
    command = [sys.executable, "-c", BANDWIDTH, str(threads)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def weight_bytes(artifact: Artifact) -> int:
    """Bytes of parameters that a decode step has to read."""
    tied = artifact.manifest["model"]["tie_word_embeddings"]
    skipped = ("model.rotary_emb.",) if tied else ("model.rotary_emb.", "model.embed_tokens.")
    return sum(row.nbytes for row in artifact.params.rows if not row.name.startswith(skipped))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--mode", choices=["fast", "strict"], default="fast")
    args = parser.parse_args()
    artifact = Artifact.open(args.artifact)
    before = bandwidth(args.threads)
    runner = StaticRunner(args.artifact, args.mode, args.threads, manifest=artifact.manifest)
    rng = np.random.default_rng(0)
    prompts = rng.integers(3, runner.contract.vocab_size, (runner.batch, runner.prefill_length)).tolist()
    runner.prefill(prompts)
    prefills = []
    for _ in range(3):
        started = time.perf_counter()
        logits = runner.prefill(prompts)
        prefills.append(time.perf_counter() - started)
    logits = runner.step(logits.argmax(-1).tolist())
    load = os.getloadavg()[0]
    steps = []
    for _ in range(min(args.steps, runner.remaining)):
        tokens = logits.argmax(-1).tolist()
        started = time.perf_counter()
        logits = runner.step(tokens)
        steps.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    limit = max(before, bandwidth(args.threads))
    step, prefill = statistics.median(steps), statistics.median(prefills)
    read = weight_bytes(artifact) + runner.contract.cache_bytes
    tokens_read = runner.batch * runner.prefill_length
    result = {
        "artifact": artifact.manifest["name"],
        "P": runner.prefill_length,
        "C": runner.context_length,
        "threads": args.threads,
        "mode": args.mode,
        "load_average": load,
        "load_s": runner.load_seconds,
        "prefill_tokens_per_s": tokens_read / prefill,
        "decode_tokens_per_s": runner.batch / step,
        "decode_best_ms": min(steps) * 1e3,
        "decode_median_ms": step * 1e3,
        "peak_rss_mib": peak / 2**20,
        "weights_mb_per_token": weight_bytes(artifact) / 1e6,
        "cache_mb_per_token": runner.contract.cache_bytes / 1e6,
        "memory_gb_per_s": limit / 1e9,
        "share": read / step / limit,
    }
    rounded = {key: round(value, 3) if isinstance(value, float) else value for key, value in result.items()}
    print(" | ".join(f"{key} {value}" for key, value in rounded.items()))
    print("RESULT " + json.dumps(rounded))


if __name__ == "__main__":
    main()
