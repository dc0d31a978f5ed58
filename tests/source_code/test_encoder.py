"""The patched stacks that are encoders: the stock classes' numbers, bit for bit, and every wrong mask or part seen."""

import pytest
import torch

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.patched import patched_module, patched_stack
from tests.encoders import FIRST, RADIUS, SECOND, WINDOW, stock, write_encoder

LENGTH = 6 * WINDOW


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("encoder")
    return {which: write_encoder(root / which, which=which) for which in (FIRST, SECOND)}


@pytest.fixture(scope="module", params=[FIRST, SECOND])
def folder(request, folders):
    return folders[request.param]


@pytest.fixture(scope="module")
def patched(folder):
    return patched_of(folder)


def patched_of(folder):
    checkpoint = Checkpoint.open(folder, encoder=True)
    model = patched_stack(checkpoint.config).to_empty(device="cpu")
    found = model.load_state_dict(stock(folder).state_dict(), strict=False)
    assert not found.missing_keys
    return model.eval()


@pytest.fixture(scope="module")
def batch():
    """Ids and masks: padded on the left, on the right, and not at all."""
    ids = torch.randint(3, 500, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :25], mask[1, 33:] = 0, 0
    return ids, mask


def real(states, mask):
    return [states[row][mask[row].bool()] for row in range(len(mask))]


def test_hidden_states_are_those_of_the_stock_class(folder, patched, batch):
    ids, mask = batch
    with torch.no_grad():
        expected = stock(folder)(ids, attention_mask=mask, use_cache=False).last_hidden_state
        found = patched(ids, attention_mask=mask, use_cache=False).last_hidden_state
        assert torch.equal(expected, found)
        assert torch.equal(stock(folder)(ids, use_cache=False).last_hidden_state, patched(ids).last_hidden_state)


def test_padding_on_either_side_changes_what_no_token_gives(patched, batch):
    """Largest value 11; 2.9e-6 seen, of positions that are shifted."""
    ids, mask = batch
    with torch.no_grad():
        found = real(patched(ids, attention_mask=mask).last_hidden_state, mask)
        for row in range(2):
            alone = patched(ids[row][mask[row].bool()][None]).last_hidden_state[0]
            torch.testing.assert_close(found[row], alone, rtol=0, atol=2e-5)


def test_a_static_graph_has_the_same_numbers_where_there_are_tokens(patched, batch):
    ids, mask = batch
    with torch.no_grad():
        expected = real(patched(ids, attention_mask=mask).last_hidden_state, mask)
        patched.config.iter_num = 0
        try:
            places = torch.arange(LENGTH)[None].expand_as(ids)
            found = real(patched(ids, attention_mask=mask, position_ids=places).last_hidden_state, mask)
        finally:
            patched.config.iter_num = None
    assert all(map(torch.equal, expected, found))


def causal(mask, batch, length, reach, dtype, device, **rest):
    return ORIGINAL(mask, batch, length, reach, dtype, device, **rest).masked_fill(
        torch.ones(length, length, dtype=torch.bool).triu(1), torch.finfo(dtype).min
    )


ORIGINAL = patched_module("encoder_vacc").encoder_mask
BREAKS = {
    "causal": causal,
    "one too near": lambda mask, batch, length, reach, *rest, **more: ORIGINAL(
        mask, batch, length, reach and reach - 1, *rest, **more
    ),
    "one too far": lambda mask, batch, length, reach, *rest, **more: ORIGINAL(
        mask, batch, length, reach and reach + 1, *rest, **more
    ),
    "padding seen": lambda mask, *rest, **more: ORIGINAL(None, *rest, **more),
    "window in full layers": lambda mask, batch, length, reach, *rest, **more: ORIGINAL(
        mask, batch, length, 6, *rest, **more
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_wrong_mask_is_seen(folder, patched, batch, name, monkeypatch):
    ids, mask = batch
    monkeypatch.setattr(patched_module("encoder_vacc"), "encoder_mask", BREAKS[name])
    with torch.no_grad():
        expected = real(stock(folder)(ids, attention_mask=mask, use_cache=False).last_hidden_state, mask)
        found = real(patched(ids, attention_mask=mask).last_hidden_state, mask)
    largest = max(one.abs().max() for one in expected)
    assert max((one - other).abs().max() for one, other in zip(expected, found, strict=True)) / largest > 1e-3


def test_the_file_says_the_window_and_the_config_object_the_first_distance_that_is_too_far(folders):
    folder = folders[FIRST]
    assert stock(folder).config.sliding_window == patched_of(folder).config.sliding_window == WINDOW // 2 + 1
    layers = Checkpoint.open(folder, encoder=True).config.layers
    assert {layer.window for layer in layers} == {None, 2 * (WINDOW // 2) + 1}


def test_of_the_second_both_say_the_last_distance_that_is_seen(folders):
    folder = folders[SECOND]
    assert stock(folder).config.sliding_window == patched_of(folder).config.sliding_window == RADIUS
    layers = Checkpoint.open(folder, encoder=True).config.layers
    assert [layer.window for layer in layers[:3]] == [2 * RADIUS + 1] * 2 + [None]
    assert [(layer.kv_heads, layer.head_dim) for layer in layers[1:3]] == [(2, 32), (1, 64)]
    assert layers[-1].window is None  # as transformers makes it, whatever the pattern


def test_hidden_states_of_the_second_are_those_of_the_stock_class_layer_by_layer(folders, batch):
    ids, mask = batch
    with torch.no_grad():
        expected = stock(folders[SECOND])(ids, attention_mask=mask, output_hidden_states=True).hidden_states
        found = patched_of(folders[SECOND])(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    assert len(found) == len(expected) == 8
    assert all(map(torch.equal, expected, found))
    assert found[-1].shape[-1] == 160  # projected


GAINS, SECOND_CLASS = patched_module("gain_vacc"), patched_module("modeling_embedding_gemma2_vacc")


def vectors_of_the_layer_before(model, patch):
    right = GAINS.OfEachLayer.of_layer
    patch.setattr(GAINS.OfEachLayer, "of_layer", lambda self, layer: right(self, max(0, layer - 1)))


def vectors_are_not_normed(model, patch):
    patch.setattr(model.ple, "per_layer_projection_norm", torch.nn.Identity())


def vectors_behind_the_number(model, patch):
    right = SECOND_CLASS.EmbeddingGemma2EncoderLayer.gated
    patch.setattr(
        SECOND_CLASS.EmbeddingGemma2EncoderLayer,
        "gated",
        lambda self, hidden, vector: right(self, hidden * self.layer_scalar, vector),
    )


def no_number_behind_layers(model, patch):
    for layer in model.layers:
        patch.setitem(layer._buffers, "layer_scalar", torch.ones(1))


def values_have_no_norm(model, patch):
    for layer in model.layers:
        patch.setattr(layer.self_attn, "v_norm", torch.nn.Identity())


def scores_are_scaled(model, patch):
    for layer in model.layers:
        patch.setattr(layer.self_attn, "scaling", layer.self_attn.head_dim**-0.5)


def one_base_for_all_layers(model, patch):
    patch.setattr(model.rotary["full_attention"], "theta", 1e4)
    patch.setattr(model.rotary["full_attention"], "_tables", None)


def full_layers_turn_a_quarter(model, patch):
    patch.setattr(model.rotary["full_attention"], "rotated", 0.25)
    patch.setattr(model.rotary["full_attention"], "_tables", None)


def the_projection_stands_before_the_norm(model, patch):
    weight = model.norm.weight / model.norm.weight.mean()
    patch.setattr(model, "projected", lambda normed: model.embedding_projection(normed / weight))


@pytest.mark.parametrize(
    "wrong",
    [
        vectors_of_the_layer_before,
        vectors_are_not_normed,
        vectors_behind_the_number,
        no_number_behind_layers,
        values_have_no_norm,
        scores_are_scaled,
        one_base_for_all_layers,
        full_layers_turn_a_quarter,
        the_projection_stands_before_the_norm,
    ],
    ids=lambda wrong: wrong.__name__,
)
def test_what_the_second_computes_otherwise_is_seen(folders, batch, wrong, monkeypatch):
    ids, mask = batch
    model = patched_of(folders[SECOND])
    wrong(model, monkeypatch)
    with torch.no_grad():
        expected = real(stock(folders[SECOND])(ids, attention_mask=mask).last_hidden_state, mask)
        found = real(model(ids, attention_mask=mask).last_hidden_state, mask)
    largest = max(one.abs().max() for one in expected)
    assert max((one - other).abs().max() for one, other in zip(expected, found, strict=True)) / largest > 1e-3


def test_a_cache_is_refused_and_none_is_made(patched, batch):
    ids, _ = batch
    from transformers.cache_utils import DynamicCache

    with torch.no_grad():
        assert patched(ids[:1, :4], use_cache=True).past_key_values is None
        with pytest.raises(ValueError, match="an encoder has no cache"):
            patched(ids[:1, :4], past_key_values=DynamicCache())
