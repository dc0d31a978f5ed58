"""Gemma 3n and Gemma 4 E2B in parts: streams, vectors of tokens, and keys and values that later parts read."""

import copy
import json
from itertools import pairwise

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache

from gemma_deploy.checkpoint import Checkpoint, ModelConfig
from gemma_deploy.cli import cli
from gemma_deploy.errors import UsageError
from gemma_deploy.partition import recommended_points, span_bytes, spans_of
from gemma_deploy.partition.beside import Reads
from gemma_deploy.partition.mapper import ParameterMapper
from gemma_deploy.split import Bottom, ModelFactory, Passed, SplitChain, Top, Trunk, load_part, save_part
from gemma_deploy.testing import TINY_CONFIGS, TINY_PER_LAYER, write_tiny_checkpoint

# Layers 4 and 5 read the keys and values of 2, layer 6 those of 3; a prompt of 40 tokens has more than five windows.
KINDS = {
    "gemma3n_text": {"sliding_window": 6},
    "gemma4_text": {**TINY_PER_LAYER, "sliding_window": 6},
}
POINTS = {"all in the top": (1, 2), "passed through the trunk": (3, 5), "read in two parts": (4, 6)}
STEPS = 14


@pytest.fixture(scope="module", params=KINDS)
def model_type(request):
    return request.param


@pytest.fixture(scope="module")
def checkpoint(model_type, tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp(model_type) / "ck", model_type, **KINDS[model_type])


@pytest.fixture(scope="module")
def stock(checkpoint):
    return AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager", dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=POINTS)
def parts(request, model_type, checkpoint):
    return ModelFactory.create_split_models(model_type, checkpoint, *POINTS[request.param])


@pytest.fixture(scope="module")
def prompt():
    """Ids [2, 40], some of which the table of a 3n does not have, and a mask with padding on the left of the first."""
    ids = torch.randint(3, 512, (2, 40), generator=torch.Generator().manual_seed(1))
    assert (ids >= 480).any()
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    return ids, mask


def through(parts, ids, **at):
    bottom, trunk, top = parts
    kept = {key: at.pop(key) for key in ("labels", "logits_to_keep") if key in at}
    return top(trunk(bottom(ids, **at), **at), **at, **kept)


def assert_close(got, expected, tolerance=1e-5):
    """Relative to the largest logit: with a cache, sums are added up in another order."""
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


def test_logits_and_loss_are_those_of_the_whole_bit_for_bit(parts, stock, prompt):
    ids, mask = prompt
    labels = ids.masked_fill(mask == 0, -100)
    with torch.no_grad():
        expected = stock(ids, attention_mask=mask, labels=labels)
        got = through(parts, ids, attention_mask=mask, labels=labels)
        assert torch.equal(got.logits, expected.logits)
        assert torch.equal(got.loss, expected.loss)
        assert_close(through(parts, ids, attention_mask=mask, logits_to_keep=3).logits, expected.logits[:, -3:])
        hidden = parts[1](parts[0](ids, mask), mask)
    assert torch.equal(parts[2].next_tokens(hidden, mask)[:, 0], expected.logits[:, -1].argmax(-1))


def test_parts_continue_caches_that_hold_what_others_made(parts, stock, prompt):
    """A prompt in two pieces, then a token at a time; what passes is of the new tokens alone."""
    ids, mask = prompt
    tail = torch.randint(3, 500, (2, STEPS), generator=torch.Generator().manual_seed(2))
    whole, longest = torch.cat((ids, tail), 1), torch.cat((mask, torch.ones_like(tail)), 1)
    outside = [DynamicCache(config=part.config) for part in parts]
    with torch.no_grad():
        expected = stock(whole, attention_mask=longest).logits
        for start, stop in pairwise([0, 13, 40, *range(41, 40 + STEPS + 1)]):
            at = {"attention_mask": longest[:, :stop]}
            got = through(parts, whole[:, start:stop], **at, use_cache=True).logits
            hidden = whole[:, start:stop]
            for part, cache in zip(parts[:2], outside, strict=False):
                hidden = part(hidden, **at, past_key_values=cache)
                assert all(tensor.shape[-2] == stop - start for pair in hidden.keys_values.values() for tensor in pair)
            real = longest[:, start:stop] == 1
            assert_close(got[real], expected[:, start:stop][real])
            assert torch.equal(parts[2](hidden, **at, past_key_values=outside[2]).logits, got)
    for part in parts:
        part.reset_cache()


@pytest.mark.parametrize(
    "how",
    [
        {},
        pytest.param({"num_beams": 3}, marks=pytest.mark.slow),
        pytest.param({"cache_implementation": "static", "disable_compile": True}, marks=pytest.mark.slow),
        pytest.param({"use_cache": False}, marks=pytest.mark.slow),
    ],
    ids=["greedy", "beams", "static", "no-cache"],
)
def test_the_chain_generates_the_whole_models_tokens(parts, stock, prompt, how):
    ids, mask = prompt
    how = {"do_sample": False, "max_new_tokens": STEPS, **how}
    got, expected = (model.generate(ids, attention_mask=mask, **how) for model in (SplitChain(parts), stock))
    assert torch.equal(got, expected)


def test_top_generates_text_with_the_others_elsewhere(parts, stock, prompt):
    ids, mask = prompt
    at = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}

    def below(ids, **at):
        with torch.no_grad():
            made = parts[1](parts[0](ids, use_cache=True, **at), use_cache=True, **at)
        return Passed.of({name: tensor.clone() for name, tensor in made.tensors.items()})  # over a wire

    got = parts[2].generate(below(ids, **at), below, **at, max_new_tokens=STEPS)
    expected = stock.generate(ids, attention_mask=mask, max_new_tokens=STEPS, do_sample=False)
    assert torch.equal(got, expected[:, 40:])
    for part in parts:
        part.reset_cache()


def test_gradients_pass_from_part_to_part(model_type, checkpoint, stock, prompt):
    """Embeddings, keys and values have gradients that come down as well."""
    parts = [part.train() for part in ModelFactory.create_split_models(model_type, checkpoint, 3, 5)]
    bottom, trunk, top = parts
    ids, mask = prompt
    h1 = bottom(ids, mask)
    entering_trunk = h1.detach().requires_grad_()
    h2 = trunk(entering_trunk, mask)
    entering_top = h2.detach().requires_grad_()
    top(entering_top, mask, labels=ids).loss.backward()
    h2.backward(entering_top.grad)
    h1.backward(entering_trunk.grad)
    whole = copy.deepcopy(stock)
    whole(ids, attention_mask=mask, labels=ids).loss.backward()
    for part in parts:
        for number, layer in enumerate(part.get_transformer_blocks()):
            for name, parameter in layer.named_parameters():
                expected = whole.model.layers[part.start_layer + number].get_parameter(name).grad
                # Of the largest number, measured: 6e-7 at most.
                close = 1e-5 * float(expected.abs().max())
                torch.testing.assert_close(parameter.grad, expected, rtol=0, atol=close, msg=name)
    found = torch.cat([part.model.embed_tokens_per_layer.weight.grad for part in parts], dim=1)
    expected = whole.model.embed_tokens_per_layer.weight.grad
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    table = bottom.get_embeddings().weight.grad + top.get_lm_head().weight.grad
    expected = whole.model.embed_tokens.weight.grad
    torch.testing.assert_close(table, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_parts_are_written_saved_and_made_of_a_model_in_memory(model_type, checkpoint, stock, prompt, tmp_path):
    out = tmp_path / "parts"
    shown = CliRunner().invoke(cli, ["split", str(checkpoint), str(out), "--points", "3,5"], catch_exceptions=False)
    assert shown.exit_code == 0, shown.output
    with torch.no_grad():
        expected = stock(prompt[0]).logits
        chain = SplitChain([load_part(out / name, dtype=torch.float32) for name in ("bottom", "trunk", "top")])
        assert torch.equal(chain(prompt[0]).logits, expected)
        save_part(chain.parts[1], tmp_path / "again")
        again = load_part(tmp_path / "again")
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in chain.parts[1].state_dict().items())
        held, config = stock.state_dict(), stock.config
        made = [
            cls.from_pretrained_split(held, config, start_layer=start, end_layer=stop)
            for cls, start, stop in ((Bottom, 0, 3), (Trunk, 3, 5), (Top, 5, 7))
        ]
        assert torch.equal(SplitChain(made)(prompt[0]).logits, expected)
    whole = load_file(checkpoint / "model.safetensors")
    tables = [load_file(out / name / "model.safetensors") for name in ("bottom", "trunk", "top")]
    for name, axis in (("embed_tokens_per_layer", 1), ("per_layer_model_projection", 0)):
        shares = [table[f"model.{name}.weight"] for table in tables]
        assert torch.equal(torch.cat(shares, axis), whole[f"model.{name}.weight"])
    assert [json.loads((out / "split.json").read_text())["parts"][i]["bytes"] for i in range(3)] == [
        span_bytes(Checkpoint.open(checkpoint).config, span) for span in spans_of(7, (3, 5))
    ]


def test_what_a_part_lacks_is_said(model_type, checkpoint, prompt):
    bottom, trunk, top = ModelFactory.create_split_models(model_type, checkpoint, 3, 5)
    with torch.no_grad():
        first = bottom(prompt[0])
        second = trunk(first)
    with pytest.raises(UsageError, match="this trunk part was given no inputs_embeds, keys and values of layer 2"):
        trunk(first.hidden_states)
    tensors = second.tensors
    assert sorted(name for name in tensors if "." in name) == ["key.2", "key.3", "value.2", "value.3"]
    del tensors["value.3"]
    with pytest.raises(UsageError, match="no part gives these tensors"):
        Passed.of(tensors)
    del tensors["key.3"]
    with pytest.raises(UsageError, match="this top part was given no keys and values of layer 3"):
        top(Passed.of(tensors))


def test_a_bottom_of_embeddings(model_type, checkpoint, stock, prompt):
    """Gemma 3n goes without rows of the table then, as the stock class does; of Gemma 4 ids are asked for."""
    parts = ModelFactory.create_split_models(model_type, checkpoint, 3, 5)
    embeds = stock.model.embed_tokens(prompt[0]).detach()
    if model_type == "gemma4_text":
        with pytest.raises(UsageError, match="embeddings do not say which tokens they are"):
            parts[0](embeds)
        return
    with torch.no_grad():
        expected = stock(inputs_embeds=embeds).logits
        assert torch.equal(through(parts, embeds).logits, expected)


def test_whose_keys_and_values_the_layers_of_a_part_read():
    config = ModelConfig.from_dict(TINY_CONFIGS["gemma4_text"] | TINY_PER_LAYER, "config.json")
    bottom, trunk, top = (Reads.of(config, span) for span in spans_of(7, (3, 5)))
    assert (bottom.places, bottom.first_sharing, bottom.passed) == ((0, 1, 2), None, (2,))
    assert (trunk.places, trunk.first_sharing, trunk.borrowed) == ((0, 1), 1, {2: 1})
    assert (trunk.made, trunk.passed) == ({3: 0}, (2, 3))
    assert (top.places, top.first_sharing, top.borrowed, top.passed) == ((0, 1), 0, {2: 0, 3: 1}, ())


def test_a_table_of_vectors_is_spread_over_the_parts():
    """So the parts of an E2B, most of whose bytes are that table, can be of one size."""
    raw = TINY_CONFIGS["gemma4_text"] | TINY_PER_LAYER | {"hidden_size_per_layer_input": 256}
    config = ModelConfig.from_dict(raw, "config.json")
    spans = spans_of(7, recommended_points(config))
    sizes = [span_bytes(config, span) for span in spans]
    assert max(sizes) < 2 * 512 * 7 * 256  # the whole table
    for span in spans:
        mapper = ParameterMapper(config, span)
        count = (span.stop - span.start) * 256
        assert mapper.shapes["model.embed_tokens_per_layer.weight"] == (512, count)
        assert mapper.shapes["model.per_layer_model_projection.weight"] == (count, 64)
        assert "model.per_layer_projection_norm.weight" in mapper.sources
