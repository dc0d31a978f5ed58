"""`open_engine`: every back end gives transformers' text, in sessions that do not disturb each other; stops, cancel."""

import json
import random
import shutil
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.backends.onnxruntime.engine import OrtEngine
from gemma_deploy.backends.tvm_vacc.generate import StaticSession
from gemma_deploy.engine import open_engine
from gemma_deploy.errors import ArtifactError, DeployError, NoArtifactError, UsageError
from gemma_deploy.runtime import Sampling, Tokenizer
from gemma_deploy.runtime.generate import GenerationStats
from gemma_deploy.runtime.lookup import History
from gemma_deploy.text import TextStream
from tests.runtime.make import compile_tiny
from tests.runtime.test_genai import eager
from tests.runtime.test_generate import Scripted

RUNTIMES = ("static", "onnxruntime-genai", "onnxruntime")
PROMPTS = [[2, *np.random.default_rng(seed).integers(3, 500, 20 + seed).tolist()] for seed in range(4)]
COUNT = 16  # with the prompt four windows of 8


@pytest.fixture(scope="session")
def static_artifact(once):
    """The same checkpoint as `genai_artifact("gemma3_text")`, as the static pair in float32; read only."""
    made = once("static-gemma3_text", lambda root: compile_tiny(root, "gemma3_text", {"dtype": "fp32"}))
    return made / "workspace" / "tiny"


@pytest.fixture(scope="module")
def artifact(static_artifact, genai_artifact):
    return lambda runtime: static_artifact if runtime == "static" else genai_artifact("gemma3_text")


class Syllables:
    """Decodes every token to three letters: models of random weights say what is no UTF-8 in bytes."""

    def decode(self, ids):
        return "".join(chr(97 + one % 23) + chr(97 + one % 7) + chr(97 + one // 23) for one in ids)


def opened(directory, runtime):
    engine = OrtEngine(Artifact.open(directory)) if runtime == "onnxruntime" else open_engine(directory, threads=1)
    assert engine.runtime == runtime
    return engine


@pytest.fixture(scope="module", params=RUNTIMES)
def engine(request, artifact):
    return opened(artifact(request.param), request.param)


@pytest.fixture
def broken(request, engine, artifact, tmp_path):
    """A copy of the artifact to damage, and how it is opened again."""
    copy = shutil.copytree(artifact(engine.runtime), tmp_path / "copy")
    return copy, lambda: opened(copy, engine.runtime)


@pytest.fixture(scope="module")
def reference(genai_artifact):
    """Token ids -> transformers' greedy tokens behind them."""
    generate = eager(genai_artifact("gemma3_text"))
    return lambda ids, count=COUNT: generate([ids], count)[0]


def said(session, ids, count=COUNT, **options):
    stats = GenerationStats()
    text = "".join(session.reply(ids, max_new_tokens=count, stats=stats, **options))
    return text, stats


def spelling(session):
    session.tokenizer = Syllables()
    return session


def test_text_is_transformers_greedy_text(engine, reference):
    for prompt in PROMPTS:
        expected = reference(prompt)
        text, stats = said(spelling(engine.session()), prompt)
        assert (stats.tokens, text) == (expected, Syllables().decode(expected))
        assert (stats.finish, stats.prompt_tokens) == ("length", len(prompt))
    assert len({token for prompt in PROMPTS for token in reference(prompt)}) > 6


def test_sessions_by_turns_say_what_each_says_alone(engine, reference):
    sessions, stats = [engine.session() for _ in PROMPTS], [GenerationStats() for _ in PROMPTS]
    replies = [
        session.reply(prompt, max_new_tokens=COUNT, stats=one)
        for session, prompt, one in zip(sessions, PROMPTS, stats, strict=True)
    ]
    while replies:  # a piece of each in turn
        replies = [pieces for pieces in replies if next(pieces, None) is not None]
    assert [one.tokens for one in stats] == [reference(prompt) for prompt in PROMPTS]
    more = [PROMPTS[1][1:6], PROMPTS[0][1:6]]
    for session, prompt, ids in zip(sessions, PROMPTS, more, strict=False):
        sequence = [*prompt, *reference(prompt)]
        assert session.ids == sequence
        assert said(session, ids)[1].tokens == reference([*sequence, *ids])


def test_sessions_in_threads_say_what_each_says_alone(engine, reference):
    found = [None] * len(PROMPTS)

    def talk(place):
        found[place] = said(engine.session(), PROMPTS[place])[1].tokens

    threads = [threading.Thread(target=talk, args=(place,)) for place in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [reference(prompt) for prompt in PROMPTS]


def test_a_session_goes_on_after_a_reset_and_an_interrupted_reply(engine, reference):
    session = engine.session()
    pieces = session.reply(PROMPTS[0], max_new_tokens=50)
    next(pieces)
    pieces.close()
    sequence = session.ids
    assert len(PROMPTS[0]) < len(sequence) < len(PROMPTS[0]) + 50
    assert sequence == [*PROMPTS[0], *reference(PROMPTS[0], 50)][: len(sequence)]
    assert said(session, PROMPTS[1][1:5])[1].tokens == reference([*sequence, *PROMPTS[1][1:5]])
    session.reset()
    assert session.ids == []
    assert said(session, PROMPTS[2])[1].tokens == reference(PROMPTS[2])


def test_a_new_reply_ends_the_one_before_it(engine, reference):
    session, stats = engine.session(), GenerationStats()
    old = session.reply(PROMPTS[0], max_new_tokens=50, stats=stats)
    next(old)
    sequence, count = session.ids, len(stats.tokens)
    assert said(session, PROMPTS[1][1:5])[1].tokens == reference([*sequence, *PROMPTS[1][1:5]])
    kept = session.ids
    list(old)
    assert (stats.finish, len(stats.tokens), session.ids) == ("cancelled", count, kept)


def test_cancel_from_another_thread_ends_it_after_the_token_at_hand(engine, reference, monkeypatch):
    session, stats, push, fifth = engine.session(), GenerationStats(), TextStream.push, threading.Event()

    def pushed(text, token):
        if len(stats.tokens) == 5:
            fifth.set()
            other.join()
        return push(text, token)

    monkeypatch.setattr(TextStream, "push", pushed)
    other = threading.Thread(target=lambda: fifth.wait() and session.cancel())
    other.start()
    list(session.reply(PROMPTS[0], max_new_tokens=50, stats=stats))
    assert (stats.finish, stats.tokens) == ("cancelled", reference(PROMPTS[0])[:5])
    monkeypatch.undo()
    sequence = session.ids
    assert sequence == [*PROMPTS[0], *stats.tokens]
    assert said(session, PROMPTS[1][1:5])[1].tokens == reference([*sequence, *PROMPTS[1][1:5]])  # it is over with that
    pieces = session.reply(PROMPTS[1][1:5], stats=(stats := GenerationStats()))
    session.cancel()
    assert (list(pieces), stats.tokens, stats.finish) == ([], [], "cancelled")  # before the prompt was read


def test_stop_strings_are_cut_out_exactly(engine, reference):
    rng, spanning, decode = random.Random(1), 0, Syllables().decode
    for prompt in PROMPTS:
        tokens = reference(prompt, 40)
        whole = decode(tokens)
        start = rng.randrange(2, len(whole) // 2)
        stop = whole[start : start + rng.randrange(2, 9)]
        text, stats = said(spelling(engine.session()), prompt, 40, stop=[stop, "never said"])
        assert text == whole[: whole.index(stop)]
        assert (stats.finish, stats.stop_string) == ("stop", stop)
        assert stats.tokens == tokens[: len(stats.tokens)]  # those of the stop are said
        assert stop in decode(stats.tokens)
        assert stop not in decode(stats.tokens[:-1])
        spanning += stop not in decode(stats.tokens[-1:])
    assert spanning >= 2


def test_a_session_goes_on_after_a_stop_string(engine, reference):
    session = spelling(engine.session())
    tokens = reference(PROMPTS[0], 40)
    text, stats = said(session, PROMPTS[0], 40, stop=Syllables().decode(tokens)[4:8])
    assert (len(text), stats.finish) == (4, "stop")
    sequence = session.ids
    assert sequence == [*PROMPTS[0], *stats.tokens]
    assert said(session, PROMPTS[1][1:5])[1].tokens == reference([*sequence, *PROMPTS[1][1:5]])


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir):
    return Tokenizer(tokenizer_dir)


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (["€"], ["a"]),  # three tokens, a byte each
        (["€b"], ["a"]),
        (["a€b€c"], []),
        (["b€x"], ["a", "€", "b€c"]),
        (["c", "€c"], ["a", "€b"]),
        (["zzz"], ["a", "€", "b", "€", "c"]),
    ],
)
def test_stop_strings_of_characters_that_are_split_between_tokens(tokenizer, stop, expected):
    runner = Scripted([*tokenizer.encode("a€b€c")[1:], 1], tokenizer.vocab_size)
    stats = GenerationStats()
    pieces = list(StaticSession(runner, tokenizer, stop_ids=[1]).reply([2], stop=stop, stats=stats))
    assert pieces == expected
    found = "".join(expected) != "a€b€c"
    assert (stats.finish, stats.stop_string) == ("stop", stop[-1] if found else None)


def test_a_stop_string_within_whole_text_held_back_to_the_end_is_cut_too():
    class Bytes:
        """A tokenizer whose tokens end inside characters."""

        def decode(self, ids):
            return b"".join([b"a", b"bc\xe2"][token] for token in ids).decode("utf-8", "replace")

    stats = GenerationStats()
    session = StaticSession(Scripted([0, 1], 2), Bytes())
    assert list(session.reply([0], max_new_tokens=2, stop="c", stats=stats)) == ["a", "b"]
    assert (stats.finish, stats.stop_string) == ("stop", "c")


def test_logits_of_a_prompt_and_of_tokens_are_transformers(engine, genai_artifact):
    import torch
    from transformers import AutoModelForCausalLM

    checkpoint = genai_artifact("gemma3_text").parent.parent / "checkpoint"
    model = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager", dtype=torch.float32).eval()
    ids = PROMPTS[3]
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    session, at = engine.session(), len(ids) - 4
    found = [session.read(ids[:at]), session.read(ids[at : at + 1]), session.read(ids[at + 1 : at + 3])]
    assert [row.shape for row in found] == [(engine.vocab_size,)] * 3
    assert session.ids == ids[: at + 3]
    for row, place in zip(found, (at - 1, at, at + 2), strict=True):
        np.testing.assert_allclose(row, expected[place], atol=2e-5 * np.abs(expected).max())  # as fp32's gate, twice
    assert np.abs(found[0] - found[1]).max() > 0.1
    _, stats = said(session, ids[-1:], 1)
    assert stats.tokens == [int(expected[-1].argmax())]


@pytest.mark.parametrize("sampling", [None, Sampling(temperature=0.5, seed=3)])
def test_nan_after_some_steps_is_no_answer(engine, broken, sampling):
    copy, open_again = broken
    right = said(engine.session(sampling), [2, 30, 40], 60)[1].tokens
    assert len(right) == 60
    manifest = json.loads((copy / "manifest.json").read_text())
    rows = [row for row in manifest["params"] if row["name"].startswith("model.rotary_emb.")]
    assert rows
    with (copy / "params.safetensors").open("r+b") as file:
        for row in rows:  # the tables from position 50 on
            width = row["shape"][1]
            file.seek(row["offset"] + 4 * width * 50)
            file.write(np.full((row["shape"][0] - 50) * width, np.nan, np.float32).tobytes())
    stats = GenerationStats()
    with pytest.raises(DeployError, match="the model gave nan as its largest logit"):
        for _ in open_again().session(sampling).reply([2, 30, 40], max_new_tokens=60, stats=stats):
            pass
    assert stats.tokens == right[: 51 - 3]  # the last of them stands at position 50, and was read


def test_seeds_repeat_and_sessions_have_random_streams_of_their_own(engine):
    def drawn(seed):
        return said(engine.session(Sampling(temperature=1.5, seed=seed)), PROMPTS[0])[1].tokens

    first = drawn(1)
    assert drawn(1) == first != drawn(2)
    one, other = (engine.session(Sampling(temperature=1.5, seed=1)) for _ in range(2))
    replies = [session.reply(PROMPTS[0], max_new_tokens=COUNT, stats=GenerationStats()) for session in (one, other)]
    while replies:
        replies = [pieces for pieces in replies if next(pieces, None) is not None]
    assert one.ids == other.ids == [*PROMPTS[0], *first]


def test_what_cannot_be_is_refused_at_once_and_changes_nothing(engine):
    session = engine.session()
    for ids, options, message in (
        ([], {}, "the prompt is empty"),
        ([2] * 200, {}, "the prompt has 200 tokens"),
        ([2, 9999], {}, "token 9999 is not in the vocabulary"),
        ([2], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([2], {"stop": ["a", ""]}, "a stop string is empty"),
    ):
        with pytest.raises(UsageError, match=message):
            session.reply(ids, **options)
    with pytest.raises(UsageError, match="the prompt is empty"):
        session.read([])
    assert session.ids == []


def test_an_engine_tells_what_it_is(engine, artifact):
    manifest = json.loads((artifact(engine.runtime) / "manifest.json").read_text())
    assert engine.vocab_size == 512
    assert engine.stop_ids == tuple(manifest["model"]["eos_token_ids"])
    assert engine.limits.context == 128
    assert engine.limits.prompt == (64 if engine.runtime == "static" else 127)
    assert engine.limits.fixed == (engine.runtime == "static")
    messages = [{"role": "user", "content": "a"}]
    assert engine.template.render(messages, add_generation_prompt=True) == engine.tokenizer.render_chat(messages)
    engine.session().read([2, 5])
    assert engine.load_seconds > 0


def test_an_endless_session_says_stop_tokens_too(engine, broken):
    copy, _ = broken
    tokens = said(engine.session(), PROMPTS[0])[1].tokens
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["model"]["eos_token_ids"] = [tokens[3]]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    if (copy / "genai_config.json").exists():
        config = json.loads((copy / "genai_config.json").read_text())
        config["model"]["eos_token_id"] = [tokens[3]]
        (copy / "genai_config.json").write_text(json.dumps(config))
    again = opened_unchecked(copy, engine)
    ended = said(again.session(), PROMPTS[0])[1]
    assert (ended.finish, ended.tokens) == ("stop", tokens[: tokens.index(tokens[3])])
    endless = said(again.session(max_length=len(PROMPTS[0]) + COUNT, endless=True), PROMPTS[0])[1]
    assert (endless.finish, len(endless.tokens)) == ("length", COUNT)


def opened_unchecked(copy, engine):
    """As a caller may who has checked the files."""
    return type(engine)(Artifact.open(copy), threads=1)


def test_a_damaged_artifact_is_refused_when_it_is_opened(broken):
    copy, _ = broken
    graph = next(copy.glob("*.onnx"))
    graph.write_bytes(graph.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="damaged"):
        open_engine(copy)
    with pytest.raises(NoArtifactError, match="there is no such directory") as refused:
        open_engine(copy / "nothing")
    assert isinstance(refused.value, ArtifactError)
    assert refused.value.exit_code == 2


def test_lookup_goes_on_from_turn_to_turn(genai_artifact, reference):
    engine = open_engine(genai_artifact("gemma3_text"), threads=1)
    session, sequence, steps = engine.session(lookup=True), [], 0
    once = PROMPTS[0][1:9]
    for ids in ([2, *once, *once], once, [*once, *PROMPTS[1][1:4]]):
        sequence += ids
        _, stats = said(session, ids, 11)
        assert stats.tokens == reference(sequence, 11)
        sequence += stats.tokens
        assert session.ids == sequence
        steps += stats.steps
    assert 0 < steps < 30  # of 33 tokens, three of which a prompt gave


@pytest.mark.parametrize("end", ["length", "stop", "cancelled"])
def test_a_reply_that_ends_within_a_step_keeps_what_was_said_alone(genai_artifact, reference, monkeypatch, end):
    """Every guess is right, so that a step has several tokens, and the end comes among them."""
    expected = reference(PROMPTS[0], 12)
    whole = [*PROMPTS[0], *expected]
    monkeypatch.setattr(History, "followed", lambda self, most: whole[len(self.ids) : len(self.ids) + most])
    session = spelling(open_engine(genai_artifact("gemma3_text"), threads=1).session(lookup=True))
    stats, push = GenerationStats(), TextStream.push
    if end == "cancelled":
        cancel = session.cancel
        monkeypatch.setattr(
            TextStream, "push", lambda text, token: (cancel() if len(stats.tokens) == 3 else None) or push(text, token)
        )
    options = {"length": {"max_new_tokens": 3}, "stop": {"stop": Syllables().decode(expected)[2:9]}}.get(end, {})
    list(session.reply(PROMPTS[0], stats=stats, **options))
    assert (stats.finish, stats.tokens, stats.steps) == (end, expected[:3], 1)
    sequence = [*PROMPTS[0], *expected[:3]]
    assert session.ids == sequence
    monkeypatch.undo()
    assert said(session, PROMPTS[1][1:5])[1].tokens == reference([*sequence, *PROMPTS[1][1:5]])


def test_a_static_session_counts_what_it_reads(tokenizer):
    runner = Scripted([7, 8, 9, 10, 7, 8], tokenizer.vocab_size)
    runner.contract = SimpleNamespace(vocab_size=tokenizer.vocab_size)
    session = StaticSession(runner, tokenizer, stop_ids=())
    assert int(session.read([2, 3]).argmax()) == 7
    assert int(session.read([4]).argmax()) == 8
    assert (runner.prompts, runner.fed) == ([[2, 3]] * 2, [[4, 4]])  # a token behind it is a step
    assert said(session, [5], 1)[1].prompt_tokens == 4
    assert (runner.prompts, session.ids) == ([[2, 3, 4, 5]] * 2, [2, 3, 4, 5, 9])
