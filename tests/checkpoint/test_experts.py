"""Gemma 4 26B-A4B: keys of its config, its tensors, and files that do not fit them."""

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from gemma_deploy.checkpoint import Checkpoint, ModelConfig, expected_tensors
from gemma_deploy.errors import CheckpointError
from gemma_deploy.testing import TINY_CONFIGS, TINY_EXPERTS, write_tiny_checkpoint

TINY = TINY_CONFIGS["gemma4_text"] | TINY_EXPERTS


def test_tensors_are_those_of_the_stock_class():
    raw = {key: value for key, value in TINY.items() if key != "model_type"}
    with torch.device("meta"):
        stock = transformers.Gemma4ForCausalLM(transformers.Gemma4TextConfig(**raw))
    shapes = {name: tuple(value.shape) for name, value in stock.state_dict().items() if name != "lm_head.weight"}
    assert expected_tensors(ModelConfig.from_dict(TINY, "config.json")) == shapes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_experts": None}, "num_experts: got None, expected a whole number from 1"),
        ({"top_k_experts": 9}, "top_k_experts: got 9, expected 8 at most, as many as num_experts"),
        ({"moe_intermediate_size": "96"}, "moe_intermediate_size: got '96', expected a whole number"),
        ({"enable_moe_block": 1}, "enable_moe_block: got 1, expected true or false"),
        ({"hidden_size_per_layer_input": 32}, "hidden_size_per_layer_input: got 32, expected 0: no Gemma has it tog"),
        ({"num_kv_shared_layers": 2}, "num_kv_shared_layers: got 2, expected 0: no Gemma has it together with"),
    ],
)
def test_keys_that_are_wrong_are_told(changes, words):
    with pytest.raises(CheckpointError) as refused:
        ModelConfig.from_dict(TINY | changes, "config.json")
    assert words in str(refused.value)


def test_a_missing_key_is_told():
    raw = {key: value for key, value in TINY.items() if key != "top_k_experts"}
    with pytest.raises(CheckpointError, match="top_k_experts is missing"):
        ModelConfig.from_dict(raw, "config.json")


def changed(tmp_path, change):
    """A checkpoint whose tensors were changed, opened."""
    path = write_tiny_checkpoint(tmp_path / "ck", "gemma4_text", **TINY_EXPERTS)
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")
    return Checkpoint.open(path)


def test_rows_are_those_of_all_experts_below_each_other(tmp_path):
    kept = {}
    checkpoint = changed(tmp_path, kept.update)
    name = "model.layers.2.experts.gate_up_proj"
    assert checkpoint.tensors[name].shape == (8 * 192, 64)
    whole = kept[name].float().flatten(0, 1).numpy()
    np.testing.assert_array_equal(checkpoint.rows(name, 90, 200), whole[90:200])


def test_a_wrong_count_or_unequal_shapes_are_told_together(tmp_path):
    def change(tensors):
        tensors["model.layers.1.experts.down_proj"] = torch.zeros(7, 64, 96)
        tensors["model.layers.4.experts.gate_up_proj"] = torch.zeros(8, 194, 64)
        tensors["model.layers.5.router.proj.weight"] = torch.zeros(9, 64)
        del tensors["model.layers.6.router.per_expert_scale"]

    with pytest.raises(CheckpointError) as refused:
        changed(tmp_path, change)
    said = str(refused.value)
    assert "model.layers.1.experts.down_proj is [7, 64, 96], config.json calls for [8, 64, 96]" in said
    assert "model.layers.4.experts.gate_up_proj is [8, 194, 64], config.json calls for [8, 192, 64]" in said
    assert "model.layers.5.router.proj.weight is [9, 64], config.json calls for [8, 64]" in said
    assert "missing: model.layers.6.router.per_expert_scale [8]" in said


def test_a_matrix_where_experts_are_wanted_is_told(tmp_path):
    """Of as many numbers, but in two dimensions."""
    name = "model.layers.0.experts.down_proj"
    with pytest.raises(CheckpointError, match=r"is \[512, 96\], config.json calls for \[8, 64, 96\]"):
        changed(tmp_path, lambda tensors: tensors.update({name: tensors[name].flatten(0, 1).contiguous()}))
