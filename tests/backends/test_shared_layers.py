"""Gemma 4 E2B for ONNX Runtime: the gate sees a wrong layer's cache and a neighbour's vectors, and says where."""

import pytest

from gemma_deploy.compile import compile_recipe
from gemma_deploy.errors import GateError
from gemma_deploy.testing import TINY_PER_LAYER, write_tiny_checkpoint
from tests.backends.sharing import reads_the_first_layer_of_its_kind, vectors_of_the_layer_before
from tests.calibration.make import write_tokenizer
from tests.test_other_generations import recipe_of

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("broken", "where"),
    [(reads_the_first_layer_of_its_kind, "model.layers.4"), (vectors_of_the_layer_before, "model.layers.0")],
)
def test_the_gate_sees_it_and_says_where(broken, where, tmp_path, monkeypatch):
    checkpoint = write_tiny_checkpoint(tmp_path / "ck", "gemma4_text", **TINY_PER_LAYER)
    write_tokenizer(checkpoint)
    broken(monkeypatch)
    with pytest.raises(GateError) as failed:
        compile_recipe(recipe_of(checkpoint, {"type": "onnxruntime", "dtype": "fp32"}, None, tmp_path))
    assert where in str(failed.value)
