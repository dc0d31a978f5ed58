"""Where a generation stops, what it yields and what it counts; with a scripted model and with a real artifact."""

from types import SimpleNamespace

import numpy as np
import pytest

from gemma_deploy.backends.tvm_vacc.generate import StaticSession
from gemma_deploy.backends.tvm_vacc.runner import StaticRunner
from gemma_deploy.errors import UsageError
from gemma_deploy.runtime import Sampler, Tokenizer
from gemma_deploy.runtime.generate import GenerationStats, encoded, stop_token_ids
from tests.manifests import manifest


def stream(runner, tokenizer, prompt, *, sampler=None, stop_ids=None, **options):
    """What is said to a prompt of any kind."""
    session = StaticSession(runner, tokenizer, sampler, stop_ids=stop_ids)
    return session.reply(encoded(tokenizer, prompt), **options)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir):
    return Tokenizer(tokenizer_dir)


class Scripted:
    """Says the tokens it was given, one after the other, as a runner would."""

    path, batch, prefill_length = "scripted", 2, 8
    context_length, load_seconds = 1000, 0.0

    def __init__(self, tokens, vocab_size, manifest=None, room=1000):
        self.script, self.vocab_size, self.manifest, self.remaining = list(tokens), vocab_size, manifest, room
        self.contract = SimpleNamespace(vocab_size=vocab_size)
        self.fed = []

    def _next(self):
        logits = np.zeros((self.batch, self.vocab_size), np.float32)
        logits[0, self.script.pop(0)] = 1
        return logits

    def reset(self):
        self.fed = []

    def prefill(self, prompts):
        self.prompts = prompts
        return self._next()

    def step(self, tokens):
        self.fed.append(list(tokens))
        self.remaining -= 1
        return self._next()


def scripted(tokenizer, text, **kwargs):
    return Scripted([*tokenizer.encode(text)[1:], *[1] * 3], tokenizer.vocab_size, **kwargs)


def test_the_stop_token_ends_it_and_is_not_text(tokenizer):
    runner, stats = (
        scripted(tokenizer, "the list", manifest=manifest(model={"eos_token_ids": [1, 5]})),
        GenerationStats(),
    )
    pieces = list(stream(runner, tokenizer, "a", stats=stats))
    assert "".join(pieces) == "the list"
    assert (stats.finish, stats.prompt_tokens) == ("stop", 2)
    assert stats.tokens == tokenizer.encode("the list")[1:]
    assert runner.prompts == [tokenizer.encode("a")] * 2
    assert runner.fed == [[token] * 2 for token in stats.tokens]


def test_every_stop_token_counts_and_none_can_be_asked_for(tokenizer):
    for stops, expected in (((5,), "a"), ((), "ab"), (tokenizer.encode("b")[1:], "a")):
        ids = [*tokenizer.encode("a")[1:], 5, *tokenizer.encode("b")[1:], 1, 1]
        runner = Scripted(ids, tokenizer.vocab_size, manifest=manifest(model={"eos_token_ids": [1]}))
        got = "".join(stream(runner, tokenizer, "x", max_new_tokens=3, stop_ids=stops))
        assert got == expected
    assert stop_token_ids(None) == stop_token_ids(manifest(model={"eos_token_ids": []})) == ()
    assert stop_token_ids(manifest(model={"eos_token_ids": [1, 106]})) == (1, 106)


def test_the_length_ends_it_without_a_step_too_many(tokenizer):
    runner, stats = scripted(tokenizer, "abcdef"), GenerationStats()
    assert "".join(stream(runner, tokenizer, "x", max_new_tokens=3, stats=stats)) == "abc"
    assert (stats.finish, len(stats.tokens), len(runner.fed)) == ("length", 3, 2)


def test_the_full_context_ends_it(tokenizer):
    runner, stats = scripted(tokenizer, "abcdef", room=2), GenerationStats()
    assert "".join(stream(runner, tokenizer, "x", stats=stats)) == "abc"
    assert (stats.finish, runner.remaining) == ("context", 0)


def test_characters_are_whole_and_half_ones_at_the_end_are_dropped(tokenizer):
    assert list(stream(scripted(tokenizer, "a€b"), tokenizer, "x", max_new_tokens=5)) == ["a", "€", "b"]
    assert list(stream(scripted(tokenizer, "a€"), tokenizer, "x", max_new_tokens=3)) == ["a"]


def test_whole_characters_held_back_with_half_of_one_come_at_the_end():
    class Bytes:
        """A tokenizer whose tokens end inside characters, as byte-level ones may."""

        def encode(self, text):
            return [0]

        def decode(self, ids):
            return b"".join([b"a", b"b\xe2"][token] for token in ids).decode("utf-8", "replace")

    assert list(stream(Scripted([0, 1], 2), Bytes(), "x", max_new_tokens=2)) == ["a", "b"]


def test_bad_requests_are_refused_before_the_first_piece(tokenizer):
    runner = scripted(tokenizer, "a")
    with pytest.raises(UsageError, match=r"the prompt has 9 tokens, this artifact takes 8 at most"):
        stream(runner, tokenizer, "x" * 8)
    with pytest.raises(UsageError, match="max_new_tokens is 0"):
        stream(runner, tokenizer, "x", max_new_tokens=0)
    assert len("".join(stream(runner, tokenizer, "x" * 7, max_new_tokens=1))) == 1


def test_messages_go_through_the_chat_template(artifacts, tokenizer):
    messages = [{"role": "user", "content": "a"}]
    runner = scripted(tokenizer, "b")
    runner.prefill_length = 64
    list(stream(runner, tokenizer, messages, max_new_tokens=1))
    assert runner.prompts[0] == tokenizer.encode_chat(messages)


def test_an_interrupted_generation_is_not_called_finished(tokenizer):
    stats = GenerationStats()
    pieces = stream(scripted(tokenizer, "abc"), tokenizer, "x", stats=stats)
    assert next(pieces) == "a"
    pieces.close()
    assert (stats.finish, len(stats.tokens)) == (None, 1)


def test_speed_counts_steps_not_the_prefill():
    assert GenerationStats(tokens=[1] * 5, decode_seconds=2.0).tokens_per_second == 2.0
    assert GenerationStats(tokens=[1], decode_seconds=0.0).tokens_per_second == 0.0


def test_a_real_artifact_continues_as_transformers_does(artifacts, tokenizer):
    import torch
    from transformers import AutoModelForCausalLM

    artifact = artifacts("gemma3_text", "fp32")
    model = AutoModelForCausalLM.from_pretrained(
        artifact.parent / "checkpoint", attn_implementation="eager", dtype=torch.float32
    ).eval()
    prompt, stats = "the list of the lists, and th", GenerationStats()
    ids = torch.tensor([tokenizer.encode(prompt)])
    expected = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None)[0, ids.shape[1] :].tolist()
    runner = StaticRunner(artifact, "strict", 1)
    list(stream(runner, tokenizer, prompt, max_new_tokens=20, stop_ids=(), stats=stats))
    assert stats.tokens == expected
    assert len(set(expected)) > 3
    # loading is counted once, and apart
    assert stats.load_seconds == runner.load_seconds > 0
    again = [GenerationStats(), GenerationStats()]
    for each in again:
        list(stream(runner, tokenizer, prompt, max_new_tokens=20, stop_ids=(), sampler=Sampler(1, seed=3), stats=each))
    assert again[0].tokens == again[1].tokens != expected
    assert again[0].load_seconds == 0
