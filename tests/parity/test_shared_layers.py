"""Gemma 4 E2B on the static pair: transformers' logits and tokens past five windows; what is wrong is named."""

import shutil

import numpy as np
import onnx
import pytest
import torch

from gemma_deploy.backends.tvm_vacc.cutting import LAST_HIDDEN
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.evaluation.models import open_model
from gemma_deploy.names import LAST_POSITION
from gemma_deploy.testing import TINY_PER_LAYER, write_tiny_checkpoint
from tests.exporting import write_artifact
from tests.graph import graph_runs
from tests.parity import sharing
from tests.parity.breaking import Graph
from tests.parity.sharing import PROMPTS, VECTORS, WINDOW, broken_gate
from tests.parity.test_gate_fails import ATTENTION, assert_found
from tests.parity.test_reference import stock


@pytest.fixture(scope="module")
def artifact_of(once):
    return sharing.artifacts_of(once, "e2b", "gemma4_text", **TINY_PER_LAYER)


@pytest.fixture(scope="module")
def e2b(artifact_of):
    return artifact_of("fp32")


@pytest.fixture(scope="module")
def transformers_own(e2b):
    return stock(Checkpoint.open(e2b.parent / "checkpoint"))


@pytest.fixture(scope="module")
def prompts():
    return sharing.random_prompts()


@pytest.fixture
def copy(e2b, tmp_path):
    return shutil.copytree(e2b, tmp_path / "copy")


def test_logits_are_transformers_and_greedy_tokens_too(e2b, transformers_own, prompts):
    sharing.compare_text(e2b, transformers_own, prompts)


def test_layers_that_share_have_no_ports_and_one_row_of_a_prompt(e2b):
    assert sharing.layers_with_ports(e2b) == set("0123")
    assert sharing.rows_of_mlps(e2b) == [*[[2, 32, 160]] * 4, *[[2, 1, 320]] * 3]


def test_the_last_position_alone_is_what_all_positions_give(e2b, transformers_own, prompts):
    sharing.compare_last_position(e2b, transformers_own, prompts)


def test_evaluation_scores_every_position(e2b, transformers_own, prompts):
    model = open_model(str(e2b))
    found = model.features(prompts)
    assert [len(rows) for rows in found] == list(PROMPTS)
    with torch.no_grad():
        expected = transformers_own(torch.tensor([prompts[0]])).logits[0].numpy()
    assert np.abs(model.source.head(found[0]) - expected).max() <= 1e-5 * np.abs(expected).max()  # 1.5e-6 measured


@pytest.mark.slow  # graphs of one size are compared by default
def test_a_dynamic_pair_takes_a_prompt_in_chunks(once, prompts):
    """Of a chunk the sharing layers compute every token, for its keys are new to all of them."""

    def make(root):
        checkpoint = write_tiny_checkpoint(root / "checkpoint", "gemma4_text", **TINY_PER_LAYER, sliding_window=WINDOW)
        write_artifact(checkpoint, root / "graphs", "fp32", dynamic=True)

    root = once("e2b-dynamic", make)
    model = stock(Checkpoint.open(root / "checkpoint"))
    first, decode = (graph_runs.session(root / "graphs" / f"{name}.onnx") for name in ("iter0", "iter1"))
    past = [value.name for value in decode.get_inputs() if value.name.startswith("past")]
    tokens, at, caches, session = prompts[0], 0, [], first
    while at < len(tokens):
        part = tokens[at : at + 9]
        feeds = {"input_ids": part, "attention_mask": [1] * (at + len(part)), "position_ids": range(at, at + len(part))}
        given = {name: np.array([values], np.int64) for name, values in feeds.items()}
        logits, *new = session.run(None, given | dict(zip(past, caches, strict=False)))
        caches = [np.concatenate(both, 2) for both in zip(caches, new, strict=True)] if caches else new
        at, session = at + len(part), decode
        with torch.no_grad():
            expected = model(torch.tensor([tokens[:at]])).logits[0, -1].numpy()
        assert np.abs(logits[0, 0] - expected).max() <= 1e-5 * np.abs(expected).max()  # 1.4e-6 measured


@pytest.mark.parametrize("scheme", ["fp32", "w8a16", pytest.param("bf16", marks=pytest.mark.slow)])
def test_an_intact_copy_passes(artifact_of, scheme):
    result = broken_gate(artifact_of(scheme))
    assert result.passed, result.summary


def test_rows_of_the_int8_table_are_looked_up_before_they_become_numbers(artifact_of):
    graph = onnx.load(artifact_of("w8a16") / "iter1.onnx", load_external_data=False).graph
    table = "model.embed_tokens_per_layer"
    for name in (f"{table}.weight", f"{table}.scale"):
        assert [node.op_type for node in graph.node if name in node.input] == ["Gather"], name
    shapes = {one.name: list(one.dims) for one in graph.initializer}
    assert [shapes[f"{table}.weight"], shapes[f"{table}.scale"]] == [[512, 7 * 32], [512, 7]]


def test_the_cache_of_another_layer(copy):
    for name in ("iter0", "iter1"):
        with Graph(copy, name) as graph:
            sharing.another_layers_cache(graph)
    assert_found(broken_gate(copy), f"model.layers.4.{ATTENTION}", "prefill", ("patched", "strict"))


@pytest.mark.slow  # the cache of another layer is seen by default
def test_the_new_entry_of_another_layer(copy):
    with Graph(copy, "iter1") as graph:
        right, wrong = (graph.maker(f"present.{i}.key").input[0] for i in (3, 1))
        for node in (node for node in graph.graph.node if node.output[0].startswith("model.layers.6.")):
            node.input[:] = [wrong if one == right else one for one in node.input]
    assert_found(broken_gate(copy), f"model.layers.6.{ATTENTION}", "decode", ("patched", "strict"))


@pytest.mark.slow  # the cache of another layer is seen by default
@pytest.mark.parametrize("layer", [3, 5])  # before and behind the cut
def test_the_vectors_of_the_layer_before(copy, layer):
    with Graph(copy, "iter0") as graph:
        graph.replace_constant(graph.maker(f"model.layers.{layer}.per_layer_input"), 1, lambda index: index - 1)
    assert_found(broken_gate(copy), f"model.layers.{layer}.{VECTORS}", "prefill", ("patched", "strict"))


@pytest.mark.slow  # the cache of another layer is seen by default
def test_without_the_number_of_a_layer(copy):
    with Graph(copy, "iter1") as graph:
        node = graph.maker("model.layers.5.out")
        node.input[1] = graph.constant(np.ones(1, np.float32))
    assert_found(broken_gate(copy), "model.layers.5", "decode", ("patched", "strict"))


def one_position_earlier(graph, value):
    node = graph.maker(value)
    node.input[1], node.input[2] = graph.constant(np.array([-2])), graph.constant(np.array([-1]))


@pytest.mark.slow  # a window of the row before is seen by default
def test_the_position_before_the_last(copy):
    with Graph(copy, "iter0") as graph:
        one_position_earlier(graph, LAST_HIDDEN)
    assert_found(broken_gate(copy), "model.layers.4.input_layernorm", "prefill", ("patched", "strict"))


@pytest.mark.slow  # the cache of another layer is seen by default
def test_a_window_one_position_off_where_layers_share(copy):
    with Graph(copy, "iter0") as graph:
        one_position_earlier(graph, f"{LAST_POSITION}.mask.sliding_attention")
    assert_found(broken_gate(copy), f"model.layers.4.{ATTENTION}", "prefill", ("patched", "strict"))


@pytest.mark.slow  # the vectors of a neighbour are seen by default
def test_a_table_that_is_not_scaled(copy):
    with Graph(copy, "iter1") as graph:
        node = graph.maker("model.embed_tokens_per_layer.out")
        node.input[1] = graph.constant(np.float32(1))
    assert_found(broken_gate(copy), "model.embed_tokens_per_layer", "decode", ("patched", "strict"))
