"""Patched model = stock eager class, bit for bit, on prompts of five windows with left padding."""

import functools

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

from gemma_deploy.architectures import find
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.staging import stage_checkpoint
from gemma_deploy.testing import write_tiny_checkpoint

SLOW = pytest.mark.slow


@functools.cache
def shared_pair(checkpoint_dir, staged_dir, dtype=torch.float32):
    """Stock and patched model for tests that change neither."""
    return pair(checkpoint_dir, staged_dir, dtype)


def pair(checkpoint_dir, staged_dir, dtype=torch.float32, auto=AutoModelForCausalLM, **kwargs):
    torch.manual_seed(0)
    stock = auto.from_pretrained(checkpoint_dir, attn_implementation="eager", dtype=dtype, **kwargs).eval()
    patched = auto.from_pretrained(staged_dir, trust_remote_code=True, dtype=dtype, **kwargs).eval()
    assert type(patched).__module__.startswith("transformers_modules")
    return stock, patched


@pytest.fixture(scope="module")
def prompt():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 500, (2, 40), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    return ids, mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_and_hidden_states_are_bit_identical(checkpoint_dir, staged_dir, prompt, dtype):
    stock, patched = shared_pair(checkpoint_dir, staged_dir, dtype)
    ids, mask = prompt
    with torch.no_grad():
        expected = stock(ids, output_hidden_states=True, output_attentions=True)
        got = patched(ids, output_hidden_states=True, output_attentions=True)
        assert torch.equal(expected.logits, got.logits)
        assert len(expected.hidden_states) == len(got.hidden_states)
        assert all(map(torch.equal, expected.hidden_states, got.hidden_states))
        assert all(map(torch.equal, expected.attentions, got.attentions))
        assert torch.equal(stock(ids, attention_mask=mask).logits, patched(ids, attention_mask=mask).logits)


def test_the_window_bites(checkpoint_dir, staged_dir, prompt, model_type):
    if model_type == "gemma":
        pytest.skip("Gemma 1 has no window")
    _, patched = pair(checkpoint_dir, staged_dir)
    with torch.no_grad():
        before = patched(prompt[0]).logits
        patched.config.sliding_window = 9
        after = patched(prompt[0]).logits
    assert torch.equal(before[:, :8], after[:, :8])
    assert not torch.equal(before[:, 8:], after[:, 8:])


@pytest.mark.parametrize(
    "model_type",
    ["gemma2", "gemma3_text", "gemma4_text"]
    + [pytest.param(one, marks=pytest.mark.slow) for one in ("gemma", "vaultgemma")],
    indirect=True, scope="session",
)  # fmt: skip
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"num_beams": 3},
        {"do_sample": True, "temperature": 0.8, "top_k": 20},
        {"cache_implementation": "static", "disable_compile": True},
        pytest.param({"use_cache": False}, marks=pytest.mark.slow),
    ],
    ids=["greedy", "beams", "sampling", "static-cache", "no-cache"],
)
def test_generate_gives_the_stock_tokens(checkpoint_dir, staged_dir, prompt, how):
    stock, patched = shared_pair(checkpoint_dir, staged_dir)
    ids, mask = prompt
    results = []
    for model in (stock, patched):
        torch.manual_seed(7)
        how = {"do_sample": False, **how}
        results.append(model.generate(ids, attention_mask=mask, max_new_tokens=20, **how))
    assert torch.equal(*results)


def test_legacy_tuple_continues_like_a_cache(checkpoint_dir, staged_dir, prompt):
    stock, patched = pair(checkpoint_dir, staged_dir)
    ids = prompt[0]
    with torch.no_grad():
        whole = stock(ids).logits
        cache = patched(ids[:, :30], use_cache=True).past_key_values
        full = patched.config.__class__.__name__ == "GemmaConfig"
        patched.config.iter_num = 0
        mask = torch.ones_like(ids[:, :30])
        legacy = patched(ids[:, :30], attention_mask=mask, position_ids=mask.cumsum(-1) - 1).past_key_values
        patched.config.iter_num = None
        assert isinstance(legacy, tuple)
        out = patched(ids[:, 30:], past_key_values=legacy, use_cache=True)
    assert isinstance(out.past_key_values, tuple)
    assert out.past_key_values[0][0].shape[2] == 40
    if full:
        assert torch.equal(cache.layers[0].keys, legacy[0][0])
    torch.testing.assert_close(out.logits, whole[:, 30:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_sequence_classification_pools_the_last_real_token(checkpoint_dir, staged_dir, prompt, side, model_type):
    if find(model_type).patched.classifier is None:
        pytest.skip("transformers has no such class")
    stock, patched = pair(checkpoint_dir, staged_dir, auto=AutoModelForSequenceClassification, num_labels=3)
    patched.score.weight.data.copy_(stock.score.weight.data)
    ids, mask = prompt[0].clone(), torch.ones_like(prompt[0])
    pads = slice(0, 7) if side == "left" else slice(33, 40)
    ids[0, pads], mask[0, pads] = 0, 0
    with torch.no_grad():
        assert torch.equal(stock(ids, attention_mask=mask).logits, patched(ids, attention_mask=mask).logits)


def test_base_model_loads(checkpoint_dir, staged_dir, prompt):
    stock, patched = pair(checkpoint_dir, staged_dir, auto=AutoModel)
    with torch.no_grad():
        assert torch.equal(stock(prompt[0]).last_hidden_state, patched(prompt[0]).last_hidden_state)


def test_embedding_scale_is_rounded_as_recorded(staged_dir):
    _, patched = None, AutoModelForCausalLM.from_pretrained(staged_dir, trust_remote_code=True)
    module = __import__(type(patched).__module__.rsplit(".", 1)[0] + ".layers_vacc", fromlist=["rounded_sqrt"])
    table = {640: 25.25, 3072: 55.5, 3584: 59.75, 4608: 68.0}  # docs/gemma-facts.md
    for hidden, expected in table.items():
        assert module.rounded_sqrt(hidden, torch.bfloat16, "exact") == expected
        assert module.rounded_sqrt(hidden, torch.float32, "bf16") == expected
        exact = torch.tensor(hidden**0.5, dtype=torch.float32).item()
        assert module.rounded_sqrt(hidden, torch.float32, "exact") == exact


def test_quantize_swaps_the_linears(staged_dir, prompt):
    model = AutoModelForCausalLM.from_pretrained(staged_dir, trust_remote_code=True, dtype=torch.float32).eval()
    weight = model.model.layers[1].mlp.down_proj.weight.detach().clone()
    with torch.no_grad():
        before = model(prompt[0]).logits
        after = model.quantize(8)(prompt[0]).logits
    linear = model.model.layers[1].mlp.down_proj
    assert linear.weight.dtype == torch.int8
    scale = weight.abs().amax(1) / 127
    torch.testing.assert_close(linear.scale, scale, rtol=0, atol=0)
    assert ((linear.weight * scale[:, None] - weight).abs() <= scale[:, None] / 2 * 1.0001).all()
    kinds = [type(module).__name__ for module in model.modules()].count("QuantizedLinearPerChannel")
    layers = Checkpoint.open(staged_dir).config.layers
    assert kinds == sum(len(layer.linears) for layer in layers)  # seven, or six where keys are values
    assert 0 < (before - after).abs().max() < 0.2 * before.abs().max()
    with pytest.raises(ValueError, match="called twice"):
        model.quantize(8)
    with pytest.raises(ValueError, match="per-channel int8"):
        model.quantize(4)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient-checkpointing"])
def test_loss_and_gradients_are_the_stock_ones(checkpoint_dir, staged_dir, prompt, checkpointing):
    ids, mask = prompt
    labels = ids.masked_fill(mask == 0, -100)
    losses, gradients = [], []
    for model in pair(checkpoint_dir, staged_dir):
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable()
            assert all(layer.gradient_checkpointing for layer in model.model.layers)
        loss = model(ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert torch.equal(*losses)
    stock, patched = gradients
    assert stock.keys() == patched.keys()
    assert all(float(gradient.abs().max()) > 0 for gradient in stock.values())
    assert [name for name in stock if not torch.equal(stock[name], patched[name])] == []


def test_checkpointing_recomputes_the_layers(staged_dir, prompt):
    model = AutoModelForCausalLM.from_pretrained(staged_dir, trust_remote_code=True, dtype=torch.float32).train()
    model.activation_checkpointing_enable()
    calls = []
    model.model.layers[1].self_attn.register_forward_hook(lambda *_: calls.append(1))
    model(prompt[0], labels=prompt[0]).loss.backward()
    assert len(calls) == 2


def test_assisted_decoding_gives_the_greedy_tokens(staged_dir, prompt):
    model, assistant = (
        AutoModelForCausalLM.from_pretrained(staged_dir, trust_remote_code=True, dtype=torch.float32).eval()
        for _ in range(2)
    )
    with torch.no_grad():
        for layer in assistant.model.layers:  # one that is often wrong
            layer.mlp.up_proj.weight.copy_(layer.mlp.up_proj.weight.roll(1, 0))
    ids = prompt[0][:1]
    greedy = model.generate(ids, max_new_tokens=24, do_sample=False)
    alone = assistant.generate(ids, max_new_tokens=24, do_sample=False)
    assert not torch.equal(greedy, alone)
    assert torch.equal(greedy, model.generate(ids, max_new_tokens=24, do_sample=False, assistant_model=assistant))
    lookup = model.generate(ids, max_new_tokens=24, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(greedy, lookup)


@pytest.mark.parametrize(
    "model_type", ["gemma2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma", "gemma3_text"))],
    indirect=True,
)  # fmt: skip
@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes_loads_it_like_the_stock_class(model_type, tmp_path, prompt, bits):
    """On a CPU as well, from bitsandbytes 0.48 on."""
    wanted = {8: {"load_in_8bit": True}, 4: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}[bits]
    # a multiple of the blocks of 64 that the 4-bit kernel wants
    checkpoint = write_tiny_checkpoint(tmp_path / "checkpoint", model_type, intermediate_size=192)
    staged = stage_checkpoint(checkpoint, tmp_path / "staged")
    how = {"quantization_config": BitsAndBytesConfig(**wanted), "device_map": "cpu"}
    stock, patched = pair(checkpoint, staged, **how)
    kinds = [type(module).__name__ for module in patched.modules()]
    assert kinds.count({8: "Linear8bitLt", 4: "Linear4bit"}[bits]) == 7 * patched.config.num_hidden_layers
    with torch.no_grad():
        assert torch.equal(stock(prompt[0]).logits, patched(prompt[0]).logits)
        whole = pair(checkpoint, staged)[1](prompt[0]).logits
        assert not torch.equal(whole, patched(prompt[0]).logits)
