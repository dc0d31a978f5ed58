"""Decoding that looks ahead: transformers' greedy tokens in fewer steps, whatever the guesses are worth; refusals."""

import functools

import numpy as np
import pytest

from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.backends.onnxruntime.engine import OrtSession
from gemma_deploy.backends.onnxruntime.in_place import OrtModel, OrtSequence
from gemma_deploy.cli import main
from gemma_deploy.engine import open_engine
from gemma_deploy.errors import DeployError, UsageError
from gemma_deploy.runtime import Sampling, Tokenizer, speculative
from gemma_deploy.runtime.generate import GenerationStats
from gemma_deploy.runtime.lookup import History
from gemma_deploy.runtime.speculative import Speculative
from tests.manifests import manifest

COUNT = 40  # with the prompt nine windows of 8


@pytest.fixture(scope="module")
def prompts():
    """Text that repeats itself, and one that does not."""
    rng = np.random.default_rng(1)
    once = rng.integers(3, 500, 11).tolist()
    return [[2, *once, *once, *once[:5]], [2, *rng.integers(3, 500, 27).tolist()]]


@functools.cache
def opened(artifact):
    return OrtModel(artifact, Artifact.open(artifact).manifest, 1)


@functools.cache
def eager(artifact):
    """The checkpoint of an artifact in transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    checkpoint = artifact.parent.parent / "checkpoint"
    return AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager", dtype=torch.float32).eval()


def greedy_of_transformers(artifact, prompt, count):
    import torch

    model = eager(artifact)
    made = model.generate(torch.tensor([prompt]), max_new_tokens=count, min_new_tokens=count, do_sample=False)
    return made[0, len(prompt) :].tolist()


def looked_up(model, prompt, count):
    """So many tokens, and who gave them."""
    greedy = Speculative(model, prompt, len(prompt) + count, guesser=History(prompt))
    tokens = [greedy.first()]
    while len(tokens) < count:
        tokens += greedy.next()
    return tokens, greedy


def one_by_one(model, prompt, count):
    """The graph's own greedy tokens, a token a step."""
    sequence, tokens = OrtSequence(model, len(prompt) + count), []
    rows = sequence.feed(prompt)
    while True:
        tokens.append(int(rows[-1].argmax()))
        if len(tokens) == count:
            return tokens
        rows = sequence.feed(tokens[-1:])


def test_the_guess_is_what_followed_the_longest_latest_occurrence():
    history = History([1, 2, 3, 4, 1, 2, 3, 5, 9, 2, 3])
    assert history.followed(3) == [5, 9, 2]  # of "2 3" the latest, not "4 1 2"
    history = History([1, 2, 3, 4, 7, 2, 3, 5, 1, 2, 3])
    assert history.followed(2) == [4, 7]  # "1 2 3" counts more than the later "2 3"
    assert history.followed(50) == [4, 7, 2, 3, 5, 1, 2, 3]
    history.append(11)
    assert history.followed(3) == []
    assert History([5]).followed(3) == []
    assert History([5, 5, 5]).followed(2) == [5]


def test_tokens_are_transformers_greedy_ones_past_the_window(genai_artifact, model_type, prompts):
    artifact = genai_artifact(model_type)
    steps = 0
    for prompt in prompts:
        tokens, greedy = looked_up(opened(artifact), prompt, COUNT)
        assert tokens[:COUNT] == greedy_of_transformers(artifact, prompt, COUNT)
        assert greedy.sequence.length == len(greedy.ids) - 1  # what was guessed wrong is forgotten
        steps += greedy.steps
    assert steps < 2 * (COUNT - 1)  # in what these models repeat, several tokens a step


@pytest.mark.parametrize("guess", ["right", "wrong", "half"])
def test_guesses_change_the_steps_and_no_token(genai_artifact, prompts, monkeypatch, guess):
    model = opened(genai_artifact("gemma3_text"))
    prompt = prompts[1]
    expected = one_by_one(model, prompt, 24)
    whole = [*prompt, *expected]

    def told(self, most):
        coming = whole[len(self.ids) : len(self.ids) + most]
        if guess == "wrong":
            coming = [(token + 1) % 500 for token in coming]
        return coming if guess == "right" else [*coming[: most // 2], *[3] * len(coming[most // 2 :])]

    monkeypatch.setattr(History, "followed", told)
    tokens, greedy = looked_up(model, prompt, 24)
    assert tokens[:24] == expected
    if guess == "right":
        assert greedy.right == greedy.guessed
        assert greedy.steps <= 1 + 24 // 4
    if guess == "wrong":
        assert greedy.right == 0
        assert greedy.guessed < 2 * greedy.steps  # and it asks for less than at first


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_tokens_together_differ_from_tokens_alone_by_less_than_a_near_tie(genai_artifact, prompts, dtype):
    """Tiny models: 2e-6 in fp32, 0.015 in int8, where the head rounds. in_place.py has the figures of the real 270M."""
    model = opened(genai_artifact("gemma3_text", dtype))
    alone, together = OrtSequence(model, 64), OrtSequence(model, 64)
    prompt = prompts[0][:20]
    alone.feed(prompt)
    together.feed(prompt)
    more = [*prompts[1][1:6], *prompts[0][1:3]]
    expected = np.concatenate([alone.feed([token]) for token in more])
    found = together.feed(more)
    assert found.shape == (len(more), model.vocab_size)
    difference = float(np.abs(found - expected).max())
    assert difference <= {"fp32": 2e-5, "int8": 5e-2}[dtype] < model.near_tie  # other processors, other kernels
    assert float(np.abs(found[1:] - expected[:-1]).max()) > 0.1  # rows belong to their tokens


def test_int8_tokens_are_those_of_single_steps(genai_artifact, model_type, prompts):
    model = opened(genai_artifact(model_type, "int8"))
    for prompt in prompts:
        assert looked_up(model, prompt, COUNT)[0][:COUNT] == one_by_one(model, prompt, COUNT)


def test_a_near_tie_is_decided_by_a_token_alone(genai_artifact, prompts, monkeypatch):
    model = opened(genai_artifact("gemma3_text"))
    monkeypatch.setattr(model, "near_tie", np.inf)
    fed, feed = [], OrtSequence.feed
    monkeypatch.setattr(
        OrtSequence,
        "feed",
        lambda self, tokens, *given, **more: fed.append(len(tokens)) or feed(self, tokens, *given, **more),
    )
    tokens, greedy = looked_up(model, prompts[0], COUNT)
    assert max(fed[1:]) > 1  # guesses were made
    singles = sum(count == 1 for count in fed)
    assert singles == len(tokens) - 1  # and every token but the prompt's computed alone
    assert greedy.steps == len(fed) - 1
    monkeypatch.undo()
    assert tokens[:COUNT] == one_by_one(model, prompts[0], COUNT)


def test_a_text_ends_at_its_stop_token_its_length_or_the_context(genai_artifact, prompts, monkeypatch, caplog):
    artifact = genai_artifact("gemma3_text")
    model, tokenizer = opened(artifact), Tokenizer(artifact)
    expected = one_by_one(model, prompts[0], 100)

    def said(count):
        stats = GenerationStats()
        session = OrtSession(model, tokenizer, max_length=len(prompts[0]) + count, lookup=True)
        for _ in session.reply(prompts[0], max_new_tokens=count, stats=stats):
            pass
        return stats

    stats = said(COUNT)
    assert (stats.tokens, stats.finish, stats.prompt_tokens) == (expected[:COUNT], "length", len(prompts[0]))
    assert 0 < stats.steps < COUNT
    stats = said(1000)
    assert stats.finish == "context"
    assert len(prompts[0]) + len(stats.tokens) == model.context_length == 128
    assert stats.tokens == expected[: len(stats.tokens)]
    assert "the context of 128 slots is full" in caplog.text
    stop = expected[7]
    monkeypatch.setattr(model, "stop_ids", frozenset([stop]))
    stats = said(COUNT)
    assert (stats.tokens, stats.finish) == (expected[: expected.index(stop)], "stop")


def test_what_does_not_fit_is_refused(genai_artifact):
    artifact = genai_artifact("gemma3_text")
    engine = open_engine(artifact, threads=1)
    with pytest.raises(UsageError, match="the prompt has 128 tokens"):
        engine.stream([2] * 128, lookup=True)
    with pytest.raises(UsageError, match="max_new_tokens is 0"):
        engine.stream([2], max_new_tokens=0, lookup=True)
    with pytest.raises(UsageError, match="9999"):
        engine.stream([2, 9999], lookup=True)
    with pytest.raises(UsageError, match="what is drawn at random cannot be looked up"):
        engine.stream([2], sampling=Sampling(temperature=1), lookup=True)
    with pytest.raises(UsageError, match="is for CPUs"):
        OrtModel(artifact, manifest(recipe={"backend": {"dtype": "bf16"}}))
    with pytest.raises(DeployError, match="nan"):
        speculative.best_of(np.array([1.0, np.nan]), artifact)


def test_run_looks_up(genai_artifact, capfd):
    artifact = genai_artifact("gemma3_text")
    words = ["run", str(artifact), "-p", "the list the list the list", "-n", "30"]
    assert main([*words, "--lookup", "--stats"]) == 0
    found = capfd.readouterr()
    assert "a step)" in found.err
    assert main(words) == 0
    assert found.out == capfd.readouterr().out


def test_run_says_all_that_speaks_against_it(genai_artifact, demo_artifact, capfd):
    options = ["-p", "x", "--lookup", "--temperature", "0.5", "--strict"]
    assert main(["run", str(genai_artifact("gemma3_text")), *options]) == 2
    said = capfd.readouterr().err
    assert "--temperature 0.5" in said
    assert "--strict is for static artifacts" in said
    assert main(["run", str(demo_artifact), "-p", "x", "--lookup"]) == 2
    assert "this artifact is static" in capfd.readouterr().err
