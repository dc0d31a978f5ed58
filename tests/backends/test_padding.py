"""Batches of unequal length: every row gives what transformers gives, wherever the padding stands, or it is refused."""

import numpy as np
import onnxruntime as ort
import pytest

from gemma_deploy.backends.onnxruntime.window import windows_of
from tests.backends.make import KINDS, off, open_session, reference
from tests.backends.test_decoder import CLOSE

WINDOW, STEPS = 8, 12
LENGTHS = {"two": (5, 30), "three": (19, 3, 27), "one": (11,)}  # tokens of each row's prompt
PAD = 0


class Batch:
    """A graph driven as transformers and optimum drive it: the mask grows by a column of ones a step.

    Args:
        capacity: positions in the caches of a window; 0 where there are none.
        logits: `last` or `all`.
    """

    def __init__(self, one, rows, capacity=0, logits="last"):
        graph = one.graph(windowed=bool(capacity), logits=logits)
        windows = windows_of(graph.graph)
        self.session = open_session(graph, one.folder)
        self.caches = {
            value.name: np.zeros((rows, value.shape[1], capacity * (value.name in windows), value.shape[3]), np.float32)
            for value in self.session.get_inputs()
            if value.name.startswith("past_key_values.")
        }
        self.mask = np.zeros((rows, 0), np.int64)

    def feed(self, ids, mask):
        self.mask = np.concatenate([self.mask, np.asarray(mask, np.int64)], axis=1)
        feeds = {"input_ids": np.asarray(ids, np.int64), "attention_mask": self.mask}
        logits, *present = self.session.run(None, feeds | self.caches)
        self.caches = dict(zip(self.caches, present, strict=True))
        return logits[:, 0] if logits.shape[1] == 1 else logits


def padded(rows, side, seed=0):
    """ids and mask [B, longest], with padding on the left, on the right, or anywhere."""
    width, rng = max(map(len, rows)) + 4 * (len(rows) == 1), np.random.default_rng(seed)
    ids, mask = np.full((len(rows), width), PAD), np.zeros((len(rows), width), np.int64)
    for index, row in enumerate(rows):
        places = {
            "left": np.arange(width - len(row), width),
            "right": np.arange(len(row)),
            "anywhere": np.sort(rng.permutation(width)[: len(row)]),
        }[side]
        ids[index, places], mask[index, places] = row, 1
    return ids, mask


def eager_logits(model, ids, mask, steps):
    """[1 + steps, B, V]: transformers' own logits of a batch padded on the left, prompt and cached steps."""
    import torch

    ids, mask, found, cache = torch.tensor(ids), torch.tensor(mask), [], None
    with torch.inference_mode():
        for new in [ids, *torch.tensor(steps).unsqueeze(-1)]:
            if found:
                mask = torch.cat([mask, torch.ones_like(new)], dim=1)
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -new.shape[1] :]
            made = model(new, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
            cache = made.past_key_values
            found.append(made.logits[:, -1].numpy())
    return np.stack(found)


@pytest.fixture(scope="module")
def expected(made):
    """(generation, batch) -> prompts, forced steps [STEPS, B], transformers' logits [1 + STEPS, B, V]."""
    known = {}

    def get(kind, batch):
        if (kind, batch) not in known:
            rng = np.random.default_rng(7)
            rows = [[2, *rng.integers(3, 500, length - 1).tolist()] for length in LENGTHS[batch]]
            steps = rng.integers(3, 500, (STEPS, len(rows)))
            if kind not in known:
                known[kind] = reference(made(kind))
            known[kind, batch] = rows, steps, eager_logits(known[kind], *padded(rows, "left"), steps)
        return known[kind, batch]

    return get


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", LENGTHS)
@pytest.mark.parametrize("side", ["left", "right", "anywhere"])
@pytest.mark.parametrize("capacity", [0, 8, 11, 64])
def test_every_row_is_transformers_left_padded_row(made, expected, kind, batch, side, capacity):
    """Prompt and steps past the window; rows of unequal length cross it at steps of their own."""
    rows, steps, right = expected(kind, batch)
    graph = Batch(made(kind), len(rows), capacity)
    found = [graph.feed(*padded(rows, side))]
    found += [graph.feed(step[:, None], np.ones((len(rows), 1))) for step in steps]
    for at, (got, want) in enumerate(zip(found, right, strict=True)):
        for row in range(len(rows)):
            assert off(got[row], want[row]) < CLOSE, (at, row)
    assert off(right[0, 0], right[1, 0]) > 0.1


@pytest.mark.parametrize("capacity", [0, 11])
@pytest.mark.parametrize("logits", ["last", "all"])
def test_masks_whose_ones_stand_side_by_side(made, expected, capacity, logits):
    """As genai's Engine writes them: a step of a shorter row ends in zeros, and its token is real all the same."""
    rows, steps, right = expected("gemma3_text", "three")
    graph = Batch(made("gemma3_text"), len(rows), capacity, logits)
    found, lengths = [graph.feed(*padded(rows, "right"))], np.array([len(row) for row in rows])
    if logits == "all":
        found[0] = found[0][np.arange(len(rows)), lengths - 1]
    for at, step in enumerate(steps, 1):
        columns = np.arange(lengths.max() + at)
        graph.mask = np.zeros((len(rows), 0), np.int64)
        found.append(graph.feed(step[:, None], columns[None] < (lengths + at)[:, None]))
    assert off(np.stack(found), right) < CLOSE


@pytest.mark.parametrize("side", ["left", "right"])
def test_caches_shared_by_past_and_present_take_padded_rows(made, expected, side):
    """As a caller does that never copies a cache: buffers of 64 positions, written in place."""
    rows, steps, right = expected("gemma3_text", "three")
    session = made("gemma3_text").session()
    names = [value.name for value in session.get_inputs() if value.name.startswith("past")]
    shape = (len(rows), session.get_inputs()[2].shape[1], 64, 32)
    buffers = {name: ort.OrtValue.ortvalue_from_numpy(np.full(shape, 7e7, np.float32)) for name in names}
    ids, mask = padded(rows, side)
    for at, new in enumerate([ids, *steps[:, :, None]]):
        mask = np.concatenate([mask, np.ones_like(new)], axis=1) if at else mask
        binding = session.io_binding()
        binding.bind_cpu_input("input_ids", new)
        binding.bind_cpu_input("attention_mask", mask)
        binding.bind_output("logits", "cpu")
        for name, buffer in buffers.items():
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), buffer)
        session.run_with_iobinding(binding)
        assert off(binding.get_outputs()[0].numpy()[:, 0], right[at]) < CLOSE, at


PIECES = {
    "left": ([0] * 6, [0] * 2 + [1] * 4, [1] * 9, [1]),
    "right": ([1] * 6, [1] * 4 + [0] * 2, [1] * 4 + [0] * 5, [1]),
    "single": ([1] * 9, [0], [1] * 3, [0], [1]),
    "middle": ([1] * 3 + [0] * 3, [0, 1, 0, 1, 1, 1], [1] * 9, [1]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("capacity", [0, 8, 11])
def test_a_prompt_in_pieces_with_padding_in_any_of_them(made, logits_of, tokens, kind, pieces, capacity):
    graph, read = Batch(made(kind), 1, capacity), []
    for mask in PIECES[pieces]:
        new = [tokens[len(read) + sum(mask[:at])] if real else PAD for at, real in enumerate(mask)]
        read += [token for token, real in zip(new, mask, strict=True) if real]
        logits = graph.feed([new], [mask])
        if any(mask):
            assert off(logits[0], logits_of(kind, "fp32", read)[-1]) < CLOSE, len(read)
    assert len(read) > WINDOW


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text"])
@pytest.mark.parametrize("seed", range(4))
def test_rows_read_at_paces_of_their_own(made, logits_of, kind, seed):
    """Pieces of 2 to 9 columns with padding drawn for every row, which caches of a window take from several rows."""
    rng, rows = np.random.default_rng(seed), 3
    graph, read = Batch(made(kind), rows, 11), [[2] for _ in range(rows)]
    graph.feed([[2]] * rows, [[1]] * rows)
    for _ in range(6):
        mask = rng.integers(0, 2, (rows, rng.integers(2, 10)))
        ids = rng.integers(3, 500, mask.shape)
        logits = graph.feed(np.where(mask, ids, PAD), mask)
        for row in range(rows):
            read[row] += ids[row][mask[row] == 1].tolist()
            if mask[row].any():
                assert off(logits[row], logits_of(kind, "fp32", read[row])[-1]) < CLOSE, (row, len(read[row]))
    assert len({len(row) for row in read}) > 1
    assert max(map(len, read)) > WINDOW


def test_several_new_tokens_of_several_rows_behind_a_cache_are_refused(made, tokens):
    graph = Batch(made("gemma3_text"), 2)
    graph.feed([tokens[:9], tokens[9:18]], [[1] * 9] * 2)
    with pytest.raises(Exception, match="batch_size must be 1"):
        graph.feed([[5, 6], [7, 8]], [[1, 1]] * 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("capacity", [0, 11])
def test_a_row_of_nothing_but_padding_disturbs_no_other(made, expected, kind, capacity):
    rows, steps, right = expected(kind, "two")
    ids, mask = padded(rows, "left")
    nothing = np.zeros((1, ids.shape[1]), np.int64)
    graph = Batch(made(kind), 3, capacity)
    found = [graph.feed(np.concatenate([ids, nothing]), np.concatenate([mask, nothing]))]
    found += [graph.feed([*step[:, None], [5]], np.ones((3, 1))) for step in steps]
    assert off(np.stack(found)[:, :2], right) < CLOSE
    assert np.isfinite(found).all()


# Logits of every token


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right", "anywhere"])
@pytest.mark.parametrize("capacity", [0, 11])
def test_every_token_has_its_own_logits_where_it_stands(made, logits_of, expected, kind, side, capacity):
    """A prompt, several tokens of one row behind it where there is one, and single ones; then they are told apart."""
    for batch in LENGTHS:
        rows, steps, right = expected(kind, batch)
        graph, (ids, mask) = Batch(made(kind), len(rows), capacity, "all"), padded(rows, side)
        logits = graph.feed(ids, mask)
        assert logits.shape == (*ids.shape, 512)
        assert np.isfinite(logits).all()
        for row, tokens in enumerate(rows):
            assert off(logits[row][mask[row] == 1], logits_of(kind, "fp32", tokens)) < CLOSE, (batch, row)
        if len(rows) == 1:
            assert off(graph.feed(steps[:4].T, np.ones((1, 4)))[0], right[1:5, 0]) < CLOSE
        for at in range(4 if len(rows) == 1 else 0, STEPS):
            assert off(graph.feed(steps[at][:, None], np.ones((len(rows), 1))), right[at + 1]) < CLOSE, at


def test_a_graph_of_all_logits_has_them_by_the_same_operators(made):
    """One choice behind the final norm in the place of two behind the last attention; the head sees every token."""
    one = made("gemma3_text", "w8t")
    last, every = ([node.op_type for node in one.graph(logits=which).graph] for which in ("last", "all"))
    assert (last.count("GatherND"), every.count("GatherND")) == (2, 1)
    assert sorted({*every}) == sorted({*last, "CumSum"})
    session = one.session(logits="all")
    assert session.get_outputs()[0].shape == ["batch", "sequence", 512]
