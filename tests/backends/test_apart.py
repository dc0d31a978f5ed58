"""The graph taken apart for proof is the graph, and what stands in a kernel's place is the model."""

import numpy as np
import onnx_ir as ir
import pytest

from gemma_deploy.backends.ort.apart import every_position, exact, take_branch
from tests.backends.make import nodes_of, off, open_session, step
from tests.backends.test_decoder import CLOSE, KERNELS

ROUNDING = {"MatMulNBits", "MatMulIntegerToFloat", "QuantizeLinear", "GatherBlockQuantized"}
INTEGER = [("gemma", "w8"), ("gemma2", "w8"), ("gemma3_text", "w8"), ("gemma3_text", "w8row")]


@pytest.mark.parametrize(("kind", "form"), INTEGER)
@pytest.mark.parametrize(("branch", "length"), [("prefill", 40), ("decode", 12)])
def test_a_branch_alone_gives_what_the_whole_graph_gives_where_it_is_taken(made, tokens, kind, form, branch, length):
    one = made(kind, form)
    graph = one.graph(integer=True, wide={"model.layers.0.mlp.down_proj"})
    whole, caches = step(open_session(graph, one.folder), [tokens[:length]])
    take_branch(graph, branch)
    assert not any(node.op_type == "If" for node in nodes_of(graph))
    ports = [[value.name for value in side] for side in (graph.graph.inputs, graph.graph.outputs)]
    fresh = one.graph(integer=True)
    assert ports == [[value.name for value in side] for side in (fresh.graph.inputs, fresh.graph.outputs)]
    # Without the option for exact products, which at the top of a graph cannot have two products of one matrix.
    alone, own = step(open_session(graph, one.folder, precise=False), [tokens[:length]])
    assert off(alone, whole) < CLOSE
    assert all(off(own[name], caches[name]) < CLOSE for name in caches)
    other = one.graph(integer=True)
    take_branch(other, {"prefill": "decode", "decode": "prefill"}[branch])
    assert off(step(open_session(other, one.folder), [tokens[:length]])[0], whole) > 100 * CLOSE


@pytest.mark.parametrize("form", ["fp32", "w4"])
def test_a_graph_without_branches_stays_as_it_is(made, form):
    graph = made("gemma2", form).graph()
    before = ir.to_proto(graph).SerializeToString()
    take_branch(graph, "prefill")
    assert ir.to_proto(graph).SerializeToString() == before


@pytest.mark.parametrize(("kind", "form", "integer"), [("gemma2", "fp32", False), ("gemma3_text", "w8", True)])
def test_every_position_has_its_logits(made, logits_of, tokens, kind, form, integer):
    one = made(kind, form)
    graph = one.graph(integer=integer)
    whole, _ = step(open_session(graph, one.folder), [tokens[:30]])
    if integer:
        take_branch(graph, "prefill")
    every_position(graph)
    session = open_session(graph, one.folder)
    assert session.get_outputs()[0].shape == ["batch", "sequence", 512]
    logits, _ = step(session, [tokens[:30]])
    assert logits.shape == (1, 30, 512)
    assert off(logits[:, -1], whole[:, 0]) < CLOSE
    expected = logits_of(kind, form, tokens)[:30]
    assert np.abs(logits[0] - expected).max(1).max() < (CLOSE if form == "fp32" else KERNELS) * np.abs(expected).max()


@pytest.mark.parametrize(("kind", "form"), [*INTEGER, ("gemma2", "w8group"), ("gemma2", "w4")])
@pytest.mark.parametrize("branch", ["prefill", "decode"])
def test_exact_arithmetic_is_the_model(made, logits_of, tokens, kind, form, branch):
    """Every position, with linears of 16 bits and of 8, and without an operator that rounds."""
    one = made(kind, form)
    graph = one.graph(integer=True, wide={"model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj"})
    take_branch(graph, branch)
    every_position(graph)
    exact(graph)
    assert not ROUNDING & {node.op_type for node in graph.graph}
    unread = [value.name for node in graph.graph for value in node.outputs
              if value.name and not value.uses() and value not in graph.graph.outputs
              and node.op_type != "SkipSimplifiedLayerNormalization"]  # fmt: skip
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


def test_weights_stay_in_the_file(made):
    """What `exact` adds are views, zero points and shapes."""
    graph = made("gemma2", "w4").graph()
    exact(graph)
    inside = [value.const_value.nbytes for value in graph.graph.initializers.values()
              if not isinstance(value.const_value, ir.ExternalTensor)]  # fmt: skip
    assert max(inside) <= 512 * 64 // 32  # a zero point for every group of the table
