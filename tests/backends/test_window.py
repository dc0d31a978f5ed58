"""Caches that hold a window alone: transformers' numbers and tokens with every size of buffer, and what is refused."""

import json
import shutil

import numpy as np
import onnx_ir as ir
import pytest

from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.backends.onnxruntime import genai, window
from gemma_deploy.backends.onnxruntime.exact import exact
from gemma_deploy.backends.onnxruntime.genai import GenaiModel, GenaiSession
from gemma_deploy.backends.onnxruntime.in_place import OrtModel, OrtSequence
from gemma_deploy.backends.onnxruntime.window import most_ahead, resident, window_problems, windowed_layers, windows_of
from gemma_deploy.checkpoint import ModelConfig
from gemma_deploy.cli import main
from gemma_deploy.errors import RecipeError
from gemma_deploy.recipe import Recipe
from gemma_deploy.runtime import Sampling, Tokenizer, draft
from gemma_deploy.runtime.draft import Draft
from gemma_deploy.runtime.generate import GenerationStats
from gemma_deploy.runtime.lookup import History
from gemma_deploy.runtime.speculative import Speculative
from gemma_deploy.testing import TINY_CONFIGS, write_tiny_checkpoint
from gemma_deploy.verifying import verify
from tests.backends.make import off, open_session
from tests.backends.test_decoder import CLOSE, KERNELS
from tests.backends.test_target import LAYERS, compile_tiny, write_recipe
from tests.parity.test_dynamic import failed, gate
from tests.runtime.test_lookup import greedy_of_transformers

WINDOW = 8  # of the tiny models
LOCAL = {"gemma2": [0, 2], "gemma3_text": [0, 1, 3]}  # layers that have one


def held(tokens, capacity):
    """Positions in a buffer by counting: when it is full the oldest go, all that the next window does not need."""
    positions = []
    for position in range(tokens):
        if len(positions) == capacity:
            positions = positions[len(positions) - WINDOW + 1 :]
        positions.append(position)
    return positions


@pytest.mark.parametrize("capacity", [8, 9, 13, 24])
def test_what_a_buffer_holds(capacity):
    for tokens in range(1, 120):
        positions = held(tokens, capacity)
        assert resident(tokens, WINDOW, capacity) == len(positions)
        assert positions[-1] == tokens - 1
        assert min(tokens, WINDOW) <= len(positions) <= min(tokens, capacity)


@pytest.mark.parametrize("capacity", [8, 9, 13, 24])
def test_a_step_that_can_be_taken_back_moves_nothing(capacity):
    for length in range(1, 120):
        firsts = [held(length + more, capacity)[0] for more in range(7)]
        still = [more for more in range(7) if firsts[more] == firsts[0]]
        assert most_ahead(length, WINDOW, capacity, wanted=6) == max(1, len(still) - 1)


def in_buffers(one, graph, tokens, pieces, capacity, optimize=True):
    """Logits after each piece, by position, with buffers of `capacity` positions for windows."""
    windows = windows_of(graph.graph)
    session, found, at = open_session(graph, one.folder, optimize=optimize), {}, 0
    inputs = [value for value in session.get_inputs() if value.name.startswith("past_key_values.")]
    caches = {
        value.name: np.zeros((1, value.shape[1], capacity * (value.name in windows), value.shape[3]), np.float32)
        for value in inputs
    }
    for size in pieces:
        feeds = {"input_ids": np.array([tokens[at : at + size]]), "attention_mask": np.ones((1, at + size), np.int64)}
        logits, *present = session.run(None, feeds | caches)
        caches = dict(zip(caches, present, strict=True))
        at += size
        found[at - 1] = logits[0, 0]
    return found, caches


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text"])
@pytest.mark.parametrize("form", ["fp32", "w8t"])
@pytest.mark.parametrize("capacity", [8, 11, 40])
@pytest.mark.parametrize("pieces", [(20, 6, *[1] * 18), tuple([1] * 44)])
def test_logits_are_the_models_however_small_the_buffer(made, logits_of, tokens, kind, form, capacity, pieces):
    """Exactly with float32 products; buffers keep their size, and other layers' caches grow."""
    one, expected = made(kind, form), logits_of(kind, form, tokens)
    graph = one.graph(windowed=True)
    exact(graph)
    found, caches = in_buffers(one, graph, tokens, pieces, capacity, optimize=form == "fp32")
    assert len(found) == len(pieces)
    for position, logits in found.items():
        assert off(logits, expected[position]) < CLOSE, position
    lengths = [capacity if layer in LOCAL[kind] else 44 for layer in range(one.raw["num_hidden_layers"])]
    assert [cache.shape[2] for cache in caches.values()] == [length for length in lengths for _ in range(2)]
    if form != "fp32" and capacity == 11:
        shipped, _ = in_buffers(one, one.graph(windowed=True), tokens, pieces, capacity)
        assert max(off(logits, expected[position]) for position, logits in shipped.items()) < KERNELS


def test_only_layers_with_a_window_change(made):
    one = made("gemma3_text", "fp32")
    graph, before = one.graph(windowed=True), one.graph()
    attributes = [
        node.attributes.get("sliding_window_cache") for node in graph.graph if node.op_type == "GroupQueryAttention"
    ]
    assert [layer for layer, found in enumerate(attributes) if found is not None] == LOCAL["gemma3_text"]
    assert {name: window for name, window in windows_of(graph.graph).items() if name.endswith("key")} == {
        f"past_key_values.{layer}.key": WINDOW for layer in LOCAL["gemma3_text"]
    }
    assert windows_of(before.graph) == {}
    shapes = {value.name: value.shape for value in (*graph.graph.inputs, *graph.graph.outputs)}
    for layer in range(4):
        ends = [str(shapes[f"{prefix}.{layer}.key"][2]) for prefix in ("past_key_values", "present")]
        plain = ["past_sequence", "total_sequence"]
        assert ends == (["window_cache"] * 2 if layer in LOCAL["gemma3_text"] else plain)
    assert isinstance(graph, ir.Model)


@pytest.fixture(scope="module")
def compiled(once):
    """(generation, dtype) -> a proven artifact with such caches, 128 positions; read only."""

    def get(kind, dtype):
        def make(folder):
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(window, "SLACK", 4)  # so that buffers are full within the gate's few tokens
                compile_tiny(folder, kind, dtype, compile_keys={"cache": "window"}, context=128)

        return once(f"onnxruntime-window-{kind}-{dtype}", make) / "workspace/x"

    return get


@pytest.mark.parametrize(("kind", "dtype"), [("gemma2", "fp32"), ("gemma3_text", "int8")])
def test_an_artifact_is_proven_and_says_which_layers(compiled, kind, dtype):
    artifact = compiled(kind, dtype)
    manifest = Artifact.open(artifact).manifest
    assert manifest.parity.passed is True
    assert manifest.carried_for_the_vendor == ()
    verify(artifact)  # raises where something is wrong
    config = ModelConfig.from_dict({**TINY_CONFIGS[kind], **LAYERS[kind]}, "config.json")
    layers = list(windowed_layers(config))
    assert layers
    ports = {port.name: port.shape[2] for port in manifest.contract.graphs["model"].inputs[2:]}
    assert [name for name, size in ports.items() if size == "window_cache"] == [
        f"past_key_values.{layer}.{part}" for layer in layers for part in ("key", "value")
    ]
    written = json.loads((artifact / "genai_config.json").read_text())["model"]["decoder"]["sliding_window"]
    assert written == {
        "window_size": WINDOW, "slide_key_value_cache": False, "slide_inputs": False, "layers": layers,
    }  # fmt: skip


def test_a_gate_that_looks_past_the_window_sees_a_wrong_one(compiled, tmp_path, monkeypatch):
    monkeypatch.setattr(window, "SLACK", 4)
    copy = shutil.copytree(compiled("gemma2", "fp32"), tmp_path / "x")
    model = ir.load(copy / "model.onnx")
    for node in model.graph:
        if "sliding_window_cache" in node.attributes:
            node.attributes["local_window_size"] = ir.AttrInt64("local_window_size", WINDOW - 2)
    ir.save(model, copy / "model.onnx")
    result = gate(copy)
    assert failed(result) == {"patched = strict", "hf = strict", "hf = shipped"}


@pytest.fixture(scope="module")
def prompt():
    return [2, *map(int, np.random.default_rng(9).integers(3, 500, 39))]


@pytest.mark.parametrize("chunk", [4, 64])
def test_genai_runs_it_and_a_session_goes_on(compiled, prompt, tmp_path, chunk):
    """Pieces of 4 tokens give buffers of 24 positions, which the prompt alone fills."""
    pytest.importorskip("onnxruntime_genai")
    artifact = compiled("gemma2", "fp32")
    copy = shutil.copytree(artifact, tmp_path / "x")
    config = json.loads((copy / "genai_config.json").read_text())
    config["search"]["chunk_size"] = chunk
    (copy / "genai_config.json").write_text(json.dumps(config))
    model, tokenizer = GenaiModel(copy, 1), Tokenizer(copy)
    assert model.window == WINDOW
    session, sequence = GenaiSession(model, tokenizer), []
    for more in (prompt, prompt[1:12], prompt[5:9]):
        stats = GenerationStats()
        list(session.reply(more, max_new_tokens=9, stats=stats))
        sequence += more
        assert stats.tokens == greedy_of_transformers(artifact, sequence, 9)
        sequence += stats.tokens
        assert session.ids == sequence
    short = GenaiSession(model, tokenizer, max_length=4)  # genai has no buffers shorter than a window
    stats = GenerationStats()
    list(short.reply(prompt[:2], max_new_tokens=2, stats=stats))
    assert stats.tokens == greedy_of_transformers(artifact, prompt[:2], 2)


@pytest.fixture
def small_buffers(compiled, tmp_path):
    """An artifact whose buffers in genai have 24 positions."""
    pytest.importorskip("onnxruntime_genai")
    copy = shutil.copytree(compiled("gemma2", "fp32"), tmp_path / "x")
    change_genai(copy, lambda config: config["search"].update(chunk_size=4))
    return copy


def change_genai(artifact, change):
    file = artifact / "genai_config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def replied(session, ids, count):
    stats = GenerationStats()
    list(session.reply(ids, max_new_tokens=count, stats=stats))
    return stats


def test_a_conversation_goes_on_behind_a_stop_token_when_the_buffers_are_full(compiled, small_buffers):
    """The last token of such a reply has been read, and buffers that were full give up nothing they have read."""
    for seed in range(20):  # until a reply has two tokens that differ
        prompt = [2, *map(int, np.random.default_rng(seed).integers(3, 500, 39))]
        right = greedy_of_transformers(compiled("gemma2", "fp32"), prompt, 20)
        if len(set(right)) > 1:
            break
    stop = next(token for token in right if token != right[0])
    kept = right[: right.index(stop)]
    change_genai(small_buffers, lambda config: config["model"].update(eos_token_id=[stop]))
    session, sequence = GenaiSession(GenaiModel(small_buffers, 1), Tokenizer(small_buffers)), [*prompt, *kept]
    stats = replied(session, prompt, 20)
    assert (stats.finish, stats.tokens, session.ids) == ("stop", kept, sequence)
    more = [stop, *prompt[5:9]]
    expected = greedy_of_transformers(compiled("gemma2", "fp32"), [*sequence, *more], 6)
    assert replied(session, more, 6).tokens == expected[: expected.index(stop) if stop in expected else None]


@pytest.mark.parametrize("moment", ["behind the prompt", "between a token's logits and its choice", "after a choice"])
def test_a_conversation_goes_on_after_ctrl_c_whenever_it_comes(compiled, small_buffers, prompt, monkeypatch, moment):
    session = GenaiSession(GenaiModel(small_buffers, 1), Tokenizer(small_buffers))
    refuse, reads = genai._refuse_overflow, []

    def interrupted(generator, where):
        refuse(generator, where)
        reads.append(1)
        if len(reads) == {"behind the prompt": 1, "between a token's logits and its choice": 4}.get(moment):
            raise KeyboardInterrupt

    monkeypatch.setattr(genai, "_refuse_overflow", interrupted)
    pieces = session.reply(prompt, max_new_tokens=20)
    if moment == "after a choice":
        next(pieces)
        pieces.close()
    else:
        with pytest.raises(KeyboardInterrupt):
            list(pieces)
    sequence = session.ids
    assert sequence[: len(prompt)] == prompt
    assert (len(sequence) == len(prompt)) == (moment == "behind the prompt")
    more = prompt[5:12]
    expected = greedy_of_transformers(compiled("gemma2", "fp32"), [*sequence, *more], 6)
    assert replied(session, more, 6).tokens == expected


def test_why_sessions_never_rewind(small_buffers, prompt):
    """Genai 0.18: a token that a rewind dropped comes back, and full buffers refuse to drop what they have read."""
    model = GenaiModel(small_buffers, 1)

    def after(tokens):
        generator = model.generator(Sampling(), 100)
        generator.append_tokens(np.array(tokens, np.int32))
        return generator

    generator = after([*prompt[:10], 400])
    generator.rewind_to(10)
    generator.generate_next_token()
    assert list(generator.get_sequence(0))[10] == 400
    generator = after(prompt)
    generator.generate_next_token()  # chosen, and not read
    generator.rewind_to(len(prompt))
    with pytest.raises(RuntimeError, match="Cannot rewind"):
        generator.rewind_to(len(prompt) - 1)


@pytest.mark.parametrize("guess", ["own", "right", "wrong"])
@pytest.mark.parametrize("slack", [1, 5])
def test_lookup_takes_back_only_what_is_still_there(compiled, prompt, monkeypatch, guess, slack):
    monkeypatch.setattr(window, "SLACK", slack)
    artifact = compiled("gemma2", "fp32")
    expected = greedy_of_transformers(artifact, prompt, 40)
    whole = [*prompt, *expected]
    if guess != "own":
        wrong = guess == "wrong"
        monkeypatch.setattr(
            History, "followed", lambda self, most: [t + wrong for t in whole[len(self.ids) : len(self.ids) + most]]
        )
    model = OrtModel(artifact, Artifact.open(artifact).manifest, 1)
    model.near_tie = 1.0 if guess == "right" else model.near_tie  # many tokens are computed again on their own
    greedy = Speculative(model, prompt, len(whole), guesser=History(prompt))
    tokens = [greedy.first()]
    while len(tokens) < 40:
        tokens += greedy.next()
    assert tokens[:40] == expected
    assert (greedy.guessed > 0) == (slack == 5) or guess == "own"  # buffers of 9 move at every other token


@pytest.mark.parametrize("slack", [1, 5, 40])
def test_a_sequence_goes_back_as_if_nothing_had_been_read(compiled, prompt, monkeypatch, slack):
    monkeypatch.setattr(window, "SLACK", slack)
    artifact = compiled("gemma2", "fp32")
    model = OrtModel(artifact, Artifact.open(artifact).manifest, 1)
    straight, back = OrtSequence(model, 100), OrtSequence(model, 100)
    straight.feed(prompt)
    back.feed(prompt)
    counts = set()
    for token in (*prompt[1:], *prompt[1:15]):
        count = back.ahead(3)
        counts.add(count)
        found = back.feed([token, 7, 9][:count])[0]
        back.length -= count - 1
        expected = straight.feed([token])[-1]
        assert off(found, expected) < CLOSE
    assert counts == ({1} if slack == 1 else {1, 2, 3})
    assert back.length == straight.length == 2 * len(prompt) + 13


def test_what_has_no_window_or_no_room_for_one_is_refused(tmp_path, capsys):
    text = "name: x\nfrontend: {checkpoint: demo, shape: {input_ids: [[64], [128]]}}\nbackend: {dtype: int8}\n"
    with pytest.raises(RecipeError, match=r"cache: got 'short' \(text\), expected one of full, window"):
        Recipe.from_text(text, ["backend.type=onnxruntime", "backend.compile.cache=short"], {})
    with pytest.raises(RecipeError, match="cache: window is for CPUs, and a bf16 graph for GPUs"):
        Recipe.from_text(text, ["backend.type=onnxruntime", "backend.dtype=bf16", "backend.compile.cache=window"], {})
    gemma, gemma2 = (ModelConfig.from_dict(TINY_CONFIGS[kind], "config.json") for kind in ("gemma", "gemma2"))
    assert "this model has none: write full" in window_problems(gemma, 128)[0]
    assert "holds 8 positions, more than the context length 7" in window_problems(gemma2, 7)[0]
    assert window_problems(gemma2, 8) == []
    checkpoint = write_tiny_checkpoint(tmp_path / "checkpoint", "gemma", num_hidden_layers=1)
    assert main(["compile", str(write_recipe(tmp_path, checkpoint, compile_keys={"cache": "window"}))]) == 2
    assert "backend.compile.cache: window is for layers with a sliding window" in " ".join(
        capsys.readouterr().err.split()
    )


@pytest.mark.parametrize("slack", [4, 9])
def test_a_draft_takes_back_what_it_guessed_wrong(compiled, prompt, slack, monkeypatch):
    """Every third guess of a draft that is the target itself is made wrong; the others are right past moved buffers."""
    monkeypatch.setattr(window, "SLACK", slack)
    monkeypatch.setattr(draft, "LEAST_SURE", 0)
    artifact = compiled("gemma2", "fp32")
    model = OrtModel(artifact, Artifact.open(artifact).manifest, 1)
    chosen, guess, calls, coming = Draft._chosen, Draft.guess, [], []

    def misled(self, row, drawn_from):
        token, sure = chosen(self, row, drawn_from)
        calls.append((token + 1) % 400 if len(calls) % 3 == 2 else token)
        return calls[-1], sure

    def watched(self, most):
        first, made = len(calls), guess(self, most)
        wrong = (at for at in range(len(made.tokens)) if (first + at) % 3 == 2)
        coming.append(next(wrong, len(made.tokens)))
        return made

    monkeypatch.setattr(Draft, "_chosen", misled)
    monkeypatch.setattr(Draft, "guess", watched)
    guesser = Draft(model, 100, vocab_size=model.vocab_size, sampler=Sampling().sampler())
    guesser.follow(prompt)
    ahead = Speculative(model, prompt, len(prompt) + 40, guesser=guesser)
    tokens = [ahead.first()]
    while len(tokens) < 40:
        tokens += ahead.next()
    assert tokens[:40] == greedy_of_transformers(artifact, prompt, 40)
    assert ahead.right == sum(coming) > 10
    assert guesser.sequence.length > 2 * 8 + slack


def test_a_draft_that_follows_another_text_begins_anew(compiled, prompt, monkeypatch):
    """What its buffers of a window have given up is not there to go back to: guesses are those of a new draft."""
    monkeypatch.setattr(window, "SLACK", 4)
    monkeypatch.setattr(draft, "LEAST_SURE", 0)
    artifact = compiled("gemma2", "fp32")
    model = OrtModel(artifact, Artifact.open(artifact).manifest, 1)

    def guesser():
        return Draft(model, 100, vocab_size=model.vocab_size, sampler=Sampling().sampler())

    used, told = guesser(), []
    used.follow(prompt)
    used.guess(4)
    for count in (4, 9, 17):  # more and more of the first text is in the second
        other = [*prompt[:count], *prompt[-3:]]
        fresh = guesser()
        for one in (used, fresh):
            one.follow(other)
        told.append((used.guess(4).tokens, fresh.guess(4).tokens))
        used.follow(prompt)
        used.guess(4)
    assert len(prompt) > 8 + 2 * 4
    assert [one for one, _ in told] == [other for _, other in told]
