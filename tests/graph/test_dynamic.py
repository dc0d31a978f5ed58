"""Dynamic graphs: any batch, any length, a prompt in chunks past the window; always the stock model's numbers."""

import numpy as np
import pytest
import torch

from tests.graph import graph_runs

VOCAB = 512
# The one with a window; tests/runtime/test_dynamic_runner.py has the other (torch takes 15 s for each export).
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("gemma", "gemma2")]
pytestmark = pytest.mark.parametrize("model_type", ["gemma3_text", *OTHERS], indirect=True, scope="session")


@pytest.fixture(scope="module")
def sequences():
    rng = np.random.default_rng(11)
    return [rng.integers(3, VOCAB, 60) for _ in range(3)]


@pytest.fixture
def run(built, model_type):
    """(graph, feeds) -> logits and presents by name."""
    out, _ = built(model_type, "fp32", True)
    sessions = {name: graph_runs.session(out / f"{name}.onnx") for name in ("iter0", "iter1")}

    def run(graph, feeds):
        session = sessions[graph]
        names = [value.name for value in session.get_outputs()]
        return dict(zip(names, session.run(names, feeds), strict=True))

    return run


def last_logits(stock, tokens):
    with torch.no_grad():
        return stock(torch.from_numpy(np.stack(tokens))).logits[:, -1].numpy()


def chunk(tokens, start, cache, mask):
    """Feeds of iter1 for the tokens [B, S] at real positions start..., after the slots of the mask [B, T]."""
    batch, length = tokens.shape
    positions = np.asarray(start)[:, None] + np.arange(length)
    feeds = {"input_ids": tokens, "position_ids": positions}
    feeds["attention_mask"] = np.concatenate([mask, np.ones((batch, length), np.int64)], 1)
    return feeds | {name.replace("present", "past_key_values"): value for name, value in cache.items()}


def extended(cache, new):
    found = {name: value for name, value in new.items() if name != "logits"}
    return {name: np.concatenate([cache[name], value], 2) for name, value in found.items()} if cache else found


def close(got, expected):
    # 7e-7 was measured; the gate of fp32 artifacts.
    return np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("length", [2, 17, 48])
def test_prefill_of_any_batch_and_length(run, stock, sequences, rows, length):
    ids = np.stack([s[:length] for s in sequences[:rows]])
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    got = run("iter0", feeds | {"position_ids": np.broadcast_to(np.arange(length), ids.shape)})
    assert got["logits"].shape == (rows, 1, VOCAB)
    assert close(got["logits"][:, 0], last_logits(stock, ids))


@pytest.mark.parametrize("chunks", [(60,), (16, 44), (1, 9, 30, 19, 1)])
def test_a_prompt_in_chunks_equals_the_whole(run, stock, sequences, chunks):
    """The first chunk starts from an empty cache: iter1 alone can do everything."""
    whole = np.stack(sequences)
    batch = len(whole)
    _, heads, _, size = run("iter1", first_feeds(run, whole[:, :2]))["present.0.key"].shape
    layers = sum(name.endswith(".key") for name in run("iter1", first_feeds(run, whole[:, :2])))
    cache = {
        f"present.{i}.{part}": np.zeros((batch, heads, 0, size), np.float32)
        for i in range(layers)
        for part in ("key", "value")
    }
    done = 0
    for length in chunks:
        filled = np.ones((batch, done), np.int64)
        got = run("iter1", chunk(whole[:, done : done + length], [done] * batch, cache, filled))
        cache, done = extended(cache, got), done + length
        assert close(got["logits"][:, 0], last_logits(stock, whole[:, :done])), done


def first_feeds(run, tokens):
    """iter1 after iter0 has taken the same tokens: gives the shapes of a cache."""
    feeds = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
    cache = extended({}, run("iter0", feeds | {"position_ids": np.broadcast_to(np.arange(2), tokens.shape)}))
    return chunk(tokens, [2] * len(tokens), cache, np.ones((len(tokens), 2), np.int64))


def test_left_padded_rows_and_empty_slots_between(run, stock, sequences):
    """Rows of 48 and 20 tokens padded to 48, slots left empty after them, then a chunk of 10 and single tokens."""
    lengths, width, room = (48, 20), 48, 5
    ids, mask, positions = (np.zeros((2, width), np.int64) for _ in range(3))
    for row, n in enumerate(lengths):
        ids[row, width - n :], mask[row, width - n :] = sequences[row][:n], 1
        positions[row, width - n :] = np.arange(n)
    got = run("iter0", {"input_ids": ids, "attention_mask": mask, "position_ids": positions})
    cache = {
        name: np.concatenate([value, np.full_like(value[:, :, :room], 7.0)], 2)
        for name, value in extended({}, got).items()
    }
    slots = np.concatenate([mask, np.zeros((2, room), np.int64)], 1)
    for start, length in ((0, 10), (10, 1), (11, 1)):
        new = np.stack([sequences[row][n + start :][:length] for row, n in enumerate(lengths)])
        got = run("iter1", chunk(new, [n + start for n in lengths], cache, slots))
        cache, slots = extended(cache, got), np.concatenate([slots, np.ones((2, length), np.int64)], 1)
        for row, n in enumerate(lengths):
            expected = last_logits(stock, [sequences[row][: n + start + length]])
            assert close(got["logits"][row], expected), (row, start)


def test_a_chunk_is_causal(run, sequences):
    """Changing the last token of a chunk changes no key that came before it."""
    whole = np.stack(sequences)[:, :2]
    feeds = first_feeds(run, whole)
    changed = feeds | {"input_ids": whole + np.array([0, 1])}
    one, two = (run("iter1", feeds), run("iter1", changed))
    np.testing.assert_array_equal(one["present.1.key"][:, :, :1], two["present.1.key"][:, :, :1])
    assert not np.array_equal(one["present.1.key"][:, :, 1:], two["present.1.key"][:, :, 1:])
