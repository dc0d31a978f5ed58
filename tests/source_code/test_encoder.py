"""The patched Gemma 3 stack as an encoder: the stock class's numbers, bit for bit, and every wrong mask seen."""

import pytest
import torch

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.patched import patched_module, patched_stack
from tests.encoders import WINDOW, stock, write_encoder

LENGTH = 6 * WINDOW


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("encoder") / "checkpoint")


@pytest.fixture(scope="module")
def patched(folder):
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


def test_the_file_says_the_window_and_the_config_object_the_first_distance_that_is_too_far(folder, patched):
    assert stock(folder).config.sliding_window == patched.config.sliding_window == WINDOW // 2 + 1
    layers = Checkpoint.open(folder, encoder=True).config.layers
    assert {layer.window for layer in layers} == {None, 2 * (WINDOW // 2) + 1}


def test_a_cache_is_refused_and_none_is_made(patched, batch):
    ids, _ = batch
    from transformers.cache_utils import DynamicCache

    with torch.no_grad():
        assert patched(ids[:1, :4], use_cache=True).past_key_values is None
        with pytest.raises(ValueError, match="an encoder has no cache"):
            patched(ids[:1, :4], past_key_values=DynamicCache())
