"""The parts called one after the other, as people write it: logits, loss, text and gradients of the whole model."""

import dataclasses
import math
import re
from itertools import pairwise

import pytest
import torch
from transformers import DynamicCache, Gemma2Config
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from gemma_deploy.errors import CheckpointError, UsageError
from gemma_deploy.split import Bottom, ModelFactory, Sampling, SplitChain, Top, Trunk, load_part

STEPS = 16


def through(parts, ids, **at):
    """Logits and the rest, as in the documents; `at` goes to all parts."""
    bottom, trunk, top = parts
    kept = {key: at.pop(key) for key in ("labels", "logits_to_keep") if key in at}
    return top(trunk(bottom(ids, **at), **at), **at, **kept)


def forget(parts):
    for part in parts:
        part.reset_cache()


def padded(prompt, side):
    ids, mask = prompt
    return ids, {"left": mask, "right": mask.flip(1), "none": None}[side]


def assert_close(got, expected, tolerance=1e-5):
    """Relative to the largest logit. Measured: 0 without a cache, 1.6e-6 at most with one."""
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


def test_top_gives_logits(parts, stock, prompt):
    bottom, trunk, top = parts
    with torch.no_grad():
        h1 = bottom(prompt[0])
        h2 = trunk(h1)
        out = top(h2)
        expected = stock(prompt[0])
    assert h1.shape == h2.shape == (2, 40, 64)
    assert torch.equal(out.logits, expected.logits)
    assert out.loss is None
    assert out.past_key_values is None


@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_loss_and_logits_of_padded_batches(parts, stock, prompt, side):
    ids, mask = padded(prompt, side)
    labels = ids.masked_fill(mask == 0, -100) if mask is not None else ids
    with torch.no_grad():
        expected = stock(ids, attention_mask=mask, labels=labels)
        got = through(parts, ids, attention_mask=mask, labels=labels)
        assert torch.equal(got.logits, expected.logits)
        assert torch.equal(got.loss, expected.loss)
        for kept in (1, 3, torch.tensor([0, 38])):
            some = through(parts, ids, attention_mask=mask, logits_to_keep=kept).logits
            assert_close(some, stock(ids, attention_mask=mask, logits_to_keep=kept).logits)


def test_a_call_remembers_nothing_unless_asked_to(parts, prompt):
    with torch.no_grad():
        first, second = (through(parts, prompt[0]).logits for _ in range(2))
    assert torch.equal(first, second)
    assert all(part.cache is None for part in parts)


@pytest.mark.parametrize("side", ["left", "none"])
def test_parts_continue_their_own_caches(parts, stock, prompt, side):
    """Prompt in two pieces, then one token at a time, far past the window."""
    ids, mask = padded(prompt, side)
    mask = torch.ones_like(ids) if mask is None else mask
    tail = torch.randint(3, 500, (2, STEPS), generator=torch.Generator().manual_seed(2))
    whole, longest = torch.cat((ids, tail), 1), torch.cat((mask, torch.ones_like(tail)), 1)
    forget(parts)
    with torch.no_grad():
        expected = stock(whole, attention_mask=longest).logits
        edges = [0, 13, 40, *range(41, 40 + STEPS + 1)]
        for start, stop in pairwise(edges):
            got = through(parts, whole[:, start:stop], attention_mask=longest[:, :stop], use_cache=True)
            real = longest[:, start:stop] == 1  # what padding gives depends on how much is computed at once
            assert_close(got.logits[real], expected[:, start:stop][real])
            assert got.past_key_values is parts[2].cache
    layers = [len(part.cache.layers) for part in parts]
    assert layers == [part.num_layers for part in parts]
    if stock.config.model_type != "gemma":  # layers with a window keep that alone
        assert min(layer.keys.shape[2] for layer in parts[0].cache.layers) == stock.config.sliding_window - 1
    forget(parts)
    with torch.no_grad():
        again = through(parts, ids, attention_mask=mask, use_cache=True).logits
        assert_close(again[mask == 1], expected[:, :40][mask == 1])
    forget(parts)


def test_caches_may_come_from_outside(parts, stock, prompt):
    ids = prompt[0]
    caches = [DynamicCache(config=part.config) for part in parts]
    with torch.no_grad():
        expected = stock(ids).logits
        for start, stop in ((0, 30), (30, 31), (31, 40)):
            hidden = ids[:, start:stop]
            for part, cache in zip(parts[:2], caches, strict=False):
                hidden = part(hidden, past_key_values=cache)
            out = parts[2](hidden, past_key_values=caches[2])
            assert out.past_key_values is caches[2]
            assert_close(out.logits, expected[:, start:stop])
    assert all(part.cache is None for part in parts)


def greedy(stock, ids, mask, **changes):
    how = {"max_new_tokens": STEPS, "do_sample": False, **changes}
    return stock.generate(ids, attention_mask=mask, **how)[:, ids.shape[1] :]


def test_a_loop_of_one_token_at_a_time_writes_what_the_whole_model_writes(parts, stock, prompt):
    ids = prompt[0]
    forget(parts)
    bottom, trunk, top = parts
    written, tokens = [], ids
    for _ in range(STEPS):
        with torch.no_grad():
            hidden = trunk(bottom(tokens, use_cache=True), use_cache=True)
        tokens = top.next_tokens(hidden, use_cache=True)
        written.append(tokens)
    forget(parts)
    assert torch.equal(torch.cat(written, 1), greedy(stock, ids, None))


def below(parts, seen=None):
    """What turns tokens into hidden states for the top part."""

    def hidden(ids, **at):
        if seen is not None:
            seen.append((ids, at))
        with torch.no_grad():
            return parts[1](parts[0](ids, use_cache=True, **at), use_cache=True, **at)

    return hidden


@pytest.mark.parametrize("side", ["left", "none"])
def test_top_generates_text(parts, stock, prompt, side):
    ids, mask = padded(prompt, side)
    at = {} if mask is None else {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
    forget(parts)
    seen = []
    run = below(parts, seen)
    with torch.no_grad():
        parts[2](torch.ones(2, 3, 64), use_cache=True)  # of a text before: forgotten
    got = parts[2].generate(run(ids, **at), run, **at, max_new_tokens=STEPS)
    assert torch.equal(got, greedy(stock, ids, mask))
    assert [tokens.shape for tokens, _ in seen] == [(2, 40), *[(2, 1)] * (STEPS - 1)]
    if mask is not None:  # places of the whole model's own generate
        assert [place["position_ids"].tolist() for _, place in seen[1:3]] == [[[33], [40]], [[34], [41]]]
    forget(parts)


def test_generation_ends_at_a_stop_token(parts, stock, monkeypatch):
    ids = torch.randint(3, 500, (2, 40), generator=torch.Generator().manual_seed(5))
    free = greedy(stock, ids, None).tolist()

    def ends(*stops):
        return [min(row.index(stop) if stop in row else STEPS for stop in stops) for row in free]

    pairs = [(a, b) for a in free[0] for b in free[1] if max(ends(a, b)) < STEPS - 1 and len(set(ends(a, b))) == 2]
    stops = (1, *pairs[-1])  # the sequences end one after the other
    expected = greedy(stock, ids, None, eos_token_id=list(stops))
    assert expected.shape[1] == max(ends(*stops)) + 1
    assert (expected[:, -1] == 0).sum() == 1
    top, run = parts[2], below(parts)
    monkeypatch.setattr(top, "model_config", dataclasses.replace(top.model_config, eos_token_ids=stops))
    forget(parts)
    assert torch.equal(top.generate(run(ids), run, max_new_tokens=STEPS), expected)
    forget(parts)


@pytest.mark.parametrize("how", [{"temperature": 0.7, "top_k": 12}, {"temperature": 1.3, "top_k": 0, "top_p": 0.8}])
def test_sampling_is_transformers_sampling(parts, stock, prompt, how):
    ids, run = prompt[0], below(parts)
    torch.manual_seed(11)
    expected = greedy(stock, ids, None, do_sample=True, **how)
    forget(parts)
    torch.manual_seed(11)
    got = parts[2].generate(run(ids), run, max_new_tokens=STEPS, sampling=Sampling(**how))
    assert torch.equal(got, expected)
    assert not torch.equal(got, greedy(stock, ids, None))
    forget(parts)


@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_the_next_token_follows_the_last_one_that_is_no_padding(parts, stock, prompt, side):
    ids, mask = padded(prompt, side)
    last = torch.tensor([32, 39]) if side == "right" else torch.tensor([39, 39])
    if side == "right":
        mask = torch.ones_like(ids)
        mask[0, 33:] = 0
    with torch.no_grad():
        expected = stock(ids, attention_mask=mask).logits[torch.arange(2), last].argmax(-1, keepdim=True)
        hidden = parts[1](parts[0](ids, mask), mask)
    assert torch.equal(parts[2].next_tokens(hidden, mask), expected)


def test_gradients_pass_from_part_to_part(model_type, checkpoint_dir, stock, prompt):
    """Each part on its own machine: hidden states go up, their gradients come down."""
    bottom, trunk, top = (part.train() for part in ModelFactory.create_split_models(model_type, checkpoint_dir, 1, 2))
    ids, mask = prompt
    h1 = bottom(ids, mask)
    entering_trunk = h1.detach().requires_grad_()
    h2 = trunk(entering_trunk, mask)
    entering_top = h2.detach().requires_grad_()
    top(entering_top, mask, labels=ids).loss.backward()
    h2.backward(entering_top.grad)
    h1.backward(entering_trunk.grad)
    stock.zero_grad()
    stock(ids, attention_mask=mask, labels=ids).loss.backward()
    for part in (bottom, trunk, top):
        for name, parameter in part.model.layers[0].named_parameters():
            expected = stock.model.layers[part.start_layer].get_parameter(name).grad
            torch.testing.assert_close(parameter.grad, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    both = bottom.get_embeddings().weight.grad + top.get_lm_head().weight.grad
    expected = stock.model.embed_tokens.weight.grad
    torch.testing.assert_close(both, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    stock.zero_grad()


def test_the_modules_of_a_part(parts, stock, prompt):
    bottom, _, top = parts
    ids = prompt[0]
    layers = stock.config.num_hidden_layers
    assert [(part.start_layer, part.end_layer, part.num_layers) for part in parts] == [
        (0, 1, 1), (1, 2, 1), (2, layers, layers - 2),
    ]  # fmt: skip
    for part in parts:
        assert [len(part.get_transformer_blocks())] == [part.num_layers]
        found = [re.search(part.get_layer_name_pattern(), name) for name, _ in part.named_parameters()]
        numbers = {int(match.group().rpartition(".")[2]) for match in found if match}
        assert numbers == set(range(part.num_layers))
        assert sum(match is None for match in found) == {"bottom": 1, "trunk": 0, "top": 2}[part.kind]
    with torch.no_grad():
        embedded = bottom.get_embeddings()(ids)
        assert_close(embedded, stock.model.embed_tokens.weight[ids] * math.sqrt(64))
        assert bottom.apply_position_encoding(embedded, torch.arange(40)[None]) is embedded
        for entering in (bottom(embedded), bottom(inputs_embeds=embedded)):
            assert torch.equal(entering, bottom(ids))
        normed = top.get_final_norm()(_before_norm(stock, ids))
        assert torch.equal(top.head(normed), stock(ids).logits)
        raw = top.get_lm_head()(normed)
    cap = stock.config.to_dict().get("final_logit_softcapping")
    assert torch.equal(top.head(normed), raw if cap is None else torch.tanh(raw / cap) * cap)
    with pytest.raises(ValueError, match="exactly one"):
        bottom()


def _before_norm(stock, ids):
    """What enters the final norm."""
    seen = []
    hook = stock.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    stock(ids)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_prepared_masks_are_transformers_masks_and_are_taken_back(parts, stock, prompt, side):
    ids, mask = padded(prompt, side)
    bottom, _, top = parts
    with torch.no_grad():
        hidden = bottom(ids, mask)
    about = {"config": stock.config, "inputs_embeds": hidden, "attention_mask": mask, "past_key_values": None}
    expected = {"full_attention": create_causal_mask(**about)}
    if stock.config.model_type != "gemma":
        expected["sliding_attention"] = create_sliding_window_causal_mask(**about)
    for part in parts:
        kinds = set(part.model_config.layer_types[part.start_layer : part.end_layer])
        found = part.prepare_attention_mask(mask, hidden)
        assert isinstance(found, torch.Tensor) == (len(kinds) == 1)
        for kind in kinds:
            made = found if len(kinds) == 1 else found[kind]
            assert made.shape == (2, 1, 40, 40)
            seen = expected[kind].expand_as(made) >= 0
            assert torch.equal(made == 0, seen)
            assert (made[~seen] == torch.finfo(torch.float32).min).all()
    with torch.no_grad():
        prepared = top.prepare_attention_mask(mask, hidden)
        assert torch.equal(top(hidden, prepared).logits, top(hidden, mask).logits)


def test_a_part_of_a_model_in_memory(parts, stock, prompt):
    state = stock.state_dict()
    made = (
        Bottom.from_pretrained_split(state, stock.config, end_layer=1),
        Trunk.from_pretrained_split(state, stock.config, start_layer=1, end_layer=2),
        Top.from_pretrained_split(state, stock.config.to_dict(), start_layer=2),
    )
    with torch.no_grad():
        expected = stock(prompt[0]).logits
        assert torch.equal(through(made, prompt[0]).logits, expected)
        assert torch.equal(SplitChain(made)(prompt[0]).logits, expected)
    for part in made:  # of its own: training it leaves the model alone
        assert not {parameter.data_ptr() for parameter in part.parameters()} & {
            tensor.data_ptr() for tensor in state.values()
        }
    half = Trunk.from_pretrained_split(state, stock.config, start_layer=1, end_layer=2, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    rest = {name: value for name, value in state.items() if "layers.1.mlp.up" not in name}
    with pytest.raises(CheckpointError, match=r"missing: model\.layers\.0\.mlp\.up_proj\.weight"):
        Trunk.from_pretrained_split(rest, stock.config, start_layer=1, end_layer=2)


@pytest.mark.parametrize(
    ("part", "layers"),
    [
        (Bottom, {"start_layer": 1, "end_layer": 2}),
        (Bottom, {}),
        (Trunk, {"start_layer": 2, "end_layer": 2}),
        (Trunk, {"start_layer": 1, "end_layer": 99}),
        (Top, {"start_layer": 0}),
        (Top, {"start_layer": 1, "end_layer": 2}),
    ],
)
def test_layers_that_are_no_such_part_are_refused(stock, part, layers):
    with pytest.raises(UsageError, match=f"are no {part.kind} part"):
        part.from_pretrained_split(stock.state_dict(), stock.config, **layers)


def test_a_head_of_its_own_stays_one(tmp_path):
    """Transformers 5 keeps a head that differs from the table, although the config says tied."""
    from transformers import Gemma2ForCausalLM

    from gemma_deploy.testing import TINY_CONFIGS

    model = Gemma2ForCausalLM(Gemma2Config(**TINY_CONFIGS["gemma2"], attn_implementation="eager")).float().eval()
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    top = Top.from_pretrained_split(model.state_dict(), model.config, start_layer=2)
    assert torch.equal(top.get_lm_head().weight, model.lm_head.weight)
    assert not torch.equal(top.get_lm_head().weight, model.model.embed_tokens.weight)


def test_figures_of_memory(parts, stock):
    for part in parts:
        assert part.num_parameters() == sum(p.numel() for p in part.parameters())
        assert part.memory_footprint_mb() == pytest.approx(part.num_parameters() * 4 / 2**20)
    half = Top.from_pretrained_split(stock.state_dict(), stock.config, start_layer=2, dtype=torch.bfloat16)
    assert half.memory_footprint_mb() == pytest.approx(parts[2].memory_footprint_mb() / 2)
    together = sum(part.num_parameters() for part in parts)
    assert together == stock.num_parameters() + stock.lm_head.weight.numel()  # one table in two parts


def test_caches_and_masks_that_do_not_belong_together_are_refused(parts, prompt):
    bottom, _, top = parts
    ids, mask = prompt
    forget(parts)
    with torch.no_grad():
        hidden = bottom(ids, mask, use_cache=True)
        with pytest.raises(UsageError, match="holds 2 sequences, and 1 came"):
            bottom(ids[:1, :1], use_cache=True)
        for columns in (1, 40):
            with pytest.raises(UsageError, match=f"mask has {columns} columns for 40 tokens before and 1 new"):
                bottom(ids[:, :1], mask[:, -columns:], use_cache=True)
        with pytest.raises(UsageError, match="hold padding, and no attention_mask came"):
            bottom(ids[:, :1], use_cache=True)
        assert bottom.cache.get_seq_length() == 40
        forget(parts)
        bottom(ids[:1, :1], use_cache=True)
        assert bottom.cache.get_seq_length() == 1
        whole = DynamicCache(config=SplitChain(parts).config)
        with pytest.raises(UsageError, match=f"{len(whole.layers)} layers, and this top part {top.num_layers}"):
            top(hidden, past_key_values=whole)
    forget(parts)
    with pytest.raises(UsageError, match="max_new_tokens is 0"):
        top.generate(hidden, below(parts), max_new_tokens=0)
    for wrong in ({"temperature": -1.0}, {"top_k": -3}, {"top_p": 0.0}, {"temperature": float("nan")}):
        with pytest.raises(UsageError, match="no token can be drawn"):
            Sampling(**wrong)


def test_parts_are_saved_where_the_factory_is_told_to(model_type, checkpoint_dir, tmp_path, stock, prompt, caplog):
    place = tmp_path / "parts"
    with caplog.at_level("INFO", logger="gemma_deploy"):
        made = ModelFactory.create_split_models(
            model_type, checkpoint_dir, 1, 2, storage_path=place, auto_save=True, verbose=True, low_memory=True
        )
    assert re.search(r"trunk: layers 1 to 1, [\d,]+ parameters, 0\.\d MiB", caplog.text)
    with torch.no_grad():
        expected = stock(prompt[0]).logits
        assert torch.equal(through(made, prompt[0]).logits, expected)
        loaded = [load_part(place / name, dtype=torch.float32) for name in ("bottom", "trunk", "top")]
        assert torch.equal(through(loaded, prompt[0]).logits, expected)
        assert_close(SplitChain.from_split(place)(prompt[0]).logits.float(), expected, 0.05)  # bfloat16, as stored
    with pytest.raises(UsageError, match="holds a split model already"):
        ModelFactory.create_split_models(model_type, checkpoint_dir, 1, 2, storage_path=place, auto_save=True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"auto_save": True}, "auto_save without storage_path"),
        ({"storage_path": "parts"}, "storage_path without auto_save=True"),
        ({"low_memory": False}, "never read any other way"),
        ({"device_map": {"middle": "cpu"}}, "device_map names middle"),
        ({"device_map": "balanced"}, "device_map is 'balanced'"),
        ({"device_map": "auto", "device": ["cpu"] * 3}, "say the same in two ways"),
    ],
)
def test_arguments_that_would_do_nothing_are_refused(
    model_type, checkpoint_dir, tmp_path, monkeypatch, arguments, said
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=said):
        ModelFactory.create_split_models(model_type, checkpoint_dir, 1, 2, **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, "cpu cpu cpu"), (1, "cpu cuda:0 cpu"), (2, "cpu cuda:0 cuda:1"), (4, "cuda:0 cuda:1 cuda:2")],
)
def test_devices(monkeypatch, count, expected):
    from gemma_deploy.split.factory import _devices

    names = ("bottom", "trunk", "top")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert _devices(names, "cpu", "auto") == expected.split()
    assert _devices(names, "meta", {"trunk": "cpu"}) == ["meta", "cpu", "meta"]
    assert _devices(names, "cpu", None) == ["cpu"] * 3


def test_what_a_part_is_given_is_moved_to_it(model_type, checkpoint_dir, prompt):
    bottom, trunk, _ = ModelFactory.create_split_models(model_type, checkpoint_dir, 1, 2, device_map={"trunk": "meta"})
    for rotary in trunk.model.rotary.values():
        rotary.freeze(*(table.to("meta") for table in rotary.make_tables(64)))
    hidden = trunk(bottom(*prompt), prompt[1])
    assert (str(hidden.device), hidden.shape) == ("meta", (2, 40, 64))
