"""The library with guesses and with a sampler: drafted text is plain text, and the largest logits draw as all do."""

import shutil

import numpy as np
import pytest

from gemma_deploy.backends.native import engine as native
from gemma_deploy.backends.native.engine import MOST_TOKENS, NativeSequence
from gemma_deploy.backends.native.graph import plan_in
from gemma_deploy.cli import main
from gemma_deploy.compile import compile_recipe
from gemma_deploy.engine import open_engine
from gemma_deploy.errors import DeployError, UsageError
from gemma_deploy.names import PARAMS
from gemma_deploy.runtime import Sampling, draft
from gemma_deploy.runtime.generate import GenerationStats
from gemma_deploy.runtime.sampling import Largest
from tests.native.test_backend import recipe_of

COUNT = 40  # five windows of 8


@pytest.fixture(autouse=True)
def sure(monkeypatch):
    """Random models are sure of nothing, and guessed one token at a time."""
    monkeypatch.setattr(draft, "LEAST_SURE", 0)


@pytest.fixture(scope="module")
def made(native_library, tmp_path_factory):
    """An artifact in float32, one of the same weights in int8, and one of another model with the same tokens."""
    kinds = {"fp32": ("gemma3_text", "fp32"), "w8a16": ("gemma3_text", "w8a16"), "another": ("gemma2", "fp32")}
    return {
        name: compile_recipe(recipe_of(tmp_path_factory.mktemp(name), *kind), parity=False).path
        for name, kind in kinds.items()
    }


@pytest.fixture(scope="module")
def prompt():
    return [2, *np.random.default_rng(1).integers(3, 500, 30).tolist()]


def said(engine, prompt, sampling=None, count=COUNT, **options):
    """Tokens of a reply, and how they came."""
    session, stats = engine.session(sampling, endless=True, **options), GenerationStats()
    for _ in session.reply(prompt, max_new_tokens=count, stats=stats):
        pass
    return stats.tokens, stats


@pytest.mark.parametrize("smaller", ["itself", "w8a16", "another"])
def test_greedy_text_is_the_same_with_a_draft_past_the_window(made, prompt, smaller):
    """With the model itself all of up to 15 guesses are right: steps get long, and none is taken back."""
    engine = open_engine(made["fp32"], threads=1)
    expected, _ = said(engine, prompt)
    assert len(set(expected)) > 10
    guesses = open_engine(made["fp32" if smaller == "itself" else smaller], threads=1)
    found, stats = said(engine, prompt, draft=guesses)
    assert found == expected
    if smaller == "itself":
        assert stats.steps <= 6  # 5, 6, 7 ... tokens a step
        longer, more = said(engine, prompt, count=150, draft=guesses)
        assert longer[:COUNT] == expected
        assert more.steps < 150 / 8
    else:
        assert COUNT / MOST_TOKENS < stats.steps < COUNT
    if smaller == "another":  # most of what it guessed is taken back
        assert stats.steps > COUNT // 2


def test_a_draft_of_another_back_end_guesses_too(made, prompt, tmp_path):
    """Whichever of both is native: the same weights, so that most guesses are right. Text is that of who decides."""
    recipe = recipe_of(tmp_path, "gemma3_text", "fp32", type="onnxruntime")
    other = open_engine(compile_recipe(recipe, parity=False).path, threads=1)
    ours = open_engine(made["fp32"], threads=1)
    for engine, guesses in ((ours, other), (other, ours)):
        found, stats = said(engine, prompt, draft=guesses)
        assert found == said(engine, prompt)[0]
        assert 0 < stats.steps < COUNT // 2


@pytest.mark.parametrize("top_k", [0, 4])
def test_what_is_drawn_with_a_draft_is_the_same_of_all_logits_and_of_the_largest(made, prompt, monkeypatch, top_k):
    engine, guesses = (open_engine(made[scheme], threads=1) for scheme in ("fp32", "w8a16"))
    sampling = Sampling(0.9, top_k, 0.95, seed=4)
    found, stats = said(engine, prompt, sampling, draft=guesses)
    assert 0 < stats.steps < COUNT
    monkeypatch.setattr(native, "MOST_RANKED", 0)
    assert said(engine, prompt, sampling, draft=guesses)[0] == found


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, 40, 0.9, seed=3), Sampling(2.0, 3, seed=8)])
def test_the_largest_logits_give_the_text_of_all(made, prompt, monkeypatch, sampling):
    engine, whole, calls = open_engine(made["w8a16"], threads=1), NativeSequence._whole, []
    monkeypatch.setattr(NativeSequence, "_whole", lambda *given: calls.append(given) or whole(*given))
    found, _ = said(engine, prompt, sampling, 150)
    assert not calls
    monkeypatch.setattr(native, "MOST_RANKED", 0)
    assert said(engine, prompt, sampling, 150)[0] == found
    assert len(calls) >= 150


def test_too_many_equals_are_looked_at_as_a_whole(made, prompt, monkeypatch):
    """Of the top 3 the third has eight equals and more: none of them may be left out."""
    sequence = native.NativeModel(made["fp32"], (), 1).sequence(100)
    rows = sequence.read(prompt, 3)
    assert isinstance(rows[0], Largest)
    assert len(rows[0].ids) == 3 + native.SPARE
    ranked = type(sequence._model).ranked

    def equal(self, pieces, *, top):
        found = ranked(self, pieces, top=top)
        found.logits[:, 2:] = found.logits[:, 2:3]
        return found

    monkeypatch.setattr(type(sequence._model), "ranked", equal)
    again = native.NativeModel(made["fp32"], (), 1).sequence(100)
    whole = again.read(prompt, 3)
    assert whole.shape == (1, 512)
    assert again.length == len(prompt)
    assert whole[0][rows[0].ids].tolist() == rows[0].logits.tolist()
    several = again.feed(prompt[:4], 3)
    monkeypatch.undo()
    np.testing.assert_array_equal(several, sequence.feed(prompt[:4]))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, 5)])
@pytest.mark.parametrize("token", [0, 77, 511])
def test_a_logit_that_is_no_number_ends_in_a_sentence(made, prompt, tmp_path, sampling, token):
    """One of 512: a row of the table, which the prompt does not look up."""
    assert token not in prompt
    broken = tmp_path / "x"
    shutil.copytree(made["fp32"], broken)
    line = next(one for one in plan_in(broken).splitlines() if one.startswith("matrix") and "embed_tokens" in one)
    facts = dict(pair.split("=") for pair in line.split()[1:])
    panel = token // 16 * int(facts["columns"]) * 16 * 4  # [K][16 rows] of float32
    with (broken / PARAMS).open("r+b") as file:
        file.seek(int(facts["at"]) + panel + token % 16 * 4)
        file.write(np.full(1, np.nan, np.float32).tobytes())
    with pytest.raises(DeployError, match="the model gave nan as its largest logit"):
        said(open_engine(broken, threads=1), prompt, sampling)


def test_run_with_a_draft_and_what_cannot_be_one(made, demo_artifact, tmp_path, capfd):
    words = ["run", str(made["fp32"]), "-p", "the list the list", "-n", "20"]
    assert main(words) == 0
    expected = capfd.readouterr().out
    assert main([*words, "--draft", str(made["w8a16"]), "--stats"]) == 0
    found = capfd.readouterr()
    assert found.out == expected
    assert "a step)" in found.err
    assert main([*words, "--draft", str(demo_artifact)]) == 2
    assert "a static artifact cannot guess for another" in capfd.readouterr().err
    assert main([*words, "--draft", str(made["w8a16"]), "--lookup"]) == 2
    assert "leave one of them out" in capfd.readouterr().err
    engine, smaller = (open_engine(made[scheme], threads=1) for scheme in ("fp32", "w8a16"))
    with pytest.raises(UsageError, match="both guess what comes next"):
        engine.session(lookup=True, draft=smaller)
