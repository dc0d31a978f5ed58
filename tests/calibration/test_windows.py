"""Windows: equal length, exactly one BOS in front, the same for the same seed."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from gemma_deploy.calibration import windows
from gemma_deploy.calibration.pipeline import Request, fit_to_sample, make_windows
from gemma_deploy.calibration.sources import SOURCES
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.errors import CalibrationError, CheckpointError
from gemma_deploy.testing import write_tiny_checkpoint
from gemma_deploy.text import Tokenizer
from tests.calibration import make

BOS = 2


def cut(checkpoint, file, **changes):
    return make_windows(checkpoint, Request(**{"dataset": "c4", "path": file, "nsamples": 6, "seqlen": 40} | changes))


def test_every_window_has_one_bos_and_it_is_in_front(checkpoint, tmp_path):
    entries = [{"text": f"<bos>{line['text']} spells <bos> itself"} for line in make.c4_lines()]
    ids = cut(checkpoint, make.write_c4(tmp_path / "x.json.gz", entries)).ids
    assert ids.shape == (6, 40)
    assert ids.dtype == np.int32
    assert (ids[:, 0] == BOS).all()
    assert not (ids[:, 1:] == BOS).any()


def test_texts_follow_one_another(checkpoint, c4_file, monkeypatch):
    monkeypatch.setattr(windows, "SPREAD", 1)
    made = cut(checkpoint, c4_file)
    text = Tokenizer.of(checkpoint).decode_all(made.ids[:, 1:].reshape(-1).tolist())
    texts = text.split("\n\n")
    known = {line["text"] for line in make.c4_lines()}
    assert made.texts_used == {"c4": len(texts)}
    assert len(texts) > 3
    assert set(texts[:-1]) <= known  # the last one is cut
    assert "<pad>" not in text


def test_windows_are_spread_over_more_text_than_they_hold(checkpoint, c4_file, monkeypatch):
    spread = cut(checkpoint, c4_file, nsamples=3).ids
    monkeypatch.setattr(windows, "SPREAD", 1)
    assert np.array_equal(spread, cut(checkpoint, c4_file, nsamples=12).ids[::4])


def test_windows_lie_closer_where_the_text_is_short(checkpoint, c4_file, monkeypatch):
    with pytest.raises(CalibrationError) as caught:
        cut(checkpoint, c4_file, nsamples=1000)
    there = int(caught.value.what.split()[2]) // 39
    for nsamples, step in ((there, 1), (there // 2, 2), (there // 3, 3)):
        found = cut(checkpoint, c4_file, nsamples=nsamples).ids
        with monkeypatch.context() as patch:
            patch.setattr(windows, "SPREAD", 1)
            assert np.array_equal(found, cut(checkpoint, c4_file, nsamples=there).ids[::step][:nsamples])


def test_the_seed_decides_the_order(checkpoint, c4_file):
    first, same, other = (cut(checkpoint, c4_file, seed=seed).ids for seed in (1, 1, 2))
    assert np.array_equal(first, same)
    assert not np.array_equal(first, other)


def test_a_shuffle_keeps_every_text_once(c4_file):
    texts = partial(SOURCES["c4"].texts, c4_file)
    found = list(windows.shuffled(texts, 3))
    assert found != list(texts())
    assert sorted(found) == sorted(texts())


def test_only_as_much_is_read_as_is_needed(checkpoint, monkeypatch):
    monkeypatch.setattr(windows, "SHUFFLE_BUFFER", 10)
    read = []

    def endless():
        number = 0
        while True:
            read.append(number)
            yield {"text": " ".join(make.story(number))}
            number += 1

    monkeypatch.setitem(SOURCES, "c4", replace(SOURCES["c4"], rows=lambda path: endless()))
    assert cut(checkpoint, None, nsamples=2).ids.shape == (2, 40)
    assert len(read) <= windows.SHUFFLE_BUFFER + windows.BATCH + 1


def test_errors_of_the_reader_come_through_the_shuffle(checkpoint, tmp_path):
    file = make.write_c4(tmp_path / "x.json.gz", [*make.c4_lines(3), "{"])
    with pytest.raises(CalibrationError, match="line 4: is not JSON"):
        cut(checkpoint, file)


def test_too_little_text_says_how_much_there_is_and_what_fits(checkpoint, tmp_path):
    file = make.write_c4(tmp_path / "x.json.gz", [{"text": "a" * 98}])
    tokens = len(Tokenizer.of(checkpoint).encode_more("a" * 98 + "\n\n"))
    with pytest.raises(CalibrationError) as caught:
        cut(checkpoint, file, nsamples=50)
    assert caught.value.what == f"too short: {tokens} tokens of text, 50 windows of 40 tokens need 1950"
    fits = tokens // 39
    assert caught.value.next_step.startswith(f"ask for less (--nsamples {fits})")
    assert cut(checkpoint, file, nsamples=fits).ids.shape == (fits, 40)
    with pytest.raises(CalibrationError) as caught:
        cut(checkpoint, file, seqlen=400)
    assert f"--seqlen {tokens + 1} --nsamples 1" in caught.value.next_step
    assert cut(checkpoint, file, seqlen=tokens + 1, nsamples=1).ids.shape == (1, tokens + 1)


def test_a_file_of_empty_texts_holds_no_text(checkpoint, tmp_path):
    file = make.write_c4(tmp_path / "x.json.gz", [{"text": ""}])
    with pytest.raises(CalibrationError, match="holds no text"):
        cut(checkpoint, file)


def test_a_token_that_the_model_does_not_have_is_named_with_its_data_set(tmp_path):
    path = write_tiny_checkpoint(tmp_path / "tiny", "gemma", vocab_size=328)
    make.write_tokenizer(path)
    own = Tokenizer.of(Checkpoint.open(path)).vocab_size
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"mask_token": "<mask>", "image_token": "<image>"}))
    assert Tokenizer.of(Checkpoint.open(path)).id_of("<image>") == own + 1 == 328
    data = make.write_c4(tmp_path / "x.json.gz", [{"text": f"{line['text']} <image>"} for line in make.c4_lines()])
    with pytest.raises(CheckpointError) as caught:
        cut(Checkpoint.open(path), data)
    assert caught.value.what == "the text spells '<image>', which is token 328, but the model has 328 tokens"
    assert caught.value.where == str(data)


@pytest.mark.parametrize("half", ["\\ud83d", "\\udc9d"])
def test_half_a_character_in_a_text_becomes_the_sign_for_one(checkpoint, tmp_path, half):
    """As json.loads reads it from scraped text."""
    lines = [f'{{"text": "{line["text"]} {half}"}}' for line in make.c4_lines()]
    found = cut(checkpoint, make.write_c4(tmp_path / "x.json.gz", lines)).ids
    whole = [{"text": f"{line['text']} \N{REPLACEMENT CHARACTER}"} for line in make.c4_lines()]
    assert np.array_equal(found, cut(checkpoint, make.write_c4(tmp_path / "y.json.gz", whole)).ids)


def test_a_tokenizer_of_another_model_is_noticed(tmp_path, c4_file):
    path = write_tiny_checkpoint(tmp_path / "small", "gemma", vocab_size=280)
    make.write_tokenizer(path)
    with pytest.raises(CheckpointError, match=r"gives token [23]\d\d, but the model has 280 tokens"):
        cut(Checkpoint.open(path), c4_file)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "the tokenizer is missing"),
        ({"tokenizer.model": b"x"}, "only tokenizer.model is there"),
        ({"tokenizer.json": b"{}"}, "is not a tokenizer"),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_named(checkpoint_path, c4_file, files, expected):
    (checkpoint_path / "tokenizer.json").unlink()
    for name, data in files.items():
        (checkpoint_path / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=expected) as caught:
        cut(Checkpoint.open(checkpoint_path), c4_file)
    assert caught.value.where.endswith("tokenizer.json")
    assert caught.value.next_step


@pytest.mark.parametrize("dataset", ["c4", "alpaca", "ceval"])
def test_a_default_number_of_windows_is_what_the_bundled_sample_holds(checkpoint, dataset, caplog):
    asked = Request(dataset, None, 100_000, 64)
    with pytest.raises(CalibrationError, match="too short") as caught:
        make_windows(checkpoint, asked)
    with caplog.at_level("DEBUG", logger="gemma_deploy"):
        fitted = fit_to_sample(checkpoint, asked)
    assert f"(--nsamples {fitted.nsamples})" in caught.value.next_step
    assert f"on {fitted.nsamples} windows of 64 tokens, all that the bundled {dataset} sample holds" in caplog.text
    assert make_windows(checkpoint, fitted).ids.shape == (fitted.nsamples, 64)
    assert fit_to_sample(checkpoint, fitted) == fitted


def test_a_file_of_the_users_own_must_hold_all_windows(checkpoint, c4_file):
    asked = Request("c4", c4_file, 100_000, 64)
    assert fit_to_sample(checkpoint, asked) == asked
