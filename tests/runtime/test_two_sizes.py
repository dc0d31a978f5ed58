"""Gemma 4 in every runtime: layers of two sizes of attention, past the window: transformers' own greedy tokens."""

import numpy as np
import pytest

from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.backends.onnxruntime.engine import OrtEngine
from gemma_deploy.engine import open_engine
from tests.runtime.make import compile_tiny
from tests.runtime.test_engine import Syllables, said, spelling
from tests.runtime.test_genai import eager

PROMPTS = [[2, *np.random.default_rng(seed).integers(3, 500, 40 + seed).tolist()] for seed in range(3)]
COUNT = 12
STATIC = pytest.param("static", marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def artifact(once, genai_artifact):
    """Runtime -> artifact of the same checkpoint in float32; read only."""

    def get(runtime):
        if runtime != "static":
            return genai_artifact("gemma4_text")
        made = once("static-gemma4_text", lambda root: compile_tiny(root, "gemma4_text", {"dtype": "fp32"}))
        return made / "workspace" / "tiny"

    return get


@pytest.mark.parametrize("runtime", ["onnxruntime-genai", "onnxruntime", STATIC])
def test_text_is_transformers_greedy_text(artifact, genai_artifact, runtime):
    directory = artifact(runtime)
    engine = OrtEngine(Artifact.open(directory)) if runtime == "onnxruntime" else open_engine(directory, threads=1)
    assert engine.runtime == runtime
    generate = eager(genai_artifact("gemma4_text"))
    for prompt in PROMPTS:
        expected = generate([prompt], COUNT)[0]
        text, stats = said(spelling(engine.session()), prompt, COUNT)
        assert (stats.tokens, text) == (expected, Syllables().decode(expected))
