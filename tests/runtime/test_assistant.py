"""Drafters of Gemma 4: transformers' class and its candidate generator, exact greedy tokens, refusals."""

import functools
import json

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationConfig
from transformers.generation.candidate_generator import SinglePositionMultiTokenCandidateGenerator

from gemma_deploy.architectures.drafting import TOKEN_ORDERING
from gemma_deploy.backends.onnxruntime import drafter_proof
from gemma_deploy.backends.onnxruntime.assistant import Assistant
from gemma_deploy.backends.onnxruntime.drafter import _Drafter
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.cli import main
from gemma_deploy.compile import compile_recipe
from gemma_deploy.engine import open_engine
from gemma_deploy.errors import CheckpointError, GateError, NotBuiltError, RecipeError, UsageError
from gemma_deploy.parity.drafter import all_reading
from gemma_deploy.recipe import Recipe
from gemma_deploy.runtime import Sampling, draft
from gemma_deploy.runtime.sampling import Sampler
from gemma_deploy.runtime.speculative import Guess, Speculative
from gemma_deploy.testing import TINY_CONFIGS, TINY_PER_LAYER, write_tiny_assistant
from tests.runtime.make import compile_tiny, write_tokenizer
from tests.runtime.test_draft import RUNS, Chain

E2B = {**TINY_PER_LAYER, "num_global_key_value_heads": None}
TARGETS = {"31b": ("gemma4_text", {}), "12b": ("gemma4_unified_text", {}), "e2b": ("gemma4_text", E2B)}
COUNT = 32  # with the prompt seven windows of 8


def raw_of(name):
    kind, changes = TARGETS[name]
    return TINY_CONFIGS[kind] | changes


def recipe_of(checkpoint, folder, backend=None, **frontend):
    content = {
        "name": "drafter",
        "frontend": {"checkpoint": str(checkpoint), "shape": {"input_ids": [[64], [128]]}, **frontend},
        "backend": {"type": "onnxruntime", "dtype": "fp32", **(backend or {})},
        "workspace": {"path": str(folder / "workspace")},
    }
    (folder / "recipe.json").write_text(json.dumps(content))
    return Recipe.load(folder / "recipe.json")


@pytest.fixture(autouse=True)
def sure(monkeypatch):
    """Random models are sure of nothing, and guessed one token at a time."""
    monkeypatch.setattr(draft, "LEAST_SURE", 0)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Name of a target -> (its checkpoint, its artifact, its drafter's checkpoint, that one's artifact), made once."""

    @functools.cache
    def get(name, ordered=False):
        folder = tmp_path_factory.mktemp(name)
        kind, changes = TARGETS[name]
        target = compile_tiny(folder / "target", kind, {"type": "onnxruntime", "dtype": "fp32"}, **changes)
        checkpoint = write_tiny_assistant(folder / "drafter", raw_of(name), ordered=ordered)
        write_tokenizer(checkpoint)
        drafter = compile_recipe(recipe_of(checkpoint, folder))
        assert drafter.parity.passed
        exact = {line.comparison for line in drafter.parity.lines if line.name == "relative error"}
        assert exact == {"hf = strict", "hf = shipped"}
        return folder / "target" / "checkpoint", target, checkpoint, drafter.path

    return get


@pytest.fixture(scope="module")
def prompt():
    return [2, *np.random.default_rng(5).integers(3, 500, 21).tolist()]


def stock_drafter(checkpoint):
    with all_reading(AutoConfig.from_pretrained(checkpoint).text_config):
        return AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager", dtype=torch.float32).eval()


def stock(checkpoint):
    return AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager", dtype=torch.float32).eval()


def stock_guesses(target, drafter, ids, count):
    """Tokens that transformers' class guesses behind `ids`, whose last token the target has not read."""
    read = torch.tensor([ids[:-1]])
    cache = DynamicCache()  # of whole layers
    with torch.no_grad():
        out = target(read, past_key_values=cache, use_cache=True, output_hidden_states=True)
        own = [layer for layer in cache.layers if layer.keys is not None]
        shared = {kind: (own[i].keys, own[i].values) for i, kind in enumerate(target.config.layer_types[: len(own)])}
        state, token, found = out.hidden_states[-1][:, -1:], torch.tensor([[ids[-1]]]), []
        for _ in range(count):
            made = drafter(
                inputs_embeds=torch.cat([target.get_input_embeddings()(token), state], dim=-1),
                position_ids=torch.tensor([[len(ids) - 1]]),
                attention_mask=torch.ones(1, len(ids)),
                shared_kv_states=shared,
            )
            token, state = made.logits.argmax(-1), made.last_hidden_state
            found.append((int(token), made.logits[0, 0].numpy(), state[0, 0].numpy()))
    return found


def greedy(model, prompt, count):
    made = model.generate(torch.tensor([prompt]), max_new_tokens=count, min_new_tokens=count, do_sample=False)
    return made[0, len(prompt) :].tolist()


def joined(target, drafter):
    """The graphs of both, opened."""
    engine, other = open_engine(target, threads=1), open_engine(drafter, threads=1)
    session = engine.session(draft=other)
    return session.model, session._assistant


@pytest.mark.parametrize("right", [0, 1, 2, 9], ids=["wrong", "first", "two", "all"])
@pytest.mark.parametrize(
    ("name", "ordered"),
    [("31b", False), ("e2b", True), pytest.param("12b", True, marks=pytest.mark.slow),
     pytest.param("e2b", False, marks=pytest.mark.slow)],
)  # fmt: skip
def test_guesses_are_transformers_and_greedy_text_is_the_targets(made, prompt, monkeypatch, name, ordered, right):
    """Whatever share of the guesses is right: random drafters guess nothing, so that some are put right for them."""
    checkpoint, target, own, drafter = made(name, ordered)
    theirs, reference = stock(checkpoint), stock_drafter(own)
    whole = [*prompt, *greedy(theirs, prompt, COUNT)]
    model, guesser = joined(target, drafter)
    guess, seen, compared = Assistant.guess, [], 0

    def watched(self, most):
        made = guess(self, most)
        seen.append(([*self._ids], list(made.tokens), most))
        coming = whole[len(self._ids) :][:right]
        return Guess([*coming, *made.tokens][: max(1, most)])

    monkeypatch.setattr(Assistant, "guess", watched)
    ahead = Speculative(model, prompt, len(whole) + 1, guesser=guesser)
    guesser.follow(prompt, ahead.sequence)
    tokens = [ahead.first()]
    while len(tokens) < COUNT:
        tokens += ahead.next()
    assert tokens[:COUNT] == whole[len(prompt) :]
    assert ahead.right >= min(right, 1) * 5
    for ids, guessed, most in seen[:: max(1, len(seen) // 4)]:
        assert len(guessed) > 0 or most < 1
        expected = stock_guesses(theirs, reference, ids, len(guessed))
        assert guessed == [token for token, _, _ in expected]
        compared += len(guessed)
    assert compared >= 5


def test_logits_and_states_are_transformers(made, prompt, monkeypatch):
    checkpoint, target, own, drafter = made("e2b", True)
    model, guesser = joined(target, drafter)
    expected = stock_guesses(stock(checkpoint), stock_drafter(own), prompt, 4)
    ahead = Speculative(model, prompt[:-1], 64, guesser=guesser)
    ahead.sequence.read(prompt[:-1])
    guesser.follow(prompt, ahead.sequence)
    step, found = type(guesser.model).step, []
    monkeypatch.setattr(type(guesser.model), "step", lambda *args: found.append(step(*args)) or found[-1])
    assert list(guesser.guess(4).tokens) == [token for token, _, _ in expected]
    for (logits, state), (_, right, following) in zip(found, expected, strict=True):
        # measured 1.3e-6 and 9e-7 of the largest
        assert np.abs(logits - right).max() <= 1e-5 * max(1, np.abs(right).max())
        assert np.abs(state - following).max() <= 1e-5 * max(1, np.abs(following).max())


def test_the_first_guesses_are_those_of_the_candidate_generator(made, prompt):
    """transformers' own, with what its own target hands over; behind a wrong guess it reads a key too many."""
    checkpoint, target, own, drafter = made("e2b", True)
    theirs, reference = stock(checkpoint), stock_drafter(own)
    reference.generation_config.num_assistant_tokens = 4
    config = GenerationConfig(max_length=64)
    candidates = SinglePositionMultiTokenCandidateGenerator(reference, theirs.get_input_embeddings(), config)
    with torch.no_grad():
        out = theirs(torch.tensor([prompt[:-1]]), output_hidden_states=True, return_shared_kv_states=True)
    mask = {"attention_mask": torch.ones(1, len(prompt))}
    ids, _ = candidates.get_candidates(torch.tensor([prompt]), mask, out, is_first_iteration=False, n_last_matches=0)
    model, guesser = joined(target, drafter)
    ahead = Speculative(model, prompt[:-1], 64, guesser=guesser)
    ahead.sequence.read(prompt[:-1])
    guesser.follow(prompt, ahead.sequence)
    assert list(guesser.guess(4).tokens) == ids[0, len(prompt) :].tolist()


class Draws:
    """In the place of a drafter and its model: logits of a chain."""

    path, context_length = None, 100

    def __init__(self, logits):
        self.logits = logits

    def step(self, entering, sequence, positions):
        return self.logits[int(entering[0])].copy(), np.zeros(1, np.float32)


class Target(Chain):
    """A chain that hands over the number of a token as its embedding."""

    near_tie, vocab_size = 0, 4

    def embedded(self, token):
        return np.array([token], np.float32)

    def state(self, position):
        return np.zeros(1, np.float32)


def test_what_is_drawn_keeps_the_distribution():
    """Three tokens of a chain, chi-squared against the product of its own probabilities."""
    own, other = 1.5 * np.random.default_rng(11).normal(size=(2, 4, 4)).astype(np.float32)
    sampler = Sampler(1.3, seed=7)
    found, right = np.zeros((4, 4, 4)), 0
    for _ in range(RUNS):
        target = Target(own)
        guesser = Assistant(Draws(other), target, sampler=sampler)
        ahead = Speculative(target, [0], 100, guesser=guesser, sampler=sampler, sequence=target)
        guesser.follow([0], target)
        tokens = [ahead.first()]
        while len(tokens) < 3:
            tokens += ahead.next()
        found[tuple(tokens[:3])] += 1
        right += ahead.right
    assert right > RUNS // 10
    chances = np.exp(sampler.filtered(own))
    chances /= chances.sum(axis=1, keepdims=True)
    expected = RUNS * chances[0][:, None, None] * chances[:, :, None] * chances[None]
    likely = expected > 5
    squares = ((found - expected)[likely] ** 2 / expected[likely]).sum()
    degrees = likely.sum() - 1
    assert degrees > 5
    assert squares < degrees + 4 * np.sqrt(2 * degrees)  # four standard deviations


def test_a_drafter_of_a_shorter_context_guesses_no_more_at_its_end(made, tmp_path, monkeypatch):
    """The caches that it reads have room for more positions than its rotary tables have rows."""
    _, target, own, _ = made("31b")
    drafter = compile_recipe(recipe_of(own, tmp_path, shape={"input_ids": [[16], [32]]})).path
    engine, guess, seen = open_engine(target, threads=1), Assistant.guess, []

    def watched(self, most):
        made = guess(self, most)
        seen.append((self._sequence.length, len(made.tokens)))
        return made

    monkeypatch.setattr(Assistant, "guess", watched)
    other, ids = open_engine(drafter, threads=1), engine.tokenizer.encode("the list")
    session, plain = engine.session(draft=other, endless=True), engine.session(lookup=True, endless=True)
    said = "".join(session.reply(ids, max_new_tokens=48))
    assert said == "".join(plain.reply(ids, max_new_tokens=48))
    assert any(count for place, count in seen if place < 32)
    assert any(place >= 32 for place, _ in seen)
    assert not any(count for place, count in seen if place >= 32)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_replies_of_one_session_follow_each_other(made, temperature):
    _, target, _, drafter = made("31b")
    engine = open_engine(target, threads=1)
    guided = engine.session(Sampling(temperature, seed=3), draft=open_engine(drafter, threads=1))
    plain = engine.session(lookup=True)
    for text in ("The list", " of the", " and then"):
        ids = engine.tokenizer.encode(text)
        said = "".join(guided.reply(ids, max_new_tokens=9))
        if temperature == 0:
            assert said == "".join(plain.reply(ids, max_new_tokens=9))


def test_run_with_a_drafter(made, capfd):
    _, target, _, drafter = made("31b")
    words = ["run", str(target), "-p", "the list the list", "-n", "12"]
    assert main(words) == 0
    expected = capfd.readouterr().out
    assert main([*words, "--draft", str(drafter), "--stats"]) == 0
    found = capfd.readouterr()
    assert found.out == expected
    assert "a step)" in found.err
    assert main(["run", str(drafter), "-p", "x"]) == 2
    said = capfd.readouterr().err
    assert "this artifact is a drafter: it guesses for another model" in said
    assert f"run TARGET --draft {drafter}" in said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"backbone": 80}, "hidden states of 64 channels; the drafter reads 80"),
        ({"vocab_size": 544}, "a vocabulary of 512; the drafter has 544"),
        ({"sliding_window": 16}, "window 8; the drafter has 16"),
        ({"num_key_value_heads": 4}, "sliding_attention: 2 key heads of 32; the drafter reads 4 of 32"),
        ({"global_head_dim": 32}, "full_attention: 1 key heads of 64; the drafter reads 1 of 32"),
    ],
)
def test_a_drafter_of_another_model_is_refused(made, tmp_path, changes, said):
    _, target, _, _ = made("31b")
    raw = raw_of("31b") | {"hidden_size": changes.get("backbone", 64)}
    own = {key: value for key, value in changes.items() if key != "backbone"}
    checkpoint = write_tiny_assistant(tmp_path / "drafter", raw, **own)
    drafter = compile_recipe(recipe_of(checkpoint, tmp_path), parity=False).path
    engine = open_engine(target, threads=1)
    with pytest.raises(UsageError, match="the drafter guesses for another model") as refused:
        engine.session(draft=open_engine(drafter, threads=1))
    assert said in str(refused.value)


def test_another_tokenizer_and_caches_of_a_window_are_refused(made, tmp_path):
    _, target, checkpoint, drafter = made("31b")
    windowed = compile_tiny(tmp_path / "windowed", "gemma4_text", {
        "type": "onnxruntime", "dtype": "fp32", "compile": {"cache": "window"}})  # fmt: skip
    with pytest.raises(UsageError, match="a drafter reads keys and values of all positions"):
        open_engine(windowed, threads=1).session(draft=open_engine(drafter, threads=1))
    backend = {"type": "onnxruntime", "dtype": "int8"}
    recipe = {"frontend": {"quantize": {"type": "w8a16+kv8"}}, "dataset": {"name": "c4:2", "seqlen": 64}}
    coded = compile_tiny(tmp_path / "coded", "gemma4_text", backend, recipe=recipe)
    with pytest.raises(UsageError, match="a drafter reads keys and values as floats"):
        open_engine(coded, threads=1).session(draft=open_engine(drafter, threads=1))
    write_tokenizer(tmp_path / "other", more=("<one_more>",))
    for file in (tmp_path / "other").iterdir():
        (tmp_path / "copy" / file.name).parent.mkdir(exist_ok=True)
        (tmp_path / "copy" / file.name).write_bytes(file.read_bytes())
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "copy" / name).write_bytes((checkpoint / name).read_bytes())
    other = compile_recipe(recipe_of(tmp_path / "copy", tmp_path), parity=False).path
    with pytest.raises(UsageError, match="the vocabulary of the draft is another"):
        open_engine(target, threads=1).session(draft=open_engine(other, threads=1))


def keeps_the_last_position(monkeypatch):
    monkeypatch.setattr(_Drafter, "_rotary", lambda self, layer: super(_Drafter, self)._rotary(layer))


def window_is_a_models(monkeypatch):
    monkeypatch.setattr(_Drafter, "_grouped", lambda self, layer: super(_Drafter, self)._grouped(layer))


def others_lie_lower(monkeypatch):
    monkeypatch.setattr("gemma_deploy.backends.onnxruntime.drafter.WORST", 2.0)


@pytest.mark.parametrize("broken", [keeps_the_last_position, window_is_a_models, others_lie_lower])
def test_the_gate_sees_what_is_wrong(made, tmp_path, monkeypatch, broken):
    _, _, checkpoint, _ = made("e2b", True)
    broken(monkeypatch)
    with pytest.raises(GateError) as failed:
        compile_recipe(recipe_of(checkpoint, tmp_path))
    assert "hf = strict: relative error" in str(failed.value)


@pytest.mark.parametrize("prefill", ["lean", pytest.param("fast", marks=pytest.mark.slow)])
def test_int8_drafters_are_proven_and_guess(made, tmp_path, prompt, prefill):
    _, target, own, _ = made("e2b", True)
    result = compile_recipe(recipe_of(own, tmp_path, {"dtype": "int8", "compile": {"prefill": prefill}}))
    lines = {(line.comparison, line.name) for line in result.parity.lines}
    assert {("hf w8a16 = strict", "relative error"), ("hf = shipped", "mean KL")} <= lines
    ledger = [entry["what"] for entry in json.loads((result.path / "manifest.json").read_text())["ledger"]]
    assert "what joins it to its model is float16, computed in float32" in ledger
    assert not any("embedding scale" in one or "prefill" in one for one in ledger)
    assert "run TARGET --draft" in (result.path / "report.html").read_text()
    engine = open_engine(target, threads=1)
    session = engine.session(draft=open_engine(result.path, threads=1))
    assert main(["inspect", str(result.path)]) == 0
    text = engine.tokenizer.decode(prompt[1:])
    said = "".join(session.reply(engine.tokenizer.encode(text), max_new_tokens=8))
    assert said == "".join(engine.session(lookup=True).reply(engine.tokenizer.encode(text), max_new_tokens=8))


@pytest.mark.parametrize(
    ("backend", "frontend", "said"),
    [
        ({"type": "tvm_vacc"}, {}, "backend.type: tvm_vacc is not built for drafters"),
        ({"dtype": "bf16"}, {}, "bf16 is not built for drafters"),
        ({"dtype": "int8"}, {"quantize": {"type": "w4a16_rtn"}}, "w4a16_rtn is not built for drafters"),
        ({"compile": {"cache": "window"}}, {}, "backend.compile.cache: window means nothing to a drafter"),
        ({"compile": {"logits": "all"}}, {}, "backend.compile.logits: all means nothing to a drafter"),
    ],
)
def test_what_is_not_built_of_drafters_is_said(tmp_path, backend, frontend, said):
    checkpoint = write_tiny_assistant(tmp_path / "drafter", raw_of("31b"))
    with pytest.raises(RecipeError) as refused:
        compile_recipe(recipe_of(checkpoint, tmp_path, backend, **frontend))
    assert said in str(refused.value)


def test_a_drafter_is_no_model_of_its_own(tmp_path):
    checkpoint = write_tiny_assistant(tmp_path / "drafter", raw_of("31b"))
    with pytest.raises(NotBuiltError, match=r"is a drafter \(Gemma 4 assistant\): it guesses for another model"):
        Checkpoint.open(checkpoint)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"text_config": {"num_kv_shared_layers": 2}}, "num_kv_shared_layers: got 2, expected 4: all layers"),
        ({"text_config": {"enable_moe_block": True}}, "enable_moe_block: got True, expected 0 or false"),
        ({"text_config": {"hidden_size_per_layer_input": 32}}, "hidden_size_per_layer_input: got 32, expected 0"),
        ({"text_config": {"model_type": "gemma3_text"}}, "an object whose model_type is gemma4_text"),
        ({"num_centroids": 30}, "num_centroids: got 30, expected a divisor of vocab_size 512"),
        ({"centroid_intermediate_top_k": 33}, "centroid_intermediate_top_k: got 33, expected 32 at most"),
        ({"backbone_hidden_size": 0}, "backbone_hidden_size: got 0, expected a whole number"),
        ({"use_ordered_embeddings": 1}, "use_ordered_embeddings: got 1, expected true or false"),
        ({"backbone_hidden_size": 80}, "pre_projection.weight is [96, 128], config.json calls for [96, 160]"),
    ],
)
def test_configs_that_are_wrong_are_told(tmp_path, changes, said):
    checkpoint = write_tiny_assistant(tmp_path / "drafter", raw_of("31b"), ordered=True)
    raw = json.loads((checkpoint / "config.json").read_text())
    text = {**raw["text_config"], **changes.get("text_config", {})}
    (checkpoint / "config.json").write_text(json.dumps(raw | changes | {"text_config": text}))
    with pytest.raises(CheckpointError) as refused:
        Checkpoint.open(checkpoint, encoder=True)
    assert said in str(refused.value)


def test_an_order_that_lacks_a_token_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    checkpoint = write_tiny_assistant(tmp_path / "drafter", raw_of("31b"), ordered=True)
    tensors = load_file(checkpoint / "model.safetensors")
    tensors[TOKEN_ORDERING][5] = tensors[TOKEN_ORDERING][6]
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"masked_embedding\.token_ordering is no order of 512 tokens"):
        Checkpoint.open(checkpoint, encoder=True)


def test_the_limit_of_the_gate_is_that_of_float32():
    assert drafter_proof.EXACT == 1e-5
