"""OpenVINO GenAI's continuous batching, which has no server of its own here: a loop over its library.

    python openvino_serve.py DIRECTORY --threads N

Prints a line of JSON when the model is open. For each line of JSON on standard input (input_tokens, output_tokens,
concurrency, requests, vocabulary, seed) it gives the pipeline so many requests of random ids at a time, the next when
one has ended, and prints all answers: when each was sent, when its pieces came, when it ended, its tokens, in seconds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai

BLOCKS_GIB = 1  # of keys and values


def opened(path: Path, threads: int, together: int) -> Any:
    """The pipeline, without taking beginnings over from earlier texts."""
    config = openvino_genai.SchedulerConfig()
    config.cache_size, config.max_num_seqs = BLOCKS_GIB, together
    config.dynamic_split_fuse, config.enable_prefix_caching = True, False
    return openvino_genai.ContinuousBatchingPipeline(str(path), config, "CPU", {"INFERENCE_NUM_THREADS": threads})


def answered(pipeline: Any, load: dict[str, int]) -> list[dict[str, Any]]:
    """Answers of a load."""
    random, settings = np.random.default_rng(load["seed"]), openvino_genai.GenerationConfig()
    settings.max_new_tokens = settings.min_new_tokens = load["output_tokens"]
    settings.ignore_eos, settings.do_sample = True, False
    waiting, answers = iter(range(load["requests"])), []
    running: list[tuple[Any, dict[str, Any]]] = []

    def begin() -> None:
        for number in waiting:
            ids = random.integers(1, load["vocabulary"], (1, load["input_tokens"]), dtype=np.int64)
            answer = {"sent": time.perf_counter(), "pieces": [], "tokens": 0}
            running.append((pipeline.add_request(number, openvino.Tensor(ids), settings), answer))
            return

    for _ in range(load["concurrency"]):
        begin()
    while running:
        pipeline.step()
        now = time.perf_counter()
        for pair in list(running):
            handle, answer = pair
            while handle.can_read():
                made = sum(len(one.generated_ids) for one in handle.read().values())
                answer["pieces"] += [now] * made
                answer["tokens"] += made
            if handle.get_status() != openvino_genai.GenerationStatus.RUNNING:
                answer["ended"] = now
                answers.append(answer)
                running.remove(pair)
                begin()
    return answers


def main() -> None:
    """Answer loads until standard input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--together", type=int, default=16)
    arguments = parser.parse_args()
    pipeline = opened(arguments.artifact, arguments.threads, arguments.together)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(answered(pipeline, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
