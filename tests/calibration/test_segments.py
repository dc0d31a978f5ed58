"""A layer walked in segments is the layer, to the bit, in every generation."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gemma_deploy.calibration.segments import Route, state_columns, walk
from gemma_deploy.calibration.shards import LayerPass, LayerSetting, StackTemplate
from gemma_deploy.calibration.states import joined
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.testing import write_tiny_checkpoint

SEQLEN = 40  # five windows of 8
POINTS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")


def opened(path, index=1):
    checkpoint = Checkpoint.open(path)
    layer = LayerPass(StackTemplate(LayerSetting(checkpoint.config, "exact", SEQLEN, checkpoint.path)), index)
    weights = load_file(checkpoint.path / "model.safetensors")
    named = {name: weights[f"model.layers.{index}.{name}"].float() for name in layer.module.state_dict()}
    layer.module.load_state_dict(named, assign=True)
    return checkpoint, layer


def stock_layer(path, states):
    """What transformers' own layer gives for the states, and what its linears read."""
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32).eval()
    second, found = model.model.layers[1], {}
    for point in POINTS:
        second.get_submodule(point).register_forward_pre_hook(
            lambda module, args, point=point: found.__setitem__(point, args[0])
        )
    second.register_forward_hook(lambda module, args, output: found.__setitem__(None, output))
    second.register_forward_pre_hook(lambda module, args: (torch.from_numpy(states)[None], *args[1:]))
    model.model(torch.arange(3, 3 + SEQLEN)[None])
    return {point: x[0] if isinstance(x, tuple) else x for point, x in found.items()}


@pytest.mark.parametrize("model_type", ["gemma", "gemma2", "gemma3_text"])
@torch.inference_mode()
def test_segments_give_what_the_stock_layer_gives(tmp_path, model_type):
    checkpoint, layer = opened(write_tiny_checkpoint(tmp_path / "checkpoint", model_type))
    states = np.random.default_rng(1).standard_normal((SEQLEN, checkpoint.config.hidden_size), np.float32)
    expected = stock_layer(checkpoint.path, states)
    state, at, seen = states, None, {}
    with layer.hooked():
        for stop in (*POINTS, None):
            parts = walk(layer, state, Route(at), stop=stop, seen=seen.__setitem__)
            state, at = joined([part[0].numpy() for part in parts]), stop
            if stop is not None:
                assert state.shape == (SEQLEN, state_columns(layer.spec, stop))
        (whole,) = walk(layer, states, Route(), stop=None, seen=lambda point, x: None)
    for point in POINTS:
        torch.testing.assert_close(seen[point], expected[point], rtol=0, atol=0)
    torch.testing.assert_close(torch.from_numpy(state)[None], expected[None].view(1, SEQLEN, -1), rtol=0, atol=0)
    torch.testing.assert_close(whole, layer.run(states), rtol=0, atol=0)


@pytest.mark.parametrize("point", ["self_attn.o_proj", "mlp.down_proj"])
@torch.inference_mode()
def test_what_waits_is_divided_as_the_weights_were(tmp_path, point):
    _, layer = opened(write_tiny_checkpoint(tmp_path / "checkpoint", "gemma3_text"))
    states = np.random.default_rng(1).standard_normal(
        (SEQLEN, layer.stack_template.model.config.hidden_size), np.float32
    )
    linear = layer.module.get_submodule(point)
    factors = torch.linspace(0.25, 4, linear.in_features)
    with layer.hooked():
        expected = layer.run(states)
        parts = walk(layer, states, Route(), stop=point, seen=lambda point, x: None)
        linear.weight.data = linear.weight * factors
        waiting = joined([part[0].numpy() for part in parts])
        (found,) = walk(layer, waiting, Route(point, factors), stop=None, seen=lambda point, x: None)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
