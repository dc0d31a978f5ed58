"""Gemma 3n for ONNX Runtime: what may go wrong in its streams, seen by the gate, which says where; and bfloat16."""

import numpy as np
import onnxruntime
import pytest

from gemma_deploy.backends.onnxruntime import decoder, streams
from gemma_deploy.compile import compile_recipe
from gemma_deploy.errors import GateError
from gemma_deploy.testing import TINY_PER_LAYER, write_tiny_checkpoint
from tests.backends.sharing import reads_the_first_layer_of_its_kind, vectors_of_the_layer_before
from tests.calibration.make import write_tokenizer
from tests.runtime.make import compile_tiny
from tests.test_other_generations import recipe_of

FLOAT = {"type": "onnxruntime", "dtype": "fp32"}
STREAMS = streams.Streams


def no_laurel(patch):
    def remember(self, layer, laurel, normed):
        right(self, layer, laurel, normed)
        made = self.laurels[layer.index]
        self.laurels[layer.index] = self.nodes.one("Sub", [made, made], f"{layer.prefix}laurel.nothing")

    right = STREAMS.remember
    patch.setattr(STREAMS, "remember", remember)


def laurel_without_what_it_reads(patch):
    def remember(self, layer, laurel, normed):
        right(self, layer, laurel, normed)
        alone = self.nodes.one("Sub", [self.laurels[layer.index], normed], f"{layer.prefix}laurel.alone")
        self.laurels[layer.index] = alone

    right = STREAMS.remember
    patch.setattr(STREAMS, "remember", remember)


def deviation_of_a_sample(patch):
    """N - 1 in the place of N."""
    right = streams.sparse

    def sparse(parts, gate, name, *, share):
        many = parts.nodes.many

        def counted(op_type, inputs, names, **rest):
            made = many(op_type, inputs, names, **rest)
            if names[0] != f"{name}.variance":
                return made
            width = 160  # of the first layer's MLP
            return many("Mul", [made[0], parts.weights.scalar(width / (width - 1))], [f"{name}.sample"])

        parts.nodes.many = counted
        try:
            return right(parts, gate, name, share=share)
        finally:
            del parts.nodes.many

    patch.setattr(decoder, "sparse", sparse)


def no_root_of_two(patch):
    patch.setattr(STREAMS, "_number", lambda self, value: self._weights.scalar(1.0 if value == 2**0.5 else value))


def correction_without_one(patch):
    patch.setattr(STREAMS, "_number", lambda self, value: self._weights.scalar(0.0 if value == 1.0 else value))


def maps_turned(patch):
    """C of the prediction transposed."""
    right = STREAMS.predicted

    def predicted(self, layer, value):
        one = self.nodes.one

        def turned(op_type, inputs, name, **rest):
            made = one(op_type, inputs, name, **rest)
            return one("Transpose", [made], f"{name}.turned", perm=[0, 1, 3, 2]) if name.endswith(".maps") else made

        self.nodes.one = turned
        try:
            return right(self, layer, value)
        finally:
            del self.nodes.one

    patch.setattr(STREAMS, "predicted", predicted)


def vector_in_the_first_stream_too(patch):
    def added(self, layer, value, own):
        rows = self._row(own, f"{layer.prefix}per_layer.row")
        return self.nodes.one("Add", [value, rows], f"{layer.prefix}out")

    patch.setattr(STREAMS, "added", added)


def router_reads_what_was_expected(patch):
    right = STREAMS._routed

    def routed(self, layer, x, where):
        if where == "behind":
            made = (node.outputs[0] for node in reversed(self.nodes.nodes))
            x = next(value for value in made if str(value.name).endswith("altup.expected"))
        return right(self, layer, x, where)

    patch.setattr(STREAMS, "_routed", routed)


def tokens_without_a_row_have_the_last(patch):
    def known_ids(nodes, ids, rows):
        last = nodes.constant(np.int64(rows - 1), "int64.scalar.last")
        return nodes.one("Min", [ids, last], "ids.last")

    patch.setattr(decoder, "known_ids", known_ids)


BREAKAGES = [
    (reads_the_first_layer_of_its_kind, "model.layers.4."),
    (vectors_of_the_layer_before, "model.layers.0.per_layer_projection"),
    (no_laurel, "model.layers.0.pre_feedforward_layernorm"),
    (laurel_without_what_it_reads, "model.layers.0.pre_feedforward_layernorm"),
    (deviation_of_a_sample, "model.layers.0.mlp.act_fn"),
    (no_root_of_two, "model.layers.0.per_layer_input_gate"),  # the norm behind it sees no size
    (correction_without_one, "model.layers.0.per_layer_input_gate"),
    (maps_turned, "model.layers.0.input_layernorm"),
    (vector_in_the_first_stream_too, "model.layers.0:"),
    (router_reads_what_was_expected, "model.layers.0.per_layer_input_gate"),
    (tokens_without_a_row_have_the_last, ""),  # the text that is searched has none
]


@pytest.mark.slow
@pytest.mark.parametrize(("broken", "where"), BREAKAGES, ids=[one.__name__ for one, _ in BREAKAGES])
def test_the_gate_sees_it_and_says_where(broken, where, tmp_path, monkeypatch):
    checkpoint = write_tiny_checkpoint(tmp_path / "ck", "gemma3n_text")
    write_tokenizer(checkpoint)
    broken(monkeypatch)
    with pytest.raises(GateError) as failed:
        compile_recipe(recipe_of(checkpoint, FLOAT, None, tmp_path))
    if where:
        assert f"first differs in {where}".rstrip(":") in str(failed.value)
    if where.endswith(":"):  # the layer's own sum, no module inside
        assert f"first differs in {where[:-1]} (" in str(failed.value)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "changes"), [("gemma3n_text", {}), ("gemma4_text", TINY_PER_LAYER)])
def test_a_bfloat16_graph_has_types_that_fit(kind, changes, tmp_path):
    """ONNX Runtime resolves the types of all nodes first: what it lacks for a CPU are kernels."""
    artifact = compile_tiny(tmp_path, kind, {"type": "onnxruntime", "dtype": "bf16"}, **changes)
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented, match="Could not find an implement"):
        onnxruntime.InferenceSession(artifact / "model.onnx", providers=["CPUExecutionProvider"])
