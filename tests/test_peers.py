"""The arithmetic of `benchmarks/peers.py`: what is timed, what a failure leaves in the table, medians of neighbours."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
TEXT = {"bos": 2, "ids": list(range(3, 3000))}


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.syspath_prepend(BENCHMARKS / "peer_runtimes")


class Counting:
    """An engine that answers with the next id; its logits are those of `table` at the token."""

    def __init__(self, table=None):
        self.prompts, self.table = [], table

    def generate(self, prompt, steps):
        from protocol import Generated

        self.prompts.append(tuple(prompt))
        return Generated(2.0, list(range(steps + 1)), 4.0)

    def logits(self, window):
        return self.table[np.array(window)]


def test_speed_reads_other_text_every_time():
    from protocol import Sizes, speed

    engine = Counting()
    found = speed(engine, TEXT, 3, Sizes(2))
    assert found["prefill_tok_s"] == 512 / 2
    assert found["decode_tok_s"] == 64 / 4
    assert found["ttft_s"] > 0
    assert found["peak_rss_bytes"] > 1 << 20
    assert len(set(engine.prompts)) == len(engine.prompts) == 8
    assert {len(prompt) for prompt in engine.prompts} == {512, 128}
    assert {prompt[0] for prompt in engine.prompts} == {2}


def test_speed_of_other_lengths_and_of_several_texts_at_once():
    from protocol import Sizes, speed

    class Several(Counting):
        def together(self, prompts, steps):
            self.texts = prompts
            return 8.0

    sizes = Sizes(2, 700, 40, 4)
    engine = Several()
    found = speed(engine, TEXT, 2, sizes)
    assert {len(prompt) for prompt in engine.prompts} == {700, 40}
    assert found["prefill_tok_s"] == 700 / 2
    assert found["decode_tok_s"] == 4 * 64 / 8
    assert [len(text) for text in engine.texts] == [40] * 4
    assert len(set(map(tuple, engine.texts))) == 4
    assert Sizes(2).room == Sizes(2, 700, 40).room == 1024
    assert Sizes(2, 512, 8192).room == 8192 + 128
    with pytest.raises(RuntimeError, match="Counting decodes one text at a time"):
        speed(Counting(), TEXT, 2, sizes)


def test_a_short_text_is_refused():
    from protocol import piece

    with pytest.raises(ValueError, match="the text has 600 tokens, fewer than 1151"):
        piece({"bos": 2, "ids": list(range(600))}, 640, 512)


def test_quality_of_the_reference_itself_and_of_another():
    from protocol import quality, windows

    generator = np.random.default_rng(0)
    text = {"bos": 2, "ids": generator.integers(0, 50, 1100).tolist()}
    texts = windows(text)
    assert [len(window) for window in texts] == [512, 512]
    table = generator.normal(size=(50, 50)).astype(np.float32) * 3
    exact = table - np.log(np.exp(table).sum(-1, keepdims=True))
    reference = np.stack([exact[np.array(window[:-1])] for window in texts])
    same = quality(Counting(table + 5), texts, reference, 1)
    assert same["mean_kl"] == pytest.approx(0, abs=1e-6)
    assert same["top1"] == 1
    assert same["perplexity"] == pytest.approx(same["perplexity_reference"], rel=1e-5)
    assert same["scored_tokens"] == 2 * 511
    other = quality(Counting(table * 0.5), texts, reference, 1)
    assert other["mean_kl"] > 0.1
    assert other["top1"] == 1


def test_a_process_says_its_last_line_or_its_peak(tmp_path):
    from peer_runtimes.processes import PeerError, json_of, run

    held = "import json; held = bytearray(64 << 20); print('other'); print(json.dumps({'load_s': 1}))"
    ran = run([sys.executable, "-c", held], tmp_path / "a.log")
    assert json_of(ran) == {"load_s": 1}
    assert ran.peak_rss_bytes > 64 << 20
    with pytest.raises(PeerError, match=r"^KeyError: 'rope_type'$"):
        run([sys.executable, "-c", "raise KeyError('rope_type')"], tmp_path / "b.log")
    with pytest.raises(PeerError, match=r"^killed by SIGKILL: without a word$"):
        run([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], tmp_path / "c.log")
    with pytest.raises(PeerError, match="No such file"):
        run([str(tmp_path / "nothing")], tmp_path / "d.log")
    with pytest.raises(PeerError, match="no JSON came: words"):
        json_of(run([sys.executable, "-c", "print('words')"], tmp_path / "e.log"))


def record(decode: float) -> dict[str, float]:
    """A run of which only decode differs."""
    return {"load_s": 1, "ttft_s": 2, "prefill_tok_s": 100, "decode_tok_s": decode, "peak_rss_bytes": 1 << 30}


def test_ratios_are_of_neighbours_and_a_problem_has_its_cell():
    from peer_runtimes.tables import HEADER, markdown, summary

    runs = [
        {"round": n, "beside": "genai int8", "results": {"gemma-deploy": record(ours), "genai int8": record(peer)}}
        for n, (ours, peer) in enumerate([(60, 50), (30, 25), (66, 60)])
    ]
    runs.append({"round": 0, "beside": "optimum int8", "results": {"optimum int8": {"problem": "a | b"}}})
    quality = {"genai int8": {"perplexity": 20.5, "perplexity_reference": 20.4, "mean_kl": 0.001, "top1": 0.97}}
    conversions = {"OpenVINO int8": {"problem": "not installed: no room"}}
    values = {"conversions": conversions, "runs": runs, "quality": quality}
    rows = summary(json.loads(json.dumps(values)), ["genai int8", "OpenVINO int8", "optimum int8"])
    assert list(rows) == ["gemma-deploy", "genai int8", "OpenVINO int8", "optimum int8"]
    assert rows["genai int8"]["ours_over_it"]["decode_tok_s"] == pytest.approx(1.2)
    assert rows["gemma-deploy"]["run"]["decode_tok_s"] == 60
    lines = markdown(rows, "head").splitlines()
    assert {line.count("|") for line in lines[2:]} == {len(HEADER) + 1}
    assert "1.00, 1.20, 1.00" in lines[5]
    assert "not installed: no room" in lines[6]
    assert "a / b" in lines[7]


def test_every_variant_has_an_environment_and_a_runner():
    from peer_runtimes.servers import SERVERS
    from peer_runtimes.variants import ENVIRONMENTS, HERE, VARIANTS

    others = {server.environment for server in SERVERS.values()} - {""} | {"lmeval", "evalscope"}
    assert {variant.environment for variant in VARIANTS.values()} | others == set(ENVIRONMENTS)
    assert all((HERE / variant.runner).exists() for variant in VARIANTS.values())


def test_an_edit_must_fit(tmp_path):
    from peer_runtimes.environments import edit
    from peer_runtimes.processes import PeerError

    file = tmp_path / "a.cpp"
    file.write_text("one two")
    edit(file, "two", "three two")
    assert file.read_text() == "one three two"
    with pytest.raises(PeerError, match=r"a\.cpp has 0 times what is to be replaced, 1 expected"):
        edit(file, "four", "five")
