"""What a prompt made resident of mapped tables leaves memory behind it, and comes back where it is needed."""

import sys

import numpy as np
import pytest

from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.backends.onnxruntime import in_place
from gemma_deploy.backends.onnxruntime.genai import GenaiModel, GenaiSession
from gemma_deploy.backends.onnxruntime.in_place import OrtModel
from gemma_deploy.machine import leave_pages
from gemma_deploy.runtime import Tokenizer
from tests.runtime.make import compile_tiny

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
TOKENS = [2, *map(int, np.random.default_rng(3).integers(3, 500, 79))]


@pytest.fixture(scope="module")
def artifact(once):
    backend = {"type": "onnxruntime", "dtype": "int8"}
    return once("looked-up", lambda root: compile_tiny(root, "gemma2", backend)) / "workspace" / "tiny"


def test_behind_a_long_prompt_in_onnx_runtime(artifact, monkeypatch):
    model, file = OrtModel(artifact, Artifact.open(artifact).manifest, 1), artifact / "params.safetensors"
    leave_pages(file)
    first = model.sequence(100).read(TOKENS)
    assert leave_pages(file) == 0
    assert np.array_equal(model.sequence(100).read(TOKENS), first)
    model.sequence(100).read(TOKENS[:20])
    assert leave_pages(file) > 0, "a short prompt looks nothing up that stays"
    monkeypatch.setattr(in_place, "leave_tables", lambda artifact, tokens: None)
    model.sequence(100).read(TOKENS)
    assert leave_pages(file) > 0, "a long one leaves nothing in any case"


def test_behind_a_long_prompt_in_genai(artifact):
    pytest.importorskip("onnxruntime_genai")
    model, file = GenaiModel(artifact, 1), artifact / "params.safetensors"
    session = GenaiSession(model, Tokenizer(artifact))
    leave_pages(file)
    first = session.read(TOKENS)
    assert leave_pages(file) == 0
    session.reset()
    assert np.array_equal(session.read(TOKENS), first)
    session.reset()
    session.read(TOKENS[:20])
    assert leave_pages(file) > 0
