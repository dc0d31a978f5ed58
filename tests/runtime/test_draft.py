"""A smaller model that guesses: greedy tokens stay the target's own, what is drawn keeps its distribution; refusals."""

from types import SimpleNamespace

import numpy as np
import pytest

from gemma_deploy.cli import main
from gemma_deploy.engine import open_engine
from gemma_deploy.errors import UsageError
from gemma_deploy.runtime import Sampling, draft
from gemma_deploy.runtime.draft import Draft
from gemma_deploy.runtime.generate import GenerationStats
from gemma_deploy.runtime.sampling import Largest, Sampler
from gemma_deploy.runtime.speculative import Guess, Speculative
from tests.runtime.test_lookup import COUNT, greedy_of_transformers, one_by_one, opened

GREEDY = Sampler()
RUNS = 4000


@pytest.fixture(autouse=True)
def sure(monkeypatch):
    """Random models are sure of nothing, and guessed one token at a time."""
    monkeypatch.setattr(draft, "LEAST_SURE", 0)


@pytest.fixture(scope="module")
def prompt():
    return [2, *np.random.default_rng(5).integers(3, 500, 21).tolist()]


def drafted(model, guesser, prompt, count):
    """So many greedy tokens, and who gave them."""
    guesser.follow(prompt)
    ahead = Speculative(model, prompt, len(prompt) + count, guesser=guesser)
    tokens = [ahead.first()]
    while len(tokens) < count:
        tokens += ahead.next()
    return tokens[:count], ahead


@pytest.mark.parametrize("kind", ["itself", "int8", "another"])
def test_tokens_are_transformers_greedy_ones_past_the_window(genai_artifact, prompt, kind):
    target = genai_artifact("gemma3_text")
    smaller = {"itself": target, "int8": genai_artifact("gemma3_text", "int8"), "another": genai_artifact("gemma2")}
    model, other = opened(target), opened(smaller[kind])
    tokens, ahead = drafted(model, Draft(other, 100, vocab_size=model.vocab_size, sampler=GREEDY), prompt, COUNT)
    assert tokens == greedy_of_transformers(target, prompt, COUNT)
    assert ahead.guessed > 0
    if kind == "itself":
        assert ahead.right == ahead.guessed
        assert ahead.steps < COUNT // 3
    if kind == "another":
        assert ahead.right < ahead.guessed < 2 * ahead.steps + 8  # and it asks for less than at first


def test_its_cache_holds_the_tokens_that_were_right(genai_artifact, prompt, monkeypatch):
    """Its guesses are what it says to the sequence so far when it reads that from the beginning, at every step."""
    model, other = opened(genai_artifact("gemma3_text")), opened(genai_artifact("gemma3_text", "int8"))
    guess, seen = Draft.guess, []

    def watched(self, most):
        made = guess(self, most)
        seen.append(([*self._ids], made.tokens))
        return made

    monkeypatch.setattr(Draft, "guess", watched)
    drafted(model, Draft(other, 100, vocab_size=model.vocab_size, sampler=GREEDY), prompt, COUNT)
    assert len(seen) > 5
    assert any(len(tokens) > 1 for _, tokens in seen)
    for ids, tokens in seen:
        assert tokens == one_by_one(other, ids, len(tokens))


def test_it_stops_guessing_where_it_is_not_sure(genai_artifact, prompt, monkeypatch):
    model = opened(genai_artifact("gemma3_text"))
    monkeypatch.setattr(draft, "LEAST_SURE", 1.1)
    guesser = Draft(model, 100, vocab_size=model.vocab_size, sampler=GREEDY)
    guesser.follow(prompt)
    assert len(guesser.guess(7).tokens) == 1
    monkeypatch.setattr(draft, "LEAST_SURE", 0)
    assert len(guesser.guess(7).tokens) == 4


def test_a_shorter_context_guesses_no_more_at_its_end(genai_artifact, prompt):
    model = opened(genai_artifact("gemma3_text"))
    guesser = Draft(model, 30, vocab_size=model.vocab_size, sampler=GREEDY)
    tokens, ahead = drafted(model, guesser, prompt, COUNT)
    assert tokens == one_by_one(model, prompt, COUNT)
    assert 0 < ahead.right <= 30 - len(prompt) + 1
    assert guesser.sequence.length <= 30


@pytest.mark.parametrize("rows", [300, 700])
def test_rows_that_one_vocabulary_has_more_are_padding(genai_artifact, rows):
    """A Gemma 3 of 4 billion weights has 64 rows more than one of 270 million, and the same tokens."""
    model = opened(genai_artifact("gemma3_text"))
    row = np.random.default_rng(3).normal(size=rows).astype(np.float32)
    row[-1] = 9
    expected = np.exp(row[:500] - row[:500].max())
    for temperature in (0, 1):
        drawn_from = []
        guesser = Draft(model, 30, vocab_size=500, sampler=Sampler(temperature, seed=1))
        token, sure = guesser._chosen(row.copy(), drawn_from)
        assert 0 <= token < min(rows, 500)
        assert sure == pytest.approx(expected[token] / expected.sum(), rel=1e-5)
        assert [len(one.weights) for one in drawn_from] == [500] * temperature


def largest(row, top):
    order = np.argsort(-row, kind="stable")[:top]
    return Largest(order.astype(np.int32), row[order], float(np.log(np.exp(row).sum())))


class Chain:
    """In the place of a model and its cache: logits depend on the last token alone."""

    path, stop_ids, context_length, vocab_size, most_tokens = None, frozenset(), 100, 4, 8

    def __init__(self, logits, short=False):
        self.logits, self.length, self.short = logits, 0, short

    def sequence(self, room):
        return Chain(self.logits, self.short)

    def ahead(self, wanted):
        return wanted

    def read(self, tokens, top=0):
        self.length += len(tokens)
        rows = self.logits[list(tokens)].copy()
        return [largest(row, top) for row in rows] if top and self.short else rows

    feed = read


class Certain:
    """Guesses that were not drawn."""

    def follow(self, ids):
        self.ids = list(ids)

    def prepare(self):
        pass

    def append(self, token):
        self.ids.append(token)

    def guess(self, most):
        return Guess([(self.ids[-1] + 1) % 4, 2][:most])

    def learn(self, guessed, right):
        pass


@pytest.mark.parametrize(
    ("top_k", "top_p", "short"),
    [(0, 1.0, ()), (3, 1.0, ()), (0, 0.8, ()), (3, 1.0, "both"), (3, 0.9, "both"), (3, 1.0, "own"), (2, 1.0, "other")],
)
@pytest.mark.parametrize("guesses", ["drawn", "certain"])
def test_what_is_drawn_keeps_the_distribution(guesses, top_k, top_p, short):
    """Three tokens of a chain, chi-squared against the product of its own probabilities."""
    own, other = 1.5 * np.random.default_rng(11).normal(size=(2, 4, 4)).astype(np.float32)
    sampler = Sampler(1.3, top_k, top_p, seed=7)
    found, right = np.zeros((4, 4, 4)), 0
    for _ in range(RUNS):
        smaller = Chain(other, short in ("both", "other"))
        guesser = Certain() if guesses == "certain" else Draft(smaller, 100, vocab_size=4, sampler=sampler)
        guesser.follow([0])
        model = Chain(own, short in ("both", "own"))
        ahead = Speculative(model, [0], 100, guesser=guesser, sampler=sampler)
        tokens = [ahead.first()]
        while len(tokens) < 3:
            tokens += ahead.next()
        found[tuple(tokens[:3])] += 1
        right += ahead.right
    assert right > RUNS // 10
    chances = np.exp(sampler.filtered(own))
    chances /= chances.sum(axis=1, keepdims=True)
    expected = RUNS * chances[0][:, None, None] * chances[:, :, None] * chances[None]
    assert not found[expected == 0].any()
    likely = expected > 5
    squares = ((found - expected)[likely] ** 2 / expected[likely]).sum()
    degrees = likely.sum() - 1
    assert degrees > 5
    assert squares < degrees + 4 * np.sqrt(2 * degrees)  # four standard deviations


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_replies_of_one_session_follow_each_other(genai_artifact, temperature):
    engine = open_engine(genai_artifact("gemma3_text"), threads=1)
    smaller = open_engine(genai_artifact("gemma3_text", "int8"), threads=1)
    with_draft, looking = engine.session(Sampling(temperature, seed=3), draft=smaller), engine.session(lookup=True)
    read = 0
    for text in ("The list", " of the", " and then"):
        ids, stats = engine.tokenizer.encode(text), GenerationStats()
        said = "".join(with_draft.reply(ids, max_new_tokens=11, stats=stats))
        read += len(ids) + len(stats.tokens)
        assert len(with_draft.ids) == read
        assert 0 < stats.steps <= 11
        if temperature == 0:
            assert said == "".join(looking.reply(ids, max_new_tokens=11))


def test_run_with_a_draft(genai_artifact, demo_artifact, capfd):
    artifact, smaller = genai_artifact("gemma3_text"), genai_artifact("gemma3_text", "int8")
    words = ["run", str(artifact), "-p", "the list the list", "-n", "20"]
    assert main(words) == 0
    expected = capfd.readouterr().out
    assert main([*words, "--draft", str(smaller), "--stats"]) == 0
    found = capfd.readouterr()
    assert found.out == expected
    assert "a step)" in found.err
    drawn = [*words, "--temperature", "0.8", "--seed", "4", "--draft", str(smaller)]
    assert main(drawn) == 0
    first = capfd.readouterr().out
    assert main(drawn) == 0
    assert capfd.readouterr().out == first
    assert main([*words, "--draft", str(demo_artifact)]) == 2
    assert "a static artifact cannot guess for another" in capfd.readouterr().err
    assert main([*words, "--draft", str(smaller), "--lookup"]) == 2
    said = capfd.readouterr().err
    assert "both guess what comes next" in said
    assert "leave one of them out" in said
    assert main(["run", str(demo_artifact), "-p", "x", "--draft", str(smaller)]) == 2
    assert "this artifact is static" in capfd.readouterr().err


def test_another_vocabulary_is_refused(genai_artifact):
    engine = open_engine(genai_artifact("gemma3_text"), threads=1)
    smaller = open_engine(genai_artifact("gemma3_text", "int8"), threads=1)
    known = smaller.tokenizer.backend.get_vocab()
    changed = {**known, next(iter(known)): 12345}
    smaller.__dict__["tokenizer"] = SimpleNamespace(backend=SimpleNamespace(get_vocab=lambda: changed))
    with pytest.raises(UsageError, match="1 tokens have another id or none"):
        engine.session(draft=smaller)
