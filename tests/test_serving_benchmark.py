"""`benchmarks/serving.py`: processes that are measured in turns, and the ratios that follow."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from gemma_deploy.bench.requests import Load

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
LOOP = """
import json, os, sys, time
print("a warning that is no JSON")
print(json.dumps({"ready": True}), flush=True)
beat = open(sys.argv[1], "w")
if os.fork() == 0:
    for _ in range(3000):
        beat.write("x"); beat.flush(); time.sleep(0.01)
    os._exit(0)
for line in sys.stdin:
    load = json.loads(line)
    if load["output_tokens"] == 13:
        sys.exit("RuntimeError: unlucky")
    made = load["output_tokens"] - (load["output_tokens"] == 7)
    one = {"sent": 1.0, "pieces": [1.5 + n / 10 for n in range(made)], "tokens": made, "ended": 1.5 + made / 10}
    print(json.dumps([one] * load["requests"]), flush=True)
"""


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)


@pytest.fixture
def loop(tmp_path):
    from peer_runtimes.serving import Running

    (tmp_path / "loop.py").write_text(LOOP)
    command = [sys.executable, str(tmp_path / "loop.py"), str(tmp_path / "beat")]
    running = Running(command, {}, log=tmp_path / "log")
    yield running
    running.stop()


def beats_in(file: Path) -> int:
    """Characters that a process writes in a fifth of a second."""
    before = file.stat().st_size
    time.sleep(0.2)
    return file.stat().st_size - before


def test_a_loop_is_asked_and_all_that_it_started_rests_between(loop, tmp_path):
    from peer_runtimes.processes import PeerError

    loop.ready()
    (found,) = loop.measure([Load(5, 10, 2, 4)], seed=0)
    assert (found["requests"], found["failed"], found["output_tok_s"]) == (4, 0, pytest.approx(40 / 1.5))
    assert found["ttft_ms"]["p95"] == pytest.approx(500)
    loop.sleep()
    time.sleep(0.05)
    assert beats_in(tmp_path / "beat") == 0
    with loop.awake():
        assert beats_in(tmp_path / "beat") > 0
        with pytest.raises(PeerError, match="6 tokens instead of 7"):
            loop.measure([Load(5, 7, 1, 1)], seed=0)
        with pytest.raises(PeerError, match="unlucky"):
            loop.measure([Load(5, 13, 1, 1)], seed=0)
    loop.stop()
    assert beats_in(tmp_path / "beat") == 0


def test_ratios_are_medians_of_rounds():
    from serving import row

    def one(number, server, rate, ttft):
        return {
            "round": number, "server": server, "concurrency": 8, "output_tok_s": rate, "ttft_ms": {"p95": ttft},
            "tpot_ms": {"median": 1.0}, "seconds": 100 / rate, "output_tokens_made": 100,
        }  # fmt: skip

    runs = [one(0, "gemma-deploy", 100.0, 10.0), one(1, "gemma-deploy", 30.0, 30.0), one(2, "gemma-deploy", 90.0, 9.0)]
    runs += [one(0, "peer", 50.0, 40.0), one(1, "peer", 10.0, 90.0), one(2, "peer", 60.0, 10.0)]
    found = row(runs, "peer")["8"]
    assert (found["output_tok_s"], found["ttft_p95_ms"], found["rounds"]) == (50.0, 40.0, 3)
    assert found["ours_over_it"] == 2.0  # of 2, 3 and 1.5
    assert found["ttft_p95_ours_over_it"] == pytest.approx(1 / 3)  # of 1/4, 1/3 and 9/10
    assert found["ours_more_ms_a_token"] == pytest.approx(1000 * (1 / 100 - 1 / 50))  # of -10, -66.7 and -5.6


def test_runs_of_a_harness_are_compared_by_question():
    from harnesses import compared

    ours = {"seconds": 10.0, "evaluation_s": 4.0, "scores": {"acc": 0.5}, "samples": [[-1.0, -2.0], [-5.0, -3.0]]}
    other = {"seconds": 40.0, "evaluation_s": 10.0, "scores": {"acc": 1.0}, "samples": [[-1.5, -2.0], [-3.0, -4.0]]}
    found = compared(ours, other)
    assert (found["seconds"], found["evaluation_s"], found["accuracy"]) == (0.25, 0.4, [0.5, 1.0])
    assert found["same_choice"] == 0.5
    assert found["log_likelihoods_apart"] == {"mean": pytest.approx(3.5 / 4), "largest": 2.0}


def test_questions_of_a_harness_are_those_of_eval(tmp_path):
    from harnesses import questions

    from gemma_deploy.calibration.sources import SOURCES
    from gemma_deploy.evaluation import ceval
    from gemma_deploy.evaluation.prompts import prompt

    sample = SOURCES["ceval"].sample
    found = questions(sample, 3)
    subjects = ceval.read(sample, "val", 5, subjects=(), limit=None)
    assert len(found) == 3
    every = {prompt(name, examples, row) for name, (examples, rows) in subjects.items() for row in rows}
    assert {one["prompt"] for one in found} <= every
    assert len({one["prompt"] for one in found}) == 3
    with pytest.raises(SystemExit, match="were asked for"):
        questions(sample, 100_000)
