"""Prompts outgrow the window where they can, rows differ in length, and the tokens are those of the text."""

from types import SimpleNamespace

import numpy as np
import pytest

from gemma_deploy.checkpoint.config import ModelConfig
from gemma_deploy.parity.cases import Case, make_cases, prompt_length
from gemma_deploy.parity.compare import compare_sources
from gemma_deploy.testing import TINY_CONFIGS

GEMMA, GEMMA3 = (ModelConfig.from_dict(TINY_CONFIGS[kind], "config.json") for kind in ("gemma", "gemma3_text"))
TEXT = list(range(100, 300))


@pytest.mark.parametrize(("batch", "length", "steps"), [(1, 24, 8), (2, 24, 8), (3, 17, 1), (4, 5, 0), (2, 1, 3)])
def test_shapes_and_tokens(batch, length, steps):
    for case in make_cases(GEMMA, batch=batch, length=length, steps=steps, text=TEXT):
        lengths = [len(prompt) for prompt in case.prompts]
        assert (len(lengths), lengths[0], case.steps, case.longest) == (batch, length, steps, length + steps)
        assert length <= 2 * batch or len(set(lengths)) == batch, "rows of one length have no padding to get wrong"
        assert min(lengths) >= 1
        for row, prompt in enumerate(case.prompts):
            assert prompt[0] == GEMMA.bos_token_id
            tail = case.sequence(row)[1:]
            assert all(0 <= token < GEMMA.vocab_size for token in tail)
            if case.name == "text":
                start = tail[0] - 100 if tail else 0
                assert list(tail) == TEXT[start : start + len(tail)], "the text goes on where the prompt ends"


def test_random_tokens_repeat_for_a_seed_and_rows_differ():
    first, again, other = (
        make_cases(GEMMA, batch=2, length=20, steps=4, text=None, seed=seed)[0] for seed in (1, 1, 2)
    )
    assert first == again != other
    assert first.name == "random"
    assert first.prompts[0][: len(first.prompts[1])] != first.prompts[1]


def test_short_text_shortens_the_prompt_and_keeps_the_steps():
    text, random = make_cases(GEMMA, batch=2, length=24, steps=8, text=TEXT[:12])
    assert [len(prompt) for prompt in text.prompts] == [5, 5]
    assert text.steps == random.steps == 8
    assert [case.name for case in make_cases(GEMMA, batch=1, length=24, steps=8, text=TEXT[:9])] == ["random"]


def test_a_model_without_bos_in_its_config_starts_with_token_0():
    config = ModelConfig.from_dict({**TINY_CONFIGS["gemma"], "bos_token_id": None}, "config.json")
    assert make_cases(config, batch=1, length=4, steps=1, text=None)[0].prompts[0][0] == 0


@pytest.mark.parametrize(
    ("config", "prefill", "asked", "length", "sentence"),
    [
        (GEMMA, 64, 24, 24, ""),
        (GEMMA, 16, 24, 16, ""),
        (GEMMA3, 64, 24, 24, "the prompts (24 tokens) are longer than the sliding window (8)"),
        (GEMMA3, 64, 4, 16, "the prompts (16 tokens) are longer than the sliding window (8)"),
        (GEMMA3, 9, 4, 9, "the prompts (9 tokens) are longer than the sliding window (8)"),
        (GEMMA3, 8, 24, 8, "the sliding window (8) is not reached: prefill takes 8 tokens"),
        (GEMMA3, 8, 4, 4, "the sliding window (8) is not reached: prefill takes 8 tokens"),
    ],
)
def test_prompts_outgrow_the_window_where_prefill_allows(config, prefill, asked, length, sentence):
    got, note = prompt_length(config, prefill, asked)
    assert got == length
    assert note.startswith(sentence)
    assert bool(note) == bool(sentence)


@pytest.mark.parametrize(
    ("prompts", "forced", "message"),
    [
        (((1, 2),), ((3,), (4,)), "as many forced tokens"),
        (((1,), (2,)), ((3,), (4, 5)), "as many forced tokens"),
        (((1,), ()), ((3,), (4,)), "empty prompt"),
    ],
)
def test_malformed_cases_are_refused(prompts, forced, message):
    with pytest.raises(ValueError, match=message):
        Case("random", prompts, forced)


class Table:
    """A source whose logits say where they were asked: row and position of every sequence, plus an offset."""

    def __init__(self, vocab, last=None, offset=0.0):
        self.vocab, self.last, self.offset = vocab, last, offset

    def run(self, cases):
        return [[np.array([[row, i] for i in range(len(c.sequence(row)))][-(self.last or 0) :], float)
                 for row in range(len(c.prompts))] for c in cases]  # fmt: skip

    def head(self, features, prompt_end):
        rows, positions = features.T
        return np.sin(np.outer(rows * 1000 + positions, np.arange(1, self.vocab + 1))) + self.offset


CASES = [Case("text", ((2, 5, 6, 7), (2, 5)), ((8, 9, 9), (7, 7, 3)))]


def test_sources_are_compared_position_by_position_and_by_phase():
    sources = {"a": Table(11), "b": Table(11, last=4), "c": Table(11, offset=0.5)}
    found = compare_sources(sources, [("a", "b"), ("a", "c")], CASES, vocab_size=11)
    last, all_ = (
        {key: (metrics.positions, metrics.max_abs) for key, metrics in found["a", test].measured().items()}
        for test in ("b", "c")
    )
    # "b" makes the last 4 positions of a row alone: the prompt's end and 3 steps
    assert last == {("text", "prefill"): (2, 0.0), ("text", "decode"): (6, 0.0)}
    assert all_ == {("text", "prefill"): (6, pytest.approx(0.5)), ("text", "decode"): (6, pytest.approx(0.5))}
    # targets: every position but the last of each row has a next token
    assert (found["a", "c"].pooled()["text"].scored, found["a", "c"].pooled()["text"].positions) == (10, 12)


def test_perplexity_is_that_of_the_token_that_comes_next():
    found = compare_sources({"a": Table(11), "b": Table(11)}, [("a", "b")], CASES, vocab_size=11)["a", "b"].pooled()[
        "text"
    ]
    nll = []
    for row in range(2):
        sequence = CASES[0].sequence(row)
        logits = Table(11).head(np.array([[row, i] for i in range(len(sequence))], float), False)
        for at, token in zip(logits, sequence[1:], strict=False):
            nll.append(np.log(np.exp(at).sum()) - at[token])
    assert found.ppl_reference == found.ppl_test == pytest.approx(np.exp(np.mean(nll)), rel=1e-6)


def test_blocks_of_any_size_compare_the_same(monkeypatch):
    from gemma_deploy.parity import compare

    sources, results = {"a": Table(11), "b": Table(11, last=5, offset=0.25)}, []
    for size in (1, 2 * 44, 3 * 44, 1 << 20):
        monkeypatch.setattr(compare, "BLOCK_BYTES", size)
        results.append(compare_sources(sources, [("a", "b")], CASES, vocab_size=11)["a", "b"].measured())
    assert results[0] == results[1] == results[2] == results[3]


def test_only_the_last_positions_of_a_long_prompt_are_compared(monkeypatch):
    from gemma_deploy.parity import compare

    monkeypatch.setattr(compare, "PROMPT_POSITIONS", {"text": 3, "random": 3})
    found = compare_sources({"a": Table(11), "b": Table(11)}, [("a", "b")], CASES, vocab_size=11)["a", "b"].measured()
    assert (found["text", "prefill"].positions, found["text", "decode"].positions) == (3 + 2, 6)


def test_asked_steps_that_do_not_fit_are_noted():
    from gemma_deploy.parity.compare import cases_for

    checkpoint = SimpleNamespace(config=GEMMA, format="safetensors", tokenizer_files=list)
    notes = []
    cases = cases_for(
        checkpoint,
        SimpleNamespace(prefill=16, context=20, batch=1),
        None,
        prompt_tokens=8,
        decode_tokens=32,
        notes=notes,
    )
    assert [case.steps for case in cases] == [4]
    assert notes[0].startswith("4 decode steps instead of 32")
    assert "no tokenizer" in notes[1]
