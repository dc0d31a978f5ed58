"""The graph taken apart for proof is the graph, and what stands in a kernel's place is the model."""

import numpy as np
import onnx_ir as ir
import pytest

from gemma_deploy.backends.onnxruntime.exact import every_position, exact
from tests.backends.make import off, open_session, step
from tests.backends.test_decoder import CLOSE, KERNELS

ROUNDING = {"MatMulNBits", "MatMulIntegerToFloat", "QuantizeLinear", "GatherBlockQuantized"}
INTEGER = [("gemma", "w8t"), ("gemma2", "w8t"), ("gemma3_text", "w8t"), ("gemma3_text", "w8rowt")]
BLOCKS = [("gemma3_text", "w8"), ("gemma2", "w8row"), ("gemma2", "w8group"), ("gemma2", "w4")]
WIDE = {"model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj"}


@pytest.mark.parametrize(("kind", "form"), [("gemma2", "fp32"), ("gemma3_text", "w8"), ("gemma3_text", "w8t")])
def test_every_position_has_its_logits(made, logits_of, tokens, kind, form):
    one = made(kind, form)
    graph = one.graph(in_14_bits=WIDE)
    whole, _ = step(open_session(graph, one.folder), [tokens[:30]])
    every_position(graph)
    session = open_session(graph, one.folder)
    assert session.get_outputs()[0].shape == ["batch", "sequence", 512]
    logits, _ = step(session, [tokens[:30]])
    assert logits.shape == (1, 30, 512)
    assert off(logits[:, -1], whole[:, 0]) < CLOSE
    expected = logits_of(kind, form, tokens)[:30]
    assert np.abs(logits[0] - expected).max(1).max() < (CLOSE if form == "fp32" else KERNELS) * np.abs(expected).max()


@pytest.mark.parametrize(("kind", "form"), [*INTEGER, *BLOCKS])
def test_exact_arithmetic_is_the_model(made, logits_of, tokens, kind, form):
    """Every position, with linears of 14 bits and of 8, and without an operator that rounds."""
    one = made(kind, form)
    graph = one.graph(in_14_bits=WIDE)
    assert ("MatMulIntegerToFloat" in {node.op_type for node in graph.graph}) == ((kind, form) in INTEGER)
    every_position(graph)
    exact(graph)
    assert not ROUNDING & {node.op_type for node in graph.graph}
    unread = [value.name for node in graph.graph for value in node.outputs
              if value.name and not value.uses() and value not in graph.graph.outputs
              and node.op_type not in ("SkipSimplifiedLayerNormalization", "TopK")]  # fmt: skip
    assert unread == []
    session = open_session(graph, one.folder, optimize=False)
    expected = logits_of(kind, form, tokens)
    logits, caches = step(session, [tokens[:30]])
    assert off(logits[0], expected[:30]) < CLOSE
    logits, _ = step(session, [tokens[30:]], caches)
    assert off(logits[0], expected[30:]) < CLOSE


def test_exact_leaves_float32_as_it_is(made):
    graph = made("gemma", "fp32").graph()
    before = [(node.op_type, node.name) for node in graph.graph]
    exact(graph)
    assert [(node.op_type, node.name) for node in graph.graph] == before


@pytest.mark.parametrize("form", ["w4", "w8t"])
def test_weights_stay_in_the_file(made, form):
    """What `exact` adds are views, zero points and shapes."""
    graph = made("gemma2", form).graph()
    exact(graph)
    inside = [value.const_value.nbytes for value in graph.graph.initializers.values()
              if not isinstance(value.const_value, ir.ExternalTensor)]  # fmt: skip
    assert max(inside) <= 512 * 64 // 32  # a zero point for every group of the table
