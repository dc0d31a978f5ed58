"""Layers that read keys and values of others out of caches that hold a window alone: the numbers of transformers."""

import json
import shutil

import numpy as np
import onnx_ir as ir
import pytest
import torch
from transformers import AutoModelForCausalLM

from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.backends.onnxruntime import window
from gemma_deploy.backends.onnxruntime.genai import GenaiModel, GenaiSession
from gemma_deploy.backends.onnxruntime.in_place import OrtModel, OrtSequence
from gemma_deploy.backends.onnxruntime.window import capacity_of, windows_of
from gemma_deploy.runtime import Tokenizer
from gemma_deploy.runtime.generate import GenerationStats
from gemma_deploy.testing import TINY_PER_LAYER
from tests.backends.make import off, open_session
from tests.runtime.make import compile_tiny
from tests.runtime.test_genai import eager

CLOSE = 1e-5  # relative; the most was 1.3e-6
TOKENS = [2, *map(int, np.random.default_rng(3).integers(3, 500, 43))]  # five windows of 8
OWN = [0, 2]  # layers with such a cache; layers 4 and 5 read that of layer 2, layer 6 the whole one of layer 3


@pytest.fixture(scope="module")
def artifact(once):
    backend = {"type": "onnxruntime", "dtype": "fp32", "compile": {"cache": "window"}}
    made = once("shared-window", lambda root: compile_tiny(root, "gemma4_text", backend, **TINY_PER_LAYER))
    return made / "workspace" / "tiny"


@pytest.fixture(scope="module")
def stock(artifact):
    path = artifact.parent.parent / "checkpoint"
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32).eval()


def expected(stock, tokens):
    with torch.inference_mode():
        return stock(torch.tensor([tokens])).logits[0].numpy()


def empty(session, windows, capacity, rows=1):
    values = [value for value in session.get_inputs() if value.name.startswith("past_key_values.")]
    return {
        value.name: np.zeros((rows, value.shape[1], capacity * (value.name in windows), value.shape[3]), np.float32)
        for value in values
    }


def test_only_layers_with_a_cache_of_their_own_have_one_of_a_window(artifact):
    graph = ir.load(artifact / "model.onnx")
    assert windows_of(graph.graph) == {
        f"past_key_values.{layer}.{part}": 8 for layer in OWN for part in ("key", "value")
    }
    contract = Artifact.open(artifact).manifest.contract
    assert list(contract.windowed) == OWN
    assert (
        json.loads((artifact / "genai_config.json").read_text())["model"]["decoder"]["sliding_window"]["layers"] == OWN
    )


@pytest.mark.parametrize("capacity", [8, 9, 13, 60])
@pytest.mark.parametrize("pieces", [(20, 6, *[1] * 18), tuple([1] * 44), (44,), (7, 7, 7, 23)])
def test_logits_are_transformers_however_small_the_buffer(artifact, stock, capacity, pieces):
    graph = ir.load(artifact / "model.onnx")
    session, logits, at = open_session(graph, artifact), expected(stock, TOKENS), 0
    caches = empty(session, windows_of(graph.graph), capacity)
    for size in pieces:
        feeds = {"input_ids": np.array([TOKENS[at : at + size]]), "attention_mask": np.ones((1, at + size), np.int64)}
        found, *present = session.run(None, feeds | caches)
        caches, at = dict(zip(caches, present, strict=True)), at + size
        assert off(found[0, 0], logits[at - 1]) < CLOSE


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("capacity", [8, 11])
def test_rows_of_unequal_length(artifact, stock, side, capacity):
    graph = ir.load(artifact / "model.onnx")
    session, rows = open_session(graph, artifact), [TOKENS[:29], TOKENS[:1], [2, *TOKENS[3:40]]]
    width = max(map(len, rows))
    ids, mask = np.zeros((2, 3, width), np.int64)
    for row, prompt in enumerate(rows):
        at = slice(width - len(prompt), width) if side == "left" else slice(0, len(prompt))
        ids[row, at], mask[row, at] = prompt, 1
    caches = empty(session, windows_of(graph.graph), capacity, 3)
    found, *present = session.run(None, {"input_ids": ids, "attention_mask": mask} | caches)
    new = np.array([[7], [8], [9]])
    feeds = {"input_ids": new, "attention_mask": np.concatenate([mask, np.ones((3, 1), np.int64)], 1)}
    following, *_ = session.run(None, feeds | dict(zip(caches, present, strict=True)))
    for row, prompt in enumerate(rows):
        logits = expected(stock, [*prompt, int(new[row, 0])])
        assert off(found[row, 0], logits[-2]) < CLOSE
        assert off(following[row, 0], logits[-1]) < CLOSE


@pytest.mark.parametrize("slack", [1, 5])
def test_several_tokens_in_a_step_and_back_again(artifact, stock, slack, monkeypatch):
    """As guesses are verified: the first of them right, the others wrong, past buffers that are moved."""
    monkeypatch.setattr(window, "SLACK", slack)
    sequence = OrtSequence(OrtModel(artifact, Artifact.open(artifact).manifest, 1), 100)
    sequence.feed(TOKENS[:20])
    counts = set()
    for at in range(20, 44):
        count = sequence.ahead(3)
        step = [TOKENS[at], 7, 9][:count]
        logits = expected(stock, [*TOKENS[:at], *step])
        assert off(sequence.feed(step), logits[-count:]) < CLOSE
        sequence.length -= count - 1
        counts.add(count)
    assert counts == ({1} if slack == 1 else {1, 2, 3})
    assert capacity_of(8) == 8 + slack


def test_genai_runs_it(artifact, tmp_path):
    """Pieces of 4 tokens give buffers of 24 positions, which the prompt alone fills."""
    pytest.importorskip("onnxruntime_genai")
    copy = shutil.copytree(artifact, tmp_path / "x")
    config = json.loads((copy / "genai_config.json").read_text())
    config["search"]["chunk_size"] = 4
    (copy / "genai_config.json").write_text(json.dumps(config))
    session, stats = GenaiSession(GenaiModel(copy, 1), Tokenizer(copy)), GenerationStats()
    list(session.reply(TOKENS, max_new_tokens=12, stats=stats))
    assert stats.tokens == eager(artifact)([TOKENS], 12)[0]
