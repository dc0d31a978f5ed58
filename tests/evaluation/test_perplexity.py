"""Perplexity, KL and top-1 of every form of artifact, against transformers and NumPy, past the sliding window."""

import json
import math

import numpy as np
import pytest

from gemma_deploy.errors import UsageError
from gemma_deploy.evaluation import models
from gemma_deploy.evaluation.models import Evaluated
from gemma_deploy.evaluation.perplexity import Perplexity, measure
from gemma_deploy.evaluation.texts import ScoredWindows, make_windows
from gemma_deploy.testing import write_tiny_checkpoint
from tests.evaluation.conftest import (
    BOS,
    SEQLEN,
    exact_figures,
    log_softmax,
    rounded,
    run,
    stock_model,
    tokens_of,
)
from tests.evaluation.make import write_tokenizer

COUNT = 5  # no multiple of the artifacts' batch of 2


def windows_of(checkpoint, text_file, count=COUNT, seqlen=SEQLEN):
    ids = tokens_of(checkpoint, text_file.read_text())
    return [(BOS, *ids[i * (seqlen - 1) : (i + 1) * (seqlen - 1)]) for i in range(count)]


def evaluated(capfd, tmp_path, *arguments):
    file = tmp_path / "result.json"
    code, out, err = run(capfd, "eval", *arguments, "--task", "ppl", "--json", file)
    assert code == 0, out + err
    return json.loads(file.read_text()), out


SMALL = ["--windows", COUNT, "--seqlen", SEQLEN]


@pytest.mark.parametrize(
    ("form", "change"),
    [("int8", rounded), ("dynamic", lambda name, weight: weight), ("divided", lambda name, weight: weight)],
)
def test_an_artifact_against_its_checkpoint(compiled, checkpoint, text_file, capfd, tmp_path, form, change):
    artifact = compiled(form)
    found, out = evaluated(capfd, tmp_path, artifact, "--text", text_file, "--no-record", *SMALL)
    expected = exact_figures(
        stock_model(checkpoint), stock_model(checkpoint, change), windows_of(checkpoint, text_file)
    )
    assert found["scored_tokens"] == expected["scored_tokens"] == COUNT * (SEQLEN - 1)
    # float32 against float64 sums: 2e-8 to 4e-7 measured.
    for key in ("perplexity", "perplexity_reference", "perplexity_error"):
        assert found[key] == pytest.approx(expected[key], rel=4e-6), key
    assert found["top1"] == expected["top1"]
    if form == "int8":  # 1e-6 of the KL measured
        assert expected["kl_mean"] > 1e-4
        assert found["kl_mean"] == pytest.approx(expected["kl_mean"], rel=1e-4)
        assert abs(found["perplexity"] / found["perplexity_reference"] - 1) > 1e-4
        assert found["perplexity_change"] == pytest.approx(
            expected["perplexity"] / expected["perplexity_reference"] - 1, rel=1e-3
        )
    else:  # the same weights: KL of two roundings, 1e-12 measured
        assert found["kl_mean"] < 1e-9
    assert (
        found["settings"]["windowing"]
        == "5 windows of 24 tokens, BOS in front of each, side by side, 115 tokens scored"
    )
    assert "5 windows of 24 tokens, BOS in front of each" in out
    assert f"{found['perplexity']:.3f} ± {found['perplexity_error']:.3f}" in out


def test_kernels_come_near_and_exact_arithmetic_is_what_the_codes_stand_for(
    compiled, checkpoint, text_file, capfd, tmp_path
):
    """Integer products by default, float32 products on the same weights on demand."""
    words = compiled("kernels"), "--text", text_file, "--no-record", *SMALL
    exact, _ = evaluated(capfd, tmp_path, *words, "--kernels", "strict")
    expected = exact_figures(
        stock_model(checkpoint), stock_model(checkpoint, rounded), windows_of(checkpoint, text_file)
    )
    assert exact["perplexity"] == pytest.approx(expected["perplexity"], rel=4e-6)
    assert exact["kl_mean"] == pytest.approx(expected["kl_mean"], rel=1e-4)
    shipped, _ = evaluated(capfd, tmp_path, *words)
    assert shipped == evaluated(capfd, tmp_path, *words, "--kernels", "shipped")[0]
    assert 1e-6 < abs(shipped["perplexity"] / exact["perplexity"] - 1) < 4e-3  # 4e-4 measured


def test_these_windows_would_show_a_wrong_sliding_window(checkpoint, text_file, tmp_path):
    other = write_tiny_checkpoint(tmp_path / "other", "gemma3_text", sliding_window=9)
    windows = windows_of(checkpoint, text_file)
    found = exact_figures(stock_model(checkpoint), stock_model(other), windows)
    assert found["kl_mean"] > 1e-4
    assert abs(found["perplexity"] / found["perplexity_reference"] - 1) > 1e-4


def test_a_checkpoint_alone(checkpoint, text_file, capfd, tmp_path):
    found, out = evaluated(capfd, tmp_path, checkpoint, "--text", text_file, *SMALL)
    model = stock_model(checkpoint)
    expected = exact_figures(model, model, windows_of(checkpoint, text_file))
    assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=4e-6)
    assert found["perplexity_error"] == pytest.approx(expected["perplexity_error"], rel=4e-6)
    assert found["against"] is None
    assert "kl_mean" not in found
    assert "KL" not in out
    assert not (checkpoint / "eval.json").exists()


def test_a_checkpoint_against_itself_differs_in_nothing(checkpoint, text_file, capfd, tmp_path):
    found, out = evaluated(capfd, tmp_path, checkpoint, "--against", checkpoint, "--text", text_file, *SMALL)
    assert (found["kl_mean"], found["kl_max"], found["top1"], found["perplexity_change"]) == (0, 0, 1, 0)
    assert found["perplexity"] == found["perplexity_reference"]
    assert "100.00%" in out


def test_two_artifacts_side_by_side_need_no_checkpoint(compiled, text_file, capfd, tmp_path, monkeypatch):
    int8, divided = compiled("int8"), compiled("divided")
    monkeypatch.setattr(models, "checkpoint_of", None)  # would be called, and fail
    found, _ = evaluated(capfd, tmp_path, int8, "--against", divided, "--text", text_file, "--no-record", *SMALL)
    alone, _ = evaluated(capfd, tmp_path, divided, "--against", "none", "--text", text_file, "--no-record", *SMALL)
    # the same graphs on the same tokens, in another batch: 1e-7 measured
    assert found["perplexity_reference"] == pytest.approx(alone["perplexity"], rel=1e-6)
    assert (found["kl_mean"] > 1e-4, found["against"]["path"], alone["against"]) == (True, str(divided), None)


def test_windows_lie_side_by_side_with_one_bos_each():
    windows = make_windows("x" * 10, lambda text: range(100, 100 + len(text)), 2, count=3, seqlen=4)
    assert windows.ids == ((2, 100, 101, 102), (2, 103, 104, 105), (2, 106, 107, 108))
    assert (windows.scored, windows.tokens) == (9, 10)


def test_a_text_shorter_than_a_window_is_one_window():
    windows = make_windows("xxx", lambda text: [7] * len(text), 2, count=3, seqlen=8)
    assert windows.ids == ((2, 7, 7, 7),)
    assert str(windows) == "1 window of 4 tokens, BOS in front of each, side by side, 3 tokens scored"
    with pytest.raises(UsageError, match="no tokens are in it"):
        make_windows("xxx", lambda text: [], 2, count=3, seqlen=8)


def test_a_spelled_bos_does_not_get_into_a_window(compiled, checkpoint):
    for path in (compiled("int8"), checkpoint):
        encode, bos = models.open_model(str(path)).encoder()
        assert bos == BOS
        assert encode("<bos>the <bos>layer") == tokens_of(checkpoint, "the ") + tokens_of(checkpoint, "layer")


def test_the_default_fits_the_artifact_and_less_text_than_asked_for_is_said(compiled, text_file, capfd, tmp_path):
    found, out = evaluated(capfd, tmp_path, compiled("int8"), "--text", text_file, "--no-record", "--against", "none")
    assert found["settings"]["seqlen"] == 32
    found, out = evaluated(
        capfd, tmp_path, compiled("int8"), "--text", text_file, "--no-record", "--against", "none", "--windows", 900
    )
    ids = tokens_of(compiled("int8"), text_file.read_text())
    assert found["settings"]["windows"] == len(ids) // 31
    assert f"note: the text has {len(ids)} tokens: {len(ids) // 31} windows instead of 900" in out


class Fake:
    """A source whose features are logits; remembers how many positions it was asked for at a time."""

    name = "fake"

    def __init__(self, vocab_size, broken=()):
        self.table = np.random.default_rng(3).standard_normal((vocab_size, vocab_size)).astype(np.float32)
        self.table[list(broken)] = np.nan
        self.blocks, self.rows = [], []

    def run(self, cases):
        self.rows.append(sum(len(case.prompts) for case in cases))
        return [[self.table[list(prompt)] for prompt in case.prompts] for case in cases]

    def head(self, features, prompt_end=False):
        self.blocks.append(len(features))
        return features


def fake(batch=3, broken=()):
    return Evaluated("fake", "checkpoint", "fp32", batch, None, 99, 64, "exact", Fake(64, broken))


def fake_windows(count=8):
    rng = np.random.default_rng(1)
    return ScoredWindows(tuple((BOS, *rng.integers(3, 64, 9).tolist()) for _ in range(count)), 10, 70, count)


def test_logits_are_made_a_block_at_a_time_whatever_the_blocks(monkeypatch):
    whole = fake()
    once = measure(whole, None, fake_windows())
    monkeypatch.setattr(models, "LOGITS_BYTES", 4 * 64 * 5)
    monkeypatch.setattr(models, "TOKENS_AT_ONCE", 60)
    parts = fake()
    assert measure(parts, None, fake_windows()) == once
    assert max(parts.source.blocks) == 5 < max(whole.source.blocks)
    assert parts.source.rows == [6, 3], "eight windows in batches of three, the last one filled"
    nll = np.concatenate(
        [-log_softmax(whole.source.table[list(w[:-1])].astype(np.float64))[range(9), w[1:]] for w in fake_windows().ids]
    )
    assert once.test.value == pytest.approx(math.exp(nll.mean()), rel=1e-12)
    assert once.test.error == pytest.approx(once.test.value * nll.std(ddof=1) / math.sqrt(72), rel=1e-12)


@pytest.mark.parametrize("compared", [False, True])
def test_positions_that_are_not_finite_are_counted_and_left_out(compared):
    windows = fake_windows()
    broken = windows.ids[2][3], windows.ids[4][5]
    bad = sum(token in broken for window in windows.ids for token in window[:-1])
    assert bad >= 2
    found = measure(fake(broken=broken), fake() if compared else None, windows)
    assert (found.bad, found.test.tokens) == (bad, 72 - bad)
    assert math.isfinite(found.test.value)


def test_nothing_scored_has_no_perplexity():
    empty = Perplexity.of(np.empty(0))
    assert math.isnan(empty.value)
    assert empty.tokens == 0
    assert Perplexity.of(np.full(4, 800.0)).value == math.inf


def test_logits_that_are_not_finite_end_with_1(tmp_path, text_file, capfd):
    broken = write_tiny_checkpoint(tmp_path / "broken", "gemma3_text")
    write_tokenizer(broken)
    raw = bytearray((broken / "model.safetensors").read_bytes())
    raw[-2:] = b"\xc0\x7f"  # NaN in the last norm
    (broken / "model.safetensors").write_bytes(raw)
    code, out, err = run(capfd, "eval", broken, "--task", "ppl", "--text", text_file, *SMALL)
    assert code == 1
    assert "115 of 115 positions have logits that are inf or NaN" in err
    assert "- ± -" in out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{checkpoint}"], 2, "Missing option '--task'"),
        (["{checkpoint}", "--task", "mmlu"], 2, "Invalid value for '--task'"),
        (
            ["{checkpoint}", "--task", "ppl", "--shots", "0", "--limit", "3"],
            2,
            "--task ppl does not take --shots, --limit",
        ),
        (["{checkpoint}", "--task", "ceval", "--text", "x"], 2, "--task ceval does not take --text"),
        (["{checkpoint}", "--task", "ppl", "--text", "{tmp}/none.txt"], 2, "cannot be read"),
        (["{checkpoint}", "--task", "ppl", "--text", "{tmp}/empty.txt"], 2, "the text is empty"),
        (["{checkpoint}", "--task", "ppl", "--text", "{tmp}/latin.txt"], 2, "is not UTF-8 text"),
        (["{checkpoint}", "--task", "ppl", "--seqlen", "513"], 2, "longer than the 512"),
        (["{int8}", "--task", "ppl", "--seqlen", "33", "--no-record"], 2, "expected: 2 to 32"),
        (["{int8}", "--task", "ppl", "--kernels", "shipped"], 2, "its graphs name no kernels"),
        (["{checkpoint}", "--task", "ppl", "--kernels", "decode"], 2, "'decode' is not one of 'shipped', 'strict'"),
        (
            ["{checkpoint}", "--task", "ppl", "--against", "hf"],
            2,
            "is a checkpoint, which transformers computes already",
        ),
        (["{checkpoint}", "--task", "ppl", "--against", "demo"], 2, "different vocabularies: 512 and 4096 tokens"),
        (["{checkpoint}", "--task", "ppl", "--against", "{other}"], 2, "the same text becomes other tokens"),
        (["{checkpoint}", "--task", "ppl", "--json", "{tmp}/no/such.json"], 2, "its directory does not exist"),
        (["{tmp}/nothing", "--task", "ppl"], 1, "there is no such file or directory"),
        (["{checkpoint}", "--task", "ppl", "--against", "{tmp}/nothing"], 1, "there is no such file or directory"),
        (["{bare}", "--task", "ppl"], 1, "the tokenizer is missing"),
        (
            ["{int8}", "--task", "ppl", "--checkpoint", "{other}", "--no-record"],
            2,
            "is not the checkpoint this artifact",
        ),
    ],
)
def test_bad_requests(checkpoint, compiled, tmp_path, capfd, arguments, code, message):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 99)
    places = {"tmp": tmp_path, "checkpoint": checkpoint}
    if "{other}" in arguments:
        places["other"] = write_tiny_checkpoint(tmp_path / "other", "gemma3_text", seed=1)
        write_tokenizer(places["other"], 300)
    if "{bare}" in arguments:
        places["bare"] = write_tiny_checkpoint(tmp_path / "bare", "gemma")
    if "{int8}" in arguments:
        places["int8"] = compiled("int8")
    found, out, err = run(capfd, "eval", *(argument.format(**places) for argument in arguments))
    assert (found, out) == (code, "")
    assert message in err
