"""Gemma 4 E2B for ONNX Runtime: the gate sees a wrong layer's cache and a neighbour's vectors, and says where."""

import json

import pytest

from gemma_deploy.backends.onnxruntime import decoder
from gemma_deploy.compile import compile_recipe
from gemma_deploy.errors import GateError
from gemma_deploy.recipe import Recipe
from gemma_deploy.testing import TINY_PER_LAYER, write_tiny_checkpoint
from tests.calibration.make import write_tokenizer

pytestmark = pytest.mark.slow


def reads_the_first_layer_of_its_kind(patch):
    right = decoder.Decoder._sharing_attention
    made = {}

    def attention(self, layer, hidden, shared):
        made[layer.kind, layer.index] = present = right_attention(self, layer, hidden, shared)
        return present

    def sharing(self, layer, hidden, shared, source):
        first = min(index for kind, index in made if kind == layer.kind)
        return right(self, layer, hidden, shared, made[layer.kind, first][1:])

    right_attention = decoder.Decoder._attention
    patch.setattr(decoder.Decoder, "_attention", attention)
    patch.setattr(decoder.Decoder, "_sharing_attention", sharing)


def vectors_of_the_layer_before(patch):
    right = decoder.by_layer

    def by_layer(nodes, vectors, layers, *, size):
        found = right(nodes, vectors, layers, size=size)
        return dict(zip(layers, [found[layer] for layer in (*layers[-1:], *layers[:-1])], strict=True))

    patch.setattr(decoder, "by_layer", by_layer)


@pytest.mark.parametrize(
    ("broken", "where"),
    [(reads_the_first_layer_of_its_kind, "model.layers.4"), (vectors_of_the_layer_before, "model.layers.0")],
)
def test_the_gate_sees_it_and_says_where(broken, where, tmp_path, monkeypatch):
    checkpoint = write_tiny_checkpoint(tmp_path / "ck", "gemma4_text", **TINY_PER_LAYER)
    write_tokenizer(checkpoint)
    recipe = {
        "name": "x",
        "frontend": {"checkpoint": str(checkpoint), "shape": {"input_ids": [[48], [64]]}},
        "backend": {"type": "onnxruntime", "dtype": "fp32"},
        "parity": {"prompt_tokens": 40, "decode_tokens": 8},
        "workspace": {"path": str(tmp_path)},
    }
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    broken(monkeypatch)
    with pytest.raises(GateError) as failed:
        compile_recipe(Recipe.load(tmp_path / "recipe.json"))
    assert where in str(failed.value)
