"""Gemma 3n on the static pair: transformers' logits and tokens past five windows; what is wrong is named."""

import shutil

import numpy as np
import pytest
from onnx import numpy_helper

from gemma_deploy.checkpoint import Checkpoint
from tests.parity import sharing
from tests.parity.breaking import Graph
from tests.parity.sharing import VECTORS, another_layers_cache, broken_gate
from tests.parity.test_gate_fails import ATTENTION, assert_found
from tests.parity.test_reference import stock


@pytest.fixture(scope="module")
def streams(once):
    return sharing.artifacts_of(once, "gemma3n", "gemma3n_text")("fp32")


@pytest.fixture(scope="module")
def transformers_own(streams):
    return stock(Checkpoint.open(streams.parent / "checkpoint"))


@pytest.fixture(scope="module")
def prompts():
    """Tokens among them that the table of vectors has no row for."""
    found = sharing.random_prompts()
    assert all(max(prompt) >= 480 for prompt in found)
    return found


@pytest.fixture
def copy(streams, tmp_path):
    return shutil.copytree(streams, tmp_path / "copy")


def test_logits_are_transformers_and_greedy_tokens_too(streams, transformers_own, prompts):
    sharing.compare_text(streams, transformers_own, prompts)


@pytest.mark.slow  # E2B's are seen by default
def test_layers_that_share_have_no_ports_and_one_row_of_a_prompt(streams):
    assert sharing.layers_with_ports(streams) == set("0123")
    assert sharing.rows_of_mlps(streams) == [
        [2, 32, 160], [2, 32, 160], [2, 32, 96], [2, 32, 160], [2, 1, 160], [2, 1, 96], [2, 1, 160],
    ]  # fmt: skip


@pytest.mark.slow
def test_the_last_position_of_all_streams_is_what_all_positions_give(streams, transformers_own, prompts):
    sharing.compare_last_position(streams, transformers_own, prompts)


@pytest.mark.slow
def test_an_intact_copy_passes(streams):
    result = broken_gate(streams)
    assert result.passed, result.summary


def node_with(graph, layer, number):
    """The node of a layer that computes with a constant, and which of its inputs it is."""
    stored = (one for one in graph.graph.initializer if one.raw_data or one.float_data)
    arrays = {one.name: numpy_helper.to_array(one) for one in stored}
    wanted = {
        name for name, array in arrays.items() if array.size == 1 and abs(float(array.ravel()[0]) - number) < 1e-5
    }
    nodes = (node for node in graph.graph.node if node.output[0].startswith(f"model.layers.{layer}."))
    return [(node, index) for node in nodes for index, name in enumerate(node.input) if name in wanted]


def the_neighbours_vector(graph):
    graph.replace_constant(graph.maker("model.layers.3.per_layer_input"), 1, lambda index: index - 1)


def no_laurel(graph):
    name = "model.layers.1.laurel.post_laurel_norm.out"
    (node,) = graph.consumers(name)
    zero = graph.constant(np.zeros(64, np.float32))
    node.input[:] = [zero if one == name else one for one in node.input]


def deviation_of_a_sample(graph):
    """N - 1 in the place of N: the quantile by that much larger."""
    ((node, index),) = node_with(graph, 0, 1.6448536)
    graph.replace_constant(node, index, lambda value: value * np.float32((160 / 159) ** 0.5))


def no_root_of_two(graph):
    ((node, index),) = node_with(graph, 2, 2**0.5)
    graph.replace_constant(node, index, np.ones_like)


def correction_without_one(graph):
    (node,) = graph.consumers("model.layers.5.altup.correction_coefs.out")
    index = 1 - list(node.input).index("model.layers.5.altup.correction_coefs.out")
    graph.replace_constant(node, index, np.zeros_like)


def streams_of_another_size(graph):
    """What a projection makes is not brought to the embeddings' size."""
    (node, *_) = [one for one in graph.graph.node if one.op_type == "Div" and not one.output[0].startswith("model.l")]
    node.input[1] = graph.constant(np.float32(1))


BREAKAGES = [
    (another_layers_cache, "iter0", f"model.layers.4.{ATTENTION}"),
    (another_layers_cache, "iter1", f"model.layers.4.{ATTENTION}"),
    (the_neighbours_vector, "iter0", f"model.layers.3.{VECTORS}"),
    (no_laurel, "iter1", "model.layers.1.pre_feedforward_layernorm"),
    (deviation_of_a_sample, "iter0", "model.layers.0.mlp.act_fn"),
    (no_root_of_two, "iter0", "model.layers.2.per_layer_input_gate"),
    (correction_without_one, "iter1", "model.layers.5.per_layer_input_gate"),
    (streams_of_another_size, "iter0", "model.layers.0.input_layernorm"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("broken", "name", "where"), BREAKAGES, ids=[f"{one.__name__}-{graph}" for one, graph, _ in BREAKAGES]
)
def test_what_is_wrong_is_named(broken, name, where, copy):
    with Graph(copy, name) as graph:
        broken(graph)
    phase = "prefill" if name == "iter0" else "decode"
    assert_found(broken_gate(copy), where, phase, ("patched", "strict"))
