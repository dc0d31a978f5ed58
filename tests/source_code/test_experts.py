"""The patched model with experts = the stock class with eager ones, bit for bit, past the window and with padding."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from gemma_deploy.patched import patched_module
from gemma_deploy.staging import stage_checkpoint
from gemma_deploy.testing import TINY_EXPERTS, write_tiny_checkpoint


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    checkpoint = write_tiny_checkpoint(folder / "checkpoint", "gemma4_text", **TINY_EXPERTS)
    stage_checkpoint(checkpoint, folder / "staged")
    return folder


@pytest.fixture(scope="module")
def pair(folders):
    """Both classes, by dtype."""

    def get(dtype):
        eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
        stock = AutoModelForCausalLM.from_pretrained(folders / "checkpoint", **eager, dtype=dtype).eval()
        patched = AutoModelForCausalLM.from_pretrained(folders / "staged", trust_remote_code=True, dtype=dtype).eval()
        return stock, patched

    return get


@pytest.fixture(scope="module")
def prompt():
    ids = torch.randint(3, 500, (2, 40), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    return ids, mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_bit_identical(pair, prompt, dtype):
    stock, patched = pair(dtype)
    ids, mask = prompt
    with torch.no_grad():
        assert torch.equal(stock(ids).logits, patched(ids).logits)
        assert torch.equal(stock(ids, attention_mask=mask).logits, patched(ids, attention_mask=mask).logits)


@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}], ids=str
)
def test_generate_gives_the_stock_tokens(pair, prompt, how):
    ids, mask = prompt
    found = [one.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, **how) for one in pair(None)]
    assert torch.equal(*found)


def test_gradients_are_the_stock_ones(pair, prompt):
    """Of router, scales and experts, through the choice."""
    models = pair(torch.float32)
    for model in models:
        model(prompt[0], labels=prompt[0]).loss.backward()
    stock, patched = (dict(model.named_parameters()) for model in models)
    for name in ("router.proj.weight", "router.scale", "router.per_expert_scale", "experts.down_proj"):
        name = f"model.layers.3.{name}"
        assert stock[name].grad.abs().max() > 0
        torch.testing.assert_close(patched[name].grad, stock[name].grad, rtol=1e-5, atol=1e-7)  # seen: 0


def test_quantize_rounds_each_row_of_each_expert_and_leaves_the_router(pair, prompt):
    model = pair(torch.float32)[1]
    layer = model.model.layers[1]
    weight, router = layer.experts.gate_up_proj.detach().clone(), layer.router.proj
    with torch.no_grad():
        before = model(prompt[0]).logits
        after = model.quantize(8)(prompt[0]).logits
    stack = layer.experts.gate_up_proj
    scale = weight.abs().amax(-1) / 127
    assert stack.weight.dtype == torch.int8
    assert torch.equal(stack.scale, scale)
    assert ((stack[2] - weight[2]).abs() <= scale[2][:, None] / 2 * 1.0001).all()
    assert layer.router.proj is router
    assert (before - after).abs().max() > 0


def test_tokens_run_through_the_experts_they_were_given_and_no_other():
    """A sum by hand, in float64, of one token after the other."""
    experts = patched_module("experts_vacc")
    config = type("Config", (), {"num_experts": 5, "hidden_size": 8, "moe_intermediate_size": 6,
                                 "hidden_activation": "gelu_pytorch_tanh"})  # fmt: skip
    module = experts.Experts(config).double()
    generator = torch.Generator().manual_seed(3)
    for stack in (module.gate_up_proj, module.down_proj):
        stack.data = torch.randn(stack.shape, generator=generator, dtype=torch.float64)
    x = torch.randn(2, 3, 8, generator=generator, dtype=torch.float64)
    weights = torch.rand(2, 3, 2, generator=generator, dtype=torch.float64)
    given = torch.tensor([[[0, 3], [3, 4], [4, 0]], [[1, 0], [3, 1], [0, 4]]])  # nobody is given 2
    module.gate_up_proj.data[2] = float("nan")
    expected = torch.zeros_like(x)
    for b, s, k in ((b, s, k) for b in range(2) for s in range(3) for k in range(2)):
        expert, token = given[b, s, k], x[b, s]
        gate, up = (module.gate_up_proj[expert] @ token).split(6)
        inner = torch.nn.functional.gelu(gate, approximate="tanh") * up
        expected[b, s] += weights[b, s, k] * (module.down_proj[expert] @ inner)
    with torch.no_grad():
        torch.testing.assert_close(module(x, weights, given), expected, rtol=1e-12, atol=1e-12)
