"""What a Ray cluster costs `serve`: time and processor time of a token, memory, and how soon a killed actor is back.

    python benchmarks/cluster.py ARTIFACT --tokens 200
    python benchmarks/cluster.py ARTIFACT --tokens 200 --cluster HOST:PORT [--replicas 2] [--kill]

The cluster's nodes have to be on this machine: actors are found among its processes. Streams of one request at a time,
with one thread a replica; processor time is that of the server and of the actors, which other work on the machine does
not change much. `--kill` ends the first actor and tells when all are there again.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import time

import httpx2
import psutil

ACTORS = ("ray::Replica", "ray::StageActor")
BODY = {"prompt": [2, 50, 60, 70], "temperature": 0, "ignore_eos": True}


def processor_seconds(processes: list[psutil.Process]) -> float:
    """Of all of them, so far."""
    return sum(sum(one.cpu_times()[:2]) for one in processes)


def stream(url: str, tokens: int) -> list[float]:
    """Seconds from token to token, the first of them from the request."""
    found, last = [], time.perf_counter()
    body = {**BODY, "max_tokens": tokens, "stream": True}
    with httpx2.stream("POST", f"{url}/v1/completions", json=body, timeout=600) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                now = time.perf_counter()
                found.append(now - last)
                last = now
    return found


def seconds_to_come_back(url: str, actor: psutil.Process) -> float:
    """From the end of an actor to when all are there again."""
    actor.kill()
    started = time.perf_counter()
    seen = False
    while True:
        lines = httpx2.get(f"{url}/metrics", timeout=60).text.splitlines()
        gone = [line for line in lines if line.startswith("gemma_deploy_actor_up") and line.endswith(" 0")]
        if seen and not gone:
            return time.perf_counter() - started
        seen = seen or bool(gone)
        time.sleep(0.02)


def main() -> None:
    """Measure, and print a line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact")
    parser.add_argument("--cluster")
    parser.add_argument("--replicas", default="1")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--kill", action="store_true")
    given = parser.parse_args()
    words = ["--cluster", given.cluster, *(["--replicas", given.replicas] if given.replicas != "1" else [])]
    command = [sys.executable, "-m", "gemma_deploy.cli", "serve", given.artifact, "--threads", "1", "--port", "0"]
    server = subprocess.Popen(command + (words if given.cluster else []), stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        found = re.search(r"at (http://\S+)/v1", server.stdout.readline())
        assert found is not None
        url, front = found[1], psutil.Process(server.pid)
        actors = [one for one in psutil.process_iter() if one.name().startswith(ACTORS)]
        stream(url, given.tokens)
        before = processor_seconds([front]), processor_seconds(actors)
        gaps = [stream(url, given.tokens) for _ in range(4)]
        tokens = sum(map(len, gaps))
        for name, after, start in zip(
            ("server", "actors"), (processor_seconds([front]), processor_seconds(actors)), before, strict=True
        ):
            print(f"{name}: {1e3 * (after - start) / tokens:.2f} ms of a processor a token")
        print(f"token to token: {1e3 * statistics.median(gap for one in gaps for gap in one[1:]):.2f} ms, the median")
        print(f"first token: {1e3 * statistics.median(one[0] for one in gaps):.1f} ms, the median")
        for one in (front, *actors):
            print(f"{one.name()}: {one.memory_info().rss >> 20} MiB resident")
        if given.kill and actors:
            print(f"killed, and all there again: {seconds_to_come_back(url, actors[0]):.2f} s")
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
