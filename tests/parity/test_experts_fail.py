"""The gate fails on an artifact whose experts, or whose choice of them, are wrong, and names the module."""

import shutil

import numpy as np
import pytest

from gemma_deploy.testing import TINY_EXPERTS, write_tiny_checkpoint
from tests.exporting import write_artifact
from tests.parity.breaking import Graph, change_tensor
from tests.parity.conftest import finish, gate
from tests.parity.test_gate_fails import assert_found

LAYER = "model.layers.1"


@pytest.fixture
def copy(once, tmp_path):
    """A copy of a finished artifact, to break."""

    def make(out):
        checkpoint = write_tiny_checkpoint(out / "checkpoint", "gemma4_text", num_hidden_layers=3, **TINY_EXPERTS)
        write_artifact(checkpoint, out / "graphs", "fp32")
        finish(out / "graphs", checkpoint, "fp32", out / "finished")

    return shutil.copytree(once("experts-fp32", make) / "finished", tmp_path / "copy")


@pytest.mark.slow
def test_an_intact_copy_passes(copy):
    result = gate(copy)
    assert result.passed, result.summary


def up_in_front_of_gate(artifact):
    def swap(stack):
        return np.concatenate(np.split(stack, 2, axis=1)[::-1], axis=1)

    change_tensor(artifact, f"{LAYER}.experts.gate_up_proj", swap)


def experts_change_places(artifact):
    change_tensor(artifact, f"{LAYER}.experts.down_proj", lambda stack: np.roll(stack, 1, axis=0))


def experts_have_no_scale(artifact):
    change_tensor(artifact, f"{LAYER}.router.per_expert_scale", np.ones_like)


def chosen_experts_count_alike(artifact):
    """Each share is divided by itself. By another sum would be a factor of all of them, which the norm behind hides."""
    for name in ("iter0", "iter1"):
        with Graph(artifact, name) as graph:
            top = graph.maker_of_op("TopK", LAYER)
            (division,) = (node for node in graph.consumers(top.output[0]) if node.op_type == "Div")
            division.input[1] = top.output[0]


def router_reads_another_scale(artifact):
    change_tensor(artifact, f"{LAYER}.router.scale", lambda scale: np.roll(scale, 1))


def dense_mlp_is_dropped(artifact):
    change_tensor(artifact, f"{LAYER}.post_feedforward_layernorm_1.weight", np.zeros_like)


def experts_are_not_normed(artifact):
    change_tensor(artifact, f"{LAYER}.post_feedforward_layernorm_2.weight", np.ones_like)


@pytest.mark.parametrize(
    ("broken", "module"),
    [
        (up_in_front_of_gate, "experts"),
        pytest.param(chosen_experts_count_alike, "experts", marks=pytest.mark.slow),
        pytest.param(dense_mlp_is_dropped, "post_feedforward_layernorm_1", marks=pytest.mark.slow),
        pytest.param(experts_change_places, "experts", marks=pytest.mark.slow),
        pytest.param(experts_have_no_scale, "experts", marks=pytest.mark.slow),
        pytest.param(router_reads_another_scale, "router.proj", marks=pytest.mark.slow),
        pytest.param(experts_are_not_normed, "post_feedforward_layernorm_2", marks=pytest.mark.slow),
    ],
)
def test_what_is_wrong_is_named(copy, broken, module):
    broken(copy)
    assert_found(gate(copy), f"{LAYER}.{module}", "prefill", ("patched", "strict"))
