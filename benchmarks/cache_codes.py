"""What an int8 cache costs and saves in ONNX Runtime, beside a float32 one in the same graph.

usage: cache_codes.py ARTIFACT [--tokens 2048] [--threads 2] [--floats]

ARTIFACT has `+kv8` and `backend.type: onnxruntime`, and a context of so many tokens and 32 more. `--floats` lets its
caches hold the keys and values themselves. One line: tokens a second of a prompt in pieces of 512 and of 32 single ones
behind it (median), bytes of the caches, and how much the process grew beside the open session.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
from onnxruntime import OrtValue

from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.backends.onnxruntime.cache_codes import float_caches
from gemma_deploy.backends.onnxruntime.options import GRAPH
from gemma_deploy.backends.onnxruntime.window import empty_caches, windows_of
from gemma_deploy.machine import rss_bytes
from gemma_deploy.names import MIB
from gemma_deploy.runtime.session import load_file, open_graph

TOGETHER, STEPS = 512, 32


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--floats", action="store_true")
    args = parser.parse_args()
    artifact = Artifact.open(args.artifact).path.resolve()
    model = load_file(artifact / GRAPH)
    if args.floats:
        float_caches(model)
    windows = windows_of(model.graph)
    session = open_graph(model, artifact, threads=args.threads, lean=True)
    before = rss_bytes()
    empty = empty_caches(session, windows, args.tokens + STEPS)
    caches = {name: OrtValue.ortvalue_from_numpy(array) for name, array in empty.items()}
    ids = np.random.default_rng(1).integers(3, 200000, args.tokens + STEPS)

    def feed(at: int, end: int) -> float:
        binding, started = session.io_binding(), time.perf_counter()
        binding.bind_cpu_input("input_ids", ids[None, at:end].astype(np.int64))
        binding.bind_cpu_input("attention_mask", np.ones((1, end), np.int64))
        binding.bind_output("logits", "cpu")
        for name, cache in caches.items():
            binding.bind_ortvalue_input(name, cache)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), cache)
        session.run_with_iobinding(binding)
        return time.perf_counter() - started

    prompt = sum(feed(at, min(args.tokens, at + TOGETHER)) for at in range(0, args.tokens, TOGETHER))
    steps = [feed(args.tokens + step, args.tokens + step + 1) for step in range(STEPS)]
    found = {
        "cache": "float32" if args.floats else "int8",
        "tokens": args.tokens,
        "prefill_tokens_per_s": round(args.tokens / prompt),
        "decode_tokens_per_s": round(1 / statistics.median(steps), 1),
        "cache_mib": round(sum(array.nbytes for array in empty.values()) / MIB, 1),
        "grew_mib": round((rss_bytes() - before) / MIB),
    }
    print("RESULT " + json.dumps(found))


if __name__ == "__main__":
    main()
