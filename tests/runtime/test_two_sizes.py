"""Gemma 4 in every runtime: layers of two sizes of attention, past the window: transformers' own greedy tokens."""

import numpy as np
import pytest

from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.backends.onnxruntime.engine import OrtEngine
from gemma_deploy.engine import open_engine
from gemma_deploy.runtime.session import load_file, open_graph
from gemma_deploy.testing import TINY_EXPERTS, TINY_PER_LAYER
from tests.runtime.make import compile_tiny
from tests.runtime.test_engine import Syllables, said, spelling
from tests.runtime.test_genai import eager

PROMPTS = [[2, *np.random.default_rng(seed).integers(3, 500, 40 + seed).tolist()] for seed in range(3)]
COUNT = 12
LAYERS = {
    "shared": ("gemma4_text", TINY_PER_LAYER),
    "streams": ("gemma3n_text", {}),
    "experts": ("gemma4_text", TINY_EXPERTS),
}
STATIC = pytest.param("static", "", marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def artifact(once, genai_artifact):
    """Runtime and kind of layers -> an artifact in float32; read only."""

    def get(runtime, layers=""):
        if layers:
            backend, (kind, changes) = {"type": "onnxruntime", "dtype": "fp32"}, LAYERS[layers]
            made = once(f"genai-{layers}", lambda root: compile_tiny(root, kind, backend, **changes))
            return made / "workspace" / "tiny"
        if runtime != "static":
            return genai_artifact("gemma4_text")
        made = once("static-gemma4_text", lambda root: compile_tiny(root, "gemma4_text", {"dtype": "fp32"}))
        return made / "workspace" / "tiny"

    return get


@pytest.mark.parametrize(
    ("runtime", "layers"),
    [*((runtime, layers) for runtime in ("onnxruntime-genai", "onnxruntime") for layers in ("", *LAYERS)), STATIC],
)
def test_text_is_transformers_greedy_text(artifact, runtime, layers):
    directory = artifact(runtime, layers)
    engine = OrtEngine(Artifact.open(directory)) if runtime == "onnxruntime" else open_engine(directory, threads=1)
    assert engine.runtime == runtime
    generate = eager(directory)
    for prompt in PROMPTS:
        expected = generate([prompt], COUNT)[0]
        text, stats = said(spelling(engine.session()), prompt, COUNT)
        assert (stats.tokens, text) == (expected, Syllables().decode(expected))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("layers", LAYERS)
def test_layers_see_no_padding(artifact, layers, side):
    """Rows of unequal length together, then a step each: the logits of transformers, each row alone."""
    import torch
    from transformers import AutoModelForCausalLM

    directory = artifact("onnxruntime", layers)
    session = open_graph(load_file(directory / "model.onnx"), directory)
    checkpoint = directory.parent.parent / "checkpoint"
    stock = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager", dtype=torch.float32).eval()
    rows = [PROMPTS[0][:29], PROMPTS[1][:40], PROMPTS[2][:1]]
    width = max(map(len, rows))
    ids, mask = np.zeros((3, width), np.int64), np.zeros((3, width), np.int64)
    for row, prompt in enumerate(rows):
        at = slice(width - len(prompt), width) if side == "left" else slice(0, len(prompt))
        ids[row, at], mask[row, at] = prompt, 1
    names = [value.name for value in session.get_inputs() if value.name.startswith("past_key_values.")]
    shapes = {value.name: value.shape for value in session.get_inputs()}
    caches = {name: np.zeros((3, shapes[name][1], 0, shapes[name][3]), np.float32) for name in names}
    presents = [name.replace("past_key_values", "present") for name in names]
    logits, *caches_after = session.run(["logits", *presents], {"input_ids": ids, "attention_mask": mask, **caches})
    new = np.array([[7], [8], [9]], np.int64)
    mask = np.concatenate([mask, np.ones((3, 1), np.int64)], 1)
    feeds = {"input_ids": new, "attention_mask": mask, **dict(zip(names, caches_after, strict=True))}
    (next_logits,) = session.run(["logits"], feeds)
    for row, prompt in enumerate(rows):
        with torch.no_grad():
            expected = stock(torch.tensor([[*prompt, int(new[row, 0])]])).logits[0].numpy()
        np.testing.assert_allclose(logits[row, 0], expected[-2], atol=2e-5)  # measured: 2e-6
        np.testing.assert_allclose(next_logits[row, 0], expected[-1], atol=2e-5)
