"""`backend.compile.logits: all`: proven for every position, and run by genai's Engine, which needs them."""

import json
import shutil

import numpy as np
import pytest

from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.backends.onnxruntime import source
from gemma_deploy.backends.onnxruntime.genai import GenaiModel, GenaiSession
from gemma_deploy.backends.onnxruntime.in_place import OrtModel
from gemma_deploy.cli import main
from gemma_deploy.runtime import Tokenizer
from gemma_deploy.runtime.generate import GenerationStats
from gemma_deploy.testing import write_tiny_checkpoint
from gemma_deploy.verifying import verify
from tests.backends.test_target import LAYERS, compile_tiny, write_recipe
from tests.calibration.make import write_tokenizer
from tests.parity.breaking import Graph
from tests.parity.test_dynamic import PARTS, failed, gate
from tests.runtime.test_lookup import greedy_of_transformers, looked_up

EVERY = "shipped = its parts for every token of a prompt"
KINDS = {"gemma2": ("fp32", {}), "gemma3_text": ("int8", {}), "gemma": ("int8", {"head": "screened"})}
CONTEXT, COUNT = 128, 14


@pytest.fixture(scope="session")
def compiled(once):
    """(generation, cache) -> a proven artifact with the logits of every token; read only."""

    def get(kind, cache="full"):
        dtype, keys = KINDS[kind]

        def make(folder):
            keys_of_all = {**keys, "logits": "all", "cache": cache}
            compile_tiny(folder, kind, dtype, compile_keys=keys_of_all, context=CONTEXT)

        return once(f"onnxruntime-logits-{kind}-{cache}", make) / "workspace/x"

    return get


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(6)
    return [[2, *rng.integers(3, 500, length - 1).tolist()] for length in (5, 23, 12)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_artifact_is_proven_at_every_position_and_says_what_it_is_not_for(compiled, kind):
    manifest = Artifact.open(compiled(kind)).manifest
    assert manifest.parity.passed is True
    compared = {line.comparison for line in manifest.parity.lines}
    assert (EVERY in compared, PARTS in compared) == (True, False)
    verify(compiled(kind))
    contract = manifest.contract
    (logits,) = (port for port in contract.graphs["model"].outputs if port.name == "logits")
    assert (logits.shape, contract.logits) == (("batch", "sequence", 512), "all")
    assert not any("logits only" in entry.what for entry in manifest.ledger)
    assert manifest.carried_for_the_vendor == ()
    said = " ".join(contract.not_for)
    assert "2048 bytes" in said
    assert "Engine" not in said
    assert "padded on the left in onnxruntime-genai's Generator" in said


def test_other_artifacts_are_not_for_the_engine_and_keep_their_bytes(tmp_path):
    """The key's default is what a recipe without it gives, byte for byte."""
    checkpoint = write_tiny_checkpoint(tmp_path / "checkpoint", "gemma2", **LAYERS["gemma2"])
    write_tokenizer(checkpoint)
    made = []
    for keys in ({}, {"logits": None}, {"logits": "last"}):
        recipe = str(write_recipe(tmp_path, checkpoint, "fp32", compile_keys=keys))
        out = tmp_path / f"out{len(made)}"
        assert main(["compile", recipe, "--no-parity", "--out", str(out)]) == 0
        made.append([(out / name).read_bytes() for name in ("model.onnx", "params.safetensors", "genai_config.json")])
    assert made[0] == made[1] == made[2]
    contract = json.loads((out / "manifest.json").read_text())["contract"]
    assert contract["logits"] == "last"
    assert "Engine, which wants the logits of every token (backend.compile.logits: all)" in contract["not_for"][0]
    assert "several new tokens of several rows" in contract["not_for"][-1]


def test_logits_of_other_tokens_fail_the_gate(compiled, tmp_path):
    """Every position's own are right, and stand a place too far."""
    artifact = shutil.copytree(compiled("gemma2"), tmp_path / "x")
    with Graph(artifact, "model") as graph:
        node = next(node for node in graph.graph.node if node.output[0] == "place")
        graph.replace_constant(node, 1, lambda one: one + 1)
    assert failed(gate(artifact)) == {EVERY}


def test_as_many_positions_are_compared_as_fit(compiled, monkeypatch):
    """Of a large vocabulary, so that the proof stays in bounded memory; two at least, which shows their order."""
    seen, whole = [], source.whole_logits
    monkeypatch.setattr(source, "whole_logits", lambda *given: seen.append(whole(*given)) or seen[-1])
    monkeypatch.setattr(source, "WHOLE_BYTES", 7 * 4 * 512)
    assert gate(compiled("gemma2")).passed
    monkeypatch.setattr(source, "WHOLE_BYTES", 1)
    assert gate(compiled("gemma2")).passed
    assert [logits.shape for logits in seen] == [(7, 512), (2, 512)]


def test_lookup_and_genai_sessions_give_transformers_tokens(compiled, prompts):
    artifact = compiled("gemma2")
    model = OrtModel(artifact, Artifact.open(artifact).manifest, 1)
    text = [*prompts[1], *prompts[1][1:9]]
    assert looked_up(model, text, COUNT)[0] == greedy_of_transformers(artifact, text, COUNT)
    pytest.importorskip("onnxruntime_genai")
    session, sequence = GenaiSession(GenaiModel(artifact, 1), Tokenizer(artifact)), []
    for more in (prompts[1], prompts[0][1:]):
        stats = GenerationStats()
        list(session.reply(more, max_new_tokens=COUNT, stats=stats))
        sequence += more
        assert stats.tokens == greedy_of_transformers(artifact, sequence, COUNT)
        sequence += stats.tokens


def engine_tokens(artifact, prompts, counts, late=()):
    """Greedy tokens of each prompt from genai's Engine; prompts in `late` come when others have begun."""
    import onnxruntime_genai as og

    engine = og.Engine(og.Model(str(artifact)))
    requests, tokens, waiting = [], [[] for _ in prompts], list(late)

    def begin(index):
        options = og.RequestOptions()
        options.set_max_session_tokens(CONTEXT)
        request = engine.create_request(options=options)
        turn = og.TurnOptions(request)
        turn.set_max_generated_tokens(counts[index])
        turn.set_do_sample(False)
        request.begin_turn(np.array(prompts[index], np.int32), turn)
        requests.append((request, index))

    for index in range(len(prompts)):
        if index not in late:
            begin(index)
    events, runs = engine.create_event_buffer(64), 0
    while engine.has_pending_requests() or waiting:
        for event in engine.run(events):
            assert event.error_code == og.EngineErrorCode.NONE
            if int(event.flags) & int(og.EngineEventFlags.TOKEN):
                index = next(index for request, index in requests if request == event.request)
                tokens[index].append(event.token)
        runs += 1
        assert runs < 500
        if runs >= 3 and waiting:
            begin(waiting.pop())
    return tokens


@pytest.mark.parametrize("cache", ["full", "window"])
@pytest.mark.parametrize("late", [(), (1,)])
def test_the_engine_of_genai_runs_requests_of_unequal_length(compiled, prompts, cache, late):
    """Together, past the window, ending at times of their own, and one that joins when others have begun."""
    pytest.importorskip("onnxruntime_genai")
    artifact, counts = compiled("gemma2", cache), [COUNT, 5, 9]
    expected = [greedy_of_transformers(artifact, *pair) for pair in zip(prompts, counts, strict=True)]
    assert engine_tokens(artifact, prompts, counts, late) == expected
    assert len({token for row in expected for token in row}) > 3
