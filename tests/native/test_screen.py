"""The screened head: operators at every level against NumPy float64, whole models against transformers."""

import ctypes
import json
from dataclasses import asdict

import numpy as np
import pytest

from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.artifact.weights import ArtifactWeights, config_of
from gemma_deploy.backends.native.gates import native_gates
from gemma_deploy.backends.native.graph import plan_in
from gemma_deploy.backends.native.library import Model
from gemma_deploy.bench.memory import weight_bytes
from gemma_deploy.commands.inspect import kernel_facts
from gemma_deploy.compile import compile_recipe
from gemma_deploy.errors import ArtifactError
from gemma_deploy.names import PARAMS
from gemma_deploy.params import panels
from gemma_deploy.recipe import Recipe
from tests.native.test_backend import compare_in_company, opened, recipe_of
from tests.native.test_ops import Matrix, level, ops, pointer, rounded  # noqa: F401

PLANES, MOST_SPREAD = 5, 16  # of src/layout.h and src/kernels.h


class Planes:
    """A random matrix in two planes, as the file has it and in float64."""

    def __init__(self, rows, columns, group, *, scale=0.002, seed=0, codes=None):
        import torch

        rng = np.random.default_rng(seed)
        self.codes = rng.integers(-127, 128, (rows, columns)).astype(np.int8) if codes is None else codes
        wide = -(-columns // panels.NIBBLE_COLUMNS) * panels.NIBBLE_COLUMNS
        shape, groups = (-(-rows // 16) * 16, wide), wide // group if group else 1
        self.scales = (rng.uniform(0.5, 2, (rows, groups)) * scale).astype(np.float32)
        high, low = panels.pack_planes(torch.from_numpy(self.codes), shape)
        self.bytes = np.concatenate([high.reshape(-1).numpy(), low.reshape(-1).numpy()])
        self.lies = panels.padded_rows(torch.from_numpy(self.scales), (shape[0], groups)).numpy().copy()
        self.matrix = Matrix(self.bytes.ctypes.data, self.lies.ctypes.data, PLANES, 0, *shape, group)
        self.rows, self.columns, self.wide = rows, columns, wide

    def of(self, codes):
        """Numbers that codes stand for, [rows, columns in the file]."""
        padded = np.zeros((self.rows, self.wide))
        padded[:, : self.columns] = codes
        return padded * np.repeat(self.scales, self.wide // self.scales.shape[1], axis=1).astype(np.float64)

    def expected(self, x):
        """Whole products, what high halves give, and its half variance before it is held down: [count, rows] each."""
        high = (self.codes.astype(int) + 128 >> 4) * 16 - 128 + 7.5
        squares = (x**2) @ (self.of(np.ones_like(self.codes)) ** 2).T
        return x @ self.of(self.codes).T, x @ self.of(high).T, squares * 255 / 24


def inputs(count, planes, *, seed=1, factor=1.0):
    x = np.zeros((count, planes.wide), np.float32)
    x[:, : planes.columns] = np.random.default_rng(seed).standard_normal((count, planes.columns)) * factor
    return x


def screened(ops, level, planes, x, *, candidates, threads=1):  # noqa: F811
    y = np.full((len(x), planes.matrix.rows), np.nan, np.float32)
    counts = (ctypes.c_uint64 * 4)()
    arguments = (ctypes.byref(planes.matrix), pointer(x), len(x), pointer(y), planes.rows, candidates, threads, counts)
    assert ops.gemma_op_screened(level, *arguments) == 0
    return y[:, : planes.rows], list(counts)


# Groups of every kind, of one row and of several spans; rows that are no multiple of a panel, of two and of one part.
SHAPES = [(0, 640, 5001), (0, 2304, 130), (32, 256, 4097), (64, 640, 5001), (128, 1152, 200), (2048, 4096, 33)]


@pytest.mark.parametrize(("group", "columns", "rows"), SHAPES)
def test_candidates_are_whole_products_and_others_are_those_of_the_high_halves(ops, level, group, columns, rows):  # noqa: F811
    planes = Planes(rows, columns, group)
    x = inputs(5, planes)
    x[3] = 0
    candidates = rows // 10
    y, counts = screened(ops, level, planes, x, candidates=candidates)
    whole, high, spread = planes.expected(rounded(x))
    rough = high - np.minimum(spread, MOST_SPREAD)
    near = np.abs(rough).max(1, keepdims=True) + 1e-30
    is_whole, is_rough = np.abs(y - whole) / near < 1e-6, np.abs(y - rough) / near < 1e-6  # measured: 2.2e-7
    assert (is_whole | is_rough).all()
    assert (is_whole.sum(1) >= candidates).all()
    assert counts[0] == 5
    assert counts[1] >= 5 * candidates
    order = np.argsort(-rough, axis=1, kind="stable")
    for row in (0, 1, 2, 4):  # nobody is left out who is clearly before another: bins are a thirty-second wide
        last = rough[row, order[row, candidates - 1]]
        clearly = rough[row].max() - rough[row] < (rough[row].max() - last) * (1 - 1 / 32)
        assert is_whole[row, clearly].all()
    np.testing.assert_array_equal(y[:3].argmax(1), whole[:3].argmax(1))
    assert not y[3].any()


@pytest.mark.parametrize("group", [0, 64])
def test_the_largest_logit_is_proven_where_low_halves_conspire(ops, level, group):  # noqa: F811
    """A row whose low halves all point the way of the activations, and of which the high ones say next to nothing."""
    codes = np.random.default_rng(0).integers(-127, 128, (4500, 640)).astype(np.int8)
    x = inputs(1, Planes(1, 640, group))
    codes[4321] = np.where(x[0, :640] > 0, 15, 0)  # the high halves are those of 0
    planes = Planes(4500, 640, group, codes=codes, scale=1e-5)
    planes.scales[4321] = planes.lies[4321] = planes.scales.mean() * 30
    whole, high, spread = planes.expected(rounded(x))
    rough = high - np.minimum(spread, MOST_SPREAD)
    assert whole[0].argmax() == 4321
    assert (rough[0] > rough[0, 4321]).sum() > 100
    y, counts = screened(ops, level, planes, x, candidates=4)
    assert y[0].argmax() == 4321
    assert y[0, 4321] == pytest.approx(whole[0, 4321], rel=1e-5)
    assert counts[2] == 1
    assert counts[3] == counts[1] - 4


def test_fewer_rows_than_candidates_are_all_whole(ops, level):  # noqa: F811
    planes = Planes(37, 192, 64)
    x = inputs(2, planes, factor=1000)  # extreme: half variances are held down
    y, counts = screened(ops, level, planes, x, candidates=16384)
    whole = planes.expected(rounded(x))[0]
    np.testing.assert_allclose(y, whole, atol=1e-6 * np.abs(whole).max())
    assert counts == [2, 74, 0, 0]


def test_a_row_has_its_bits_in_any_company_and_with_any_threads(ops, level):  # noqa: F811
    planes = Planes(9000, 256, 64)
    x = inputs(19, planes)  # more than are screened together
    y, counts = screened(ops, level, planes, x, candidates=300)
    for threads in (1, 2, 3):
        again, same = screened(ops, level, planes, x[[18, 3]], candidates=300, threads=threads)
        np.testing.assert_array_equal(again, y[[18, 3]])
    assert counts[0] == 19
    assert same[0] == 2


def test_zero_rows_and_equal_rows_are_taken_in_their_order(ops, level):  # noqa: F811
    codes = np.zeros((200, 128), np.int8)
    planes = Planes(200, 128, 0, codes=codes)
    y, counts = screened(ops, level, planes, inputs(1, planes), candidates=10)
    assert np.isfinite(y).all()
    assert np.abs(y[0, y[0].argmax()]) < 1e-6
    assert counts[1] >= 10


def test_planes_are_unpacked_as_they_were():
    import torch

    codes = np.random.default_rng(0).integers(-128, 128, (32, 256)).astype(np.int8)
    high, low = panels.pack_planes(torch.from_numpy(codes), (32, 256))
    flat = high.reshape(-1).numpy()
    np.testing.assert_array_equal(panels.unpack_planes(flat, low.reshape(-1).numpy(), 256), codes)
    for row, k in ((0, 0), (17, 200), (31, 255)):  # where src/layout.h says
        code = int(codes[row, k]) + 128
        byte = flat[row // 16 * 2048 + k // 128 * 1024 + k % 64 // 4 * 64 + row % 16 * 4 + k % 4]
        assert (byte & 15 if k % 128 < 64 else byte >> 4) == code >> 4
        byte = low[row].reshape(-1)[k // 64 * 32 + k % 32]
        assert (byte & 15 if k % 64 < 32 else byte >> 4) == code & 15


def screened_recipe(folder, kind="gemma3_text", scheme="w8a16", *, candidates=64, table=None, **changes):
    recipe_of(folder, kind, scheme, quantize={"table": table} if table else None, **changes)
    raw = json.loads((folder / "recipe.json").read_text())
    raw["backend"]["compile"] = {"head": "screened", "candidates": candidates}
    (folder / "recipe.json").write_text(json.dumps(raw))
    return Recipe.load(folder / "recipe.json")


@pytest.fixture(scope="module")
def whole_and_screened(native_library, tmp_path_factory):
    """Two artifacts of a tiny Gemma 3 of 500 tokens: a head of whole rows, and one that is screened."""
    folders = [tmp_path_factory.mktemp(name) for name in ("whole", "screened")]
    made = [compile_recipe(recipe_of(folders[0], "gemma3_text", "w8a16", vocab_size=500))]
    made.append(compile_recipe(screened_recipe(folders[1], vocab_size=500)))
    assert all(one.parity.passed for one in made)
    return tuple(one.path for one in made)


@pytest.fixture(scope="module")
def ids():
    return [int(one) for one in np.random.default_rng(0).integers(3, 500, 330)]


def test_a_model_has_the_greedy_tokens_of_the_whole_head(whole_and_screened, ids):
    whole, some = (opened(path) for path in whole_and_screened)
    full, part = (model.logits([(model.sequence(), ids, len(ids))]) for model in (whole, some))
    np.testing.assert_array_equal(full.argmax(1), part.argmax(1))
    same = np.isclose(full, part, rtol=0, atol=2e-6 * np.abs(full).max())  # measured: 3e-7
    assert (same.sum(1) >= 64).all()
    assert same.mean() < 0.9
    counts = some.screen_counts()
    assert counts.tokens == len(ids)
    assert counts.rows <= same.sum() <= 1.01 * counts.rows  # a few others come as near: 13 of 21,126 rows
    assert asdict(whole.screen_counts()) == {"tokens": 0, "rows": 0, "proofs": 0, "more": 0}


def test_the_same_bits_in_any_company(whole_and_screened, ids):
    compare_in_company(whole_and_screened[1], ids, ((1, [200, 1, 17, 100]), (3, [1, 2, 127, 128, 5])))


def test_ranks_are_those_of_the_logits(whole_and_screened, ids):
    model = opened(whole_and_screened[1])
    rows = model.logits([(model.sequence(), ids[:40], 20)])
    asked = list(range(20))
    found = model.ranked([(model.sequence(), ids[:40], 20)], top=7, asked=asked)
    order = np.lexsort((np.broadcast_to(np.arange(500), rows.shape), -rows))[:, :7]
    np.testing.assert_array_equal(found.ids, order)
    np.testing.assert_array_equal(found.logits, np.take_along_axis(rows, order, 1))
    np.testing.assert_array_equal(found.asked, rows[np.arange(20), asked])
    sums = np.log(np.exp(rows.astype(np.float64)).sum(1))
    np.testing.assert_allclose(found.log_sums, sums, rtol=2e-7)


def test_the_file_holds_the_same_codes_once(whole_and_screened):
    one, other = (Artifact.open(path) for path in whole_and_screened)
    sizes = [(path / PARAMS).stat().st_size for path in whole_and_screened]
    assert sizes[0] <= sizes[1] <= sizes[0] + 4096 + 500 * 128  # columns of 64 become 128
    weights = [ArtifactWeights(config_of(made), made.path, made.manifest) for made in (one, other)]
    for codes, again in zip(*(made.codes("model.embed_tokens.weight") for made in weights), strict=True):
        np.testing.assert_array_equal(codes, again)
    assert [row.sha256 for row in one.manifest.params if "layers" in row.name] == [
        row.sha256 for row in other.manifest.params if "layers" in row.name
    ]


def test_it_is_in_the_ledger_and_has_a_gate_of_its_own(whole_and_screened):
    texts = [
        json.dumps([asdict(entry) for entry in Artifact.open(path).manifest.ledger]) for path in whole_and_screened
    ]
    assert ["the 64 likeliest tokens are those of the high half" in text for text in texts] == [False, True]
    whole, some = (native_gates("w8a16", screened=one) for one in (False, True))
    assert [gate.limit < other.limit for gate, other in zip(whole, some, strict=True)].count(True) == 2


def test_the_bytes_that_a_token_reads_are_those_of_half_the_table_and_the_candidates(whole_and_screened):
    made = Artifact.open(whole_and_screened[1])
    rows = {row.name: row.nbytes for row in made.manifest.table.rows if "rotary" not in row.name}
    table = rows.pop("model.embed_tokens.weight")
    assert table == 512 * 128
    assert weight_bytes(made) == sum(rows.values()) + table // 2 + 64 * 128 // 2
    assert kernel_facts(made)["kernels"]["head"] == "screened, 64 rows whole"


def test_a_damaged_plan_is_refused(whole_and_screened):
    plan, parameters = plan_in(whole_and_screened[1]), whole_and_screened[1] / PARAMS

    def said(old, new):
        assert old in plan
        with pytest.raises(ArtifactError) as refused:
            Model(plan.replace(old, new, 1), parameters)
        return str(refused.value)

    assert "there are no 'candidates'" in said(" candidates=64", "")
    assert "'candidates' is 0, not a whole number" in said("candidates=64", "candidates=0")
    assert "the head is not in planes" in said("form=planes", "form=int4")
    assert "of a parameter file of" in said("form=planes rows=512", "form=planes rows=16777216")
    name = "name=model.layers.0.self_attn.o_proj.weight"
    assert "is in planes, which only table and head are" in said(f"{name} form=int8", f"{name} form=planes")
    assert "'input_group' is there, of a matrix in planes" in said("form=planes", "form=planes input_group=64")
    assert "'cache' has a form that caches have not" in said("version=1", "version=1 cache=planes")


KINDS = [
    ("gemma2", "w8a16", None),
    ("gemma4_text", "w8a16_gptq", "int8_g64"),
    ("gemma3_text", "w4a16_gptq+kv8", "int8_g32"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "scheme", "table"), KINDS)
def test_other_models_compile_proven(native_library, tmp_path, kind, scheme, table):
    result = compile_recipe(screened_recipe(tmp_path, kind, scheme, table=table, candidates=128))
    assert result.parity.passed
    model = opened(result.path)
    model.logits([(model.sequence(), list(range(5, 60)), 55)])
    assert 128 * 55 <= model.screen_counts().rows < 512 * 55
