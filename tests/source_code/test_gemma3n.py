"""The patched Gemma 3n is the stock one, bit for bit: streams, shared keys and values, sparse MLPs, windows."""

import pytest
import torch
from transformers import Gemma3nForCausalLM, Gemma3nTextConfig
from transformers.cache_utils import DynamicCache

from gemma_deploy.patched import patched_module

WINDOW = 6
SIZES = {
    "vocab_size": 300, "vocab_size_per_layer_input": 280, "hidden_size": 48, "intermediate_size": [80, 96] * 5,
    "num_hidden_layers": 10, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12,
    "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 4, "laurel_rank": 6, "sliding_window": WINDOW,
    "activation_sparsity_pattern": [0.95] * 3 + [0.0] * 7, "max_position_embeddings": 256, "altup_num_inputs": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"] * 2 + ["full_attention"]
    + ["sliding_attention"] * 2 + ["full_attention"],
}  # fmt: skip


@pytest.fixture(scope="module")
def stock():
    """Random in every weight, norms and scales included, so that each of them is seen."""
    torch.manual_seed(0)
    model = Gemma3nForCausalLM._from_config(Gemma3nTextConfig(**SIZES), attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            wide = "norm" in name or "scale" in name
            parameter.copy_(torch.randn_like(parameter) * (0.4 if wide else 0.15) + (1 if wide else 0))
    return model


def patched_of(stock, **changes):
    modeling = patched_module("modeling_gemma3n_vacc")
    config = patched_module("configuration_gemma3n_vacc").Gemma3nTextConfig(**(SIZES | changes))
    config._attn_implementation = "eager"
    model = modeling.Gemma3nForCausalLM(config)
    found = model.load_state_dict(stock.state_dict(), strict=False)
    assert not found.missing_keys
    assert not found.unexpected_keys
    return model.float().eval()


@pytest.fixture(scope="module")
def patched(stock):
    return patched_of(stock)


@pytest.fixture(scope="module")
def batch():
    """Five windows and more, the first row padded on the left; ids that the per-layer table does not have."""
    ids = torch.randint(3, 300, (2, 5 * WINDOW + 3), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    assert (ids >= 280).any()
    return ids, mask


def test_logits_are_those_of_the_stock_class(stock, patched, batch):
    ids, mask = batch
    with torch.no_grad():
        assert torch.equal(stock(ids).logits, patched(ids).logits)
        assert torch.equal(stock(ids, attention_mask=mask).logits, patched(ids, attention_mask=mask).logits)
        embeds = stock.model.embed_tokens(ids)
        assert torch.equal(stock(inputs_embeds=embeds).logits, patched(inputs_embeds=embeds).logits)


def test_states_of_layers_are_those_of_the_stock_class(stock, patched, batch):
    with torch.no_grad():
        one, other = (model(batch[0], output_hidden_states=True, output_attentions=True) for model in (stock, patched))
    assert len(one.hidden_states) == len(other.hidden_states) == SIZES["num_hidden_layers"] + 1
    assert all(map(torch.equal, one.hidden_states, other.hidden_states))
    assert all(map(torch.equal, one.attentions, other.attentions))


def test_in_bfloat16(stock, batch):
    ids, mask = batch
    config = Gemma3nTextConfig(**SIZES)
    one = Gemma3nForCausalLM._from_config(config, attn_implementation="eager", dtype=torch.bfloat16).eval()
    one.load_state_dict(stock.state_dict())
    other = patched_of(stock).bfloat16()
    with torch.no_grad():
        assert torch.equal(one(ids, attention_mask=mask).logits, other(ids, attention_mask=mask).logits)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}])
def test_generate_gives_the_stock_tokens(stock, patched, batch, how):
    ids, mask = batch
    found = [model.generate(ids, attention_mask=mask, max_new_tokens=16, do_sample=False, pad_token_id=0, **how)
             for model in (stock, patched)]  # fmt: skip
    assert torch.equal(*found)


def test_chunks_are_the_whole(stock, patched, batch):
    """Behind the window a sharing layer reads keys that the window's cache no longer holds."""
    ids, found = batch[0], []
    with torch.no_grad():
        for model in (stock, patched):
            cache = DynamicCache(config=model.config)
            found.append(torch.cat([model(piece, past_key_values=cache).logits for piece in ids.split(10, dim=1)], 1))
        whole = stock(ids).logits
    assert torch.equal(*found)
    torch.testing.assert_close(found[0], whole, rtol=0, atol=3e-4)  # of 30; 4.5e-5 seen, of either class


def breakage(name):
    """A patched model with one fact wrong."""
    modeling = patched_module("modeling_gemma3n_vacc")

    def change(model, monkeypatch):
        text = model.model
        if name == "window":
            model.config.sliding_window = WINDOW + 1
        elif name == "1 + w":
            monkeypatch.setattr(modeling.GainNorm, "forward", lambda self, x: x if self.weight is None else (
                x * (x.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt() * (1 + self.weight)))  # fmt: skip
        elif name == "no v_norm":
            for layer in text.layers:
                layer.self_attn.v_norm = torch.nn.Identity()
        elif name == "another layer's keys":
            right = modeling.SharedAndPerLayer.__init__

            def init(self, kinds, shared, per_layer):
                right(self, kinds, shared, per_layer)
                own = len(kinds) - shared
                self.sources[own:] = [kinds.index(kind) for kind in kinds[own:]]

            monkeypatch.setattr(modeling.SharedAndPerLayer, "__init__", init)
        elif name == "the neighbour's embedding":
            own = text.per_layer_inputs
            monkeypatch.setattr(text, "per_layer_inputs", lambda *args: own(*args).roll(1, 2))
        elif name == "no sparsity":
            text.layers[0].mlp.quantile = None
        elif name == "own embedding for the first stream too":
            monkeypatch.setattr(modeling.torch, "cat", with_first_stream(modeling.torch.cat))
        elif name == "no correction of scale":
            model.config.altup_correct_scale = False
        elif name == "no laurel":
            for layer in text.layers:
                layer.laurel.forward = torch.zeros_like
        elif name == "the deviation of a sample":
            std = torch.std
            monkeypatch.setattr(
                modeling.torch, "std", lambda *args, unbiased, **more: std(*args, unbiased=True, **more)
            )
        elif name == "no root of two":
            monkeypatch.setattr(modeling.math, "sqrt", lambda value: 1.0)
        elif name == "correction without one":
            for layer in text.layers:
                layer.altup.correction_coefs = Less(layer.altup.correction_coefs)

    return change


class Less(torch.nn.Module):
    """What a linear makes, less one."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return self.linear(x) - 1


def with_first_stream(cat):
    def joined(parts, dim=0):
        first = parts[0]
        if first.dim() == 4 and dim == 2 and first.shape[2] == 1:
            return cat((first + 1e-2, parts[1]), dim)
        return cat(parts, dim)

    return joined


@pytest.mark.parametrize(
    "name",
    ["window", "1 + w", "no v_norm", "another layer's keys", "the neighbour's embedding", "no sparsity",
     "own embedding for the first stream too", "no correction of scale", "no laurel", "the deviation of a sample",
     "no root of two", "correction without one"],
)  # fmt: skip
def test_a_wrong_fact_is_seen(stock, batch, monkeypatch, name):
    model = patched_of(stock)
    breakage(name)(model, monkeypatch)
    with torch.no_grad():
        found = model(batch[0]).logits
        monkeypatch.undo()
        assert (found - stock(batch[0]).logits).abs().max() > 1e-3
