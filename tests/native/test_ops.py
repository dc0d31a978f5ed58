"""Every level of the library against sums in float64: products of all forms, work on rows, attention."""

import ctypes
import math

import numpy as np
import pytest

from gemma_deploy.backends.native import library
from gemma_deploy.params import panels

FORMS = {"float32": 0, "float16": 1, "bfloat16": 2, "uint8": 3, "uint4": 4}
SPAN, LARGEST = 2048, 127 * 128  # of src/layout.h


class Matrix(ctypes.Structure):
    _fields_ = (
        ("panels", ctypes.c_void_p), ("scales", ctypes.c_void_p), ("form", ctypes.c_int32),
        ("scale_form", ctypes.c_int32), ("rows", ctypes.c_int32), ("columns", ctypes.c_int32),
        ("group", ctypes.c_int32), ("input_group", ctypes.c_int32),
    )  # fmt: skip


@pytest.fixture(scope="module")
def ops(native_library):
    return ctypes.CDLL(str(native_library))


@pytest.fixture(params=["avx512vnni", "avxvnni", "avx2", "neondot", "plain"])
def level(request, native_library):
    if request.param not in library.levels():
        pytest.skip(f"this processor has no {request.param}: tests/native/check.cpp runs in an emulator")
    return request.param.encode()


def pointer(array):
    return ctypes.c_void_p(array.ctypes.data)


class Packed:
    """A random matrix, as the file has it and in float64."""

    def __init__(self, dtype, rows, columns, group=0, *, inputs=0, extreme=False, seed=0):
        import torch

        rng = np.random.default_rng(seed)
        if dtype in ("uint8", "uint4"):
            least = -128 if dtype == "uint8" else -8
            codes = rng.integers(least, -least, (rows, columns)).astype(np.int8)
            if extreme:
                codes[:] = least if extreme < 0 else -least - 1
            groups = columns // group if group else 1
            scales = rng.uniform(0.5, 2, (rows, groups)).astype(np.float32)
            self.scales_in_order = scales.astype(np.float64)
            self.dense = codes * np.repeat(scales, columns // groups, axis=1).astype(np.float64)
            self.scales = panels.pack(torch.from_numpy(scales), "float32", (rows, groups)).numpy()
            block = torch.from_numpy(codes)
        else:
            block = torch.from_numpy(rng.standard_normal((rows, columns)).astype(np.float32)).to(getattr(torch, dtype))
            self.dense, self.scales = block.double().numpy(), np.zeros(1, np.float32)
        packed = panels.pack(block, dtype, (rows, columns)).reshape(-1)
        self.panels = packed.view(torch.uint8).numpy()
        self.matrix = Matrix(
            self.panels.ctypes.data, self.scales.ctypes.data, FORMS[dtype], 0, rows, columns, group, inputs
        )
        self.codes = dtype in ("uint8", "uint4")


def product(ops, level, packed, x, *, begin=0, end=None, exact=0):
    count, rows = len(x), packed.matrix.rows
    y = np.full((count, rows), np.nan, np.float32)
    last = rows // 16 if end is None else end
    arguments = (ctypes.byref(packed.matrix), pointer(x), count, pointer(y), begin, last, exact, 1)
    assert ops.gemma_op_product(level, *arguments) == 0
    return y


def rounded(x, group=SPAN, most=LARGEST):
    """What the codes of activations stand for; `group` inputs share a scale."""
    found = np.zeros(x.shape)
    for start in range(0, x.shape[1], group):
        span = x[:, start : start + group]
        scale = (np.abs(span).max(1, keepdims=True) / np.float32(most)).astype(np.float32)
        inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
        found[:, start : start + group] = np.rint(span * inverse).astype(np.float64) * scale
    return found


CASES = [
    ("float32", 80, 704, 0), ("float16", 48, 640, 0), ("bfloat16", 48, 4160, 0), ("uint8", 80, 4672, 0),
    ("uint8", 48, 640, 32), ("uint8", 48, 640, 128), ("uint8", 16, 2048, 2048), ("uint4", 80, 4736, 0),
    ("uint4", 48, 640, 32), ("uint4", 48, 768, 64), ("uint4", 48, 640, 128),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "rows", "columns", "group"), CASES)
def test_products(ops, level, dtype, rows, columns, group):
    packed = Packed(dtype, rows, columns, group)
    x = np.random.default_rng(1).standard_normal((9, columns)).astype(np.float32) * 10
    x[1] = 0
    x[2, 0] = 1e30
    y = product(ops, level, packed, x)
    expected = (rounded(x) if packed.codes else x.astype(np.float64)) @ packed.dense.T
    error = np.abs(y - expected).max(1) / (np.abs(expected).max(1) + 1e-30)
    assert error.max() < 2e-6  # 1e-6 seen, of float16
    assert not y[1].any()
    # A row's bits depend neither on the rows beside it nor on the panels that are asked for with its own.
    np.testing.assert_array_equal(product(ops, level, packed, x[4:5].copy())[0], y[4])
    np.testing.assert_array_equal(
        product(ops, level, packed, x, begin=1, end=2)[:, 16:32], y[:, 16:32]
    ) if rows > 16 else None
    if packed.codes:
        exact = product(ops, level, packed, x, exact=1)
        right = x.astype(np.float64) @ packed.dense.T
        # 2.6e-7 seen, and 6e-7 to 1.1e-6 of sums of all inputs one behind another.
        assert (np.abs(exact - right).max(1) / (np.abs(right).max(1) + 1e-30)).max() < 5e-7
    row = np.zeros(columns, np.float32)
    assert ops.gemma_op_read_row(level, ctypes.byref(packed.matrix), rows - 1, ctypes.c_float(2), pointer(row)) == 0
    np.testing.assert_allclose(row, 2 * packed.dense[-1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("dtype", "columns", "group"), [("uint8", 4672, 0), ("uint8", 2048, 2048), ("uint4", 4736, 0)])
@pytest.mark.parametrize("sign", [1, -1])
def test_sums_at_their_bound_do_not_overflow(ops, level, dtype, columns, group, sign):
    packed = Packed(dtype, 16, columns, group, extreme=-1)
    x = np.full((7, columns), 3.0 * sign, np.float32)
    expected = rounded(x) @ packed.dense.T
    np.testing.assert_allclose(product(ops, level, packed, x), expected, rtol=2e-6)


@pytest.mark.parametrize(
    ("dtype", "columns", "group"),
    [("uint8", 2112, 0), ("uint8", 640, 64), ("uint4", 2176, 0), ("uint4", 640, 32), ("uint4", 768, 256)],
)
def test_rows_in_any_number_have_the_bits_that_they_have_alone(ops, level, dtype, columns, group):
    """Few rows, as many as are multiplied together at most, one more, rows of several passes; tails of panels."""
    packed = Packed(dtype, 112, columns, group)
    x = np.random.default_rng(2).standard_normal((51, columns)).astype(np.float32) * 3
    alone = np.concatenate([product(ops, level, packed, x[i : i + 1].copy()) for i in range(len(x))])
    expected = rounded(x) @ packed.dense.T
    assert (np.abs(alone - expected).max(1) / np.abs(expected).max(1)).max() < 2e-6
    for count in (2, 4, 5, 12, 13, 16, 17, 25, 51):
        np.testing.assert_array_equal(product(ops, level, packed, x[:count].copy()), alone[:count])
    np.testing.assert_array_equal(product(ops, level, packed, x, begin=1, end=6)[:, 16:96], alone[:, 16:96])


CASES8 = [
    ("uint8", 80, 4672, 0, 2048), ("uint8", 48, 640, 0, 128), ("uint8", 80, 704, 0, 32), ("uint8", 48, 640, 32, 64),
    ("uint8", 48, 640, 128, 32), ("uint8", 16, 2048, 2048, 2048), ("uint4", 80, 4736, 0, 2048),
    ("uint4", 80, 640, 0, 64), ("uint4", 48, 640, 32, 128), ("uint4", 48, 768, 64, 32),
    ("uint4", 48, 640, 128, 128), ("uint4", 48, 768, 256, 512),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "rows", "columns", "group", "inputs"), CASES8)
def test_products_of_activations_of_8_bits(ops, level, dtype, rows, columns, group, inputs):
    packed = Packed(dtype, rows, columns, group, inputs=inputs)
    x = np.random.default_rng(1).standard_normal((13, columns)).astype(np.float32) * 10
    x[1] = 0
    x[2, 0] = 1e30
    x[3] *= 1e-30  # far below any other; below 1e-35 all are zeros
    x[5, :40] = 0
    y = product(ops, level, packed, x)
    expected = rounded(x, inputs, 127) @ packed.dense.T
    error = np.abs(y - expected).max(1) / (np.abs(expected).max(1) + 1e-30)
    assert error.max() < 2e-6
    assert not y[1].any()
    for row in (4, 12):  # a row's bits depend neither on the rows beside it nor on the panels asked for with its own
        np.testing.assert_array_equal(product(ops, level, packed, x[row : row + 1].copy())[0], y[row])
    np.testing.assert_array_equal(product(ops, level, packed, x[6:11].copy()), y[6:11])
    if rows > 16:
        np.testing.assert_array_equal(product(ops, level, packed, x, begin=1, end=2)[:, 16:32], y[:, 16:32])
    exact, right = product(ops, level, packed, x, exact=1), x.astype(np.float64) @ packed.dense.T
    assert (np.abs(exact - right).max(1) / (np.abs(right).max(1) + 1e-30)).max() < 2e-6
    tiny = np.full((1, columns), 1e-36, np.float32)
    tiny[0, 1] = 0
    assert not product(ops, level, packed, tiny).any()


@pytest.mark.parametrize(("dtype", "columns", "group"), [("uint8", 4672, 0), ("uint8", 2048, 2048), ("uint4", 4736, 0)])
@pytest.mark.parametrize("inputs", [32, 2048])
@pytest.mark.parametrize("sign", [1, -1])
def test_sums_of_8_bits_at_their_bound_do_not_overflow(ops, level, dtype, columns, group, inputs, sign):
    """Codes of 0 or 255 by 127, where pairs of products leave 16 bits, and by -127, of all inputs that are summed."""
    for extreme in (-1, 1):
        packed = Packed(dtype, 16, columns, group, inputs=inputs, extreme=extreme)
        x = np.full((7, columns), 3.0 * sign, np.float32)
        np.testing.assert_allclose(product(ops, level, packed, x), rounded(x, inputs, 127) @ packed.dense.T, rtol=2e-6)


def test_levels_give_the_same_integers_of_8_bits(ops, native_library):
    """Of groups whose scale is a power of two all products and sums are exact in float32: the same bits everywhere."""
    for dtype, inputs in (("uint8", 64), ("uint8", 2048), ("uint4", 32)):
        packed = Packed(dtype, 48, 512, inputs=inputs)
        packed.scales[:] = 1
        x = np.random.default_rng(3).integers(-20, 20, (7, 512)).astype(np.float32)
        x[:, ::32] = 127  # all scales are 1
        right = x.astype(np.float64) @ (packed.dense / packed.scales_in_order).T
        for name in library.levels():
            np.testing.assert_array_equal(product(ops, name.encode(), packed, x), right)


@pytest.mark.parametrize(("dtype", "group"), [("uint8", 0), ("uint4", 0), ("uint4", 32)])
def test_levels_give_the_same_integers(ops, native_library, dtype, group):
    """Where every sum is a whole number that float32 holds, all levels give the same bits."""
    packed = Packed(dtype, 48, 512, group)
    packed.scales[:] = 1
    x = np.random.default_rng(3).integers(-20, 20, (5, 512)).astype(np.float32)
    x[:, 0] = LARGEST  # the scale is 1
    made = [product(ops, name.encode(), packed, x) for name in library.levels()]
    codes = packed.dense / np.abs(packed.dense).max(1, keepdims=True)
    assert codes.any()
    for other in made[1:]:
        np.testing.assert_array_equal(made[0], other)


def row_op(ops, level, kind, x, y=None, w=None, number=0.0):
    x = x.copy()
    empty = ctypes.c_void_p(None)
    arguments = (pointer(x), empty if y is None else pointer(y), empty if w is None else pointer(w), len(x))
    assert ops.gemma_op_row(level, kind, *arguments, ctypes.c_float(number)) == 0
    return x


def test_rows(ops, level):
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(656).astype(np.float32) * size for size in (4, 1))
    wide = x.astype(np.float64)
    normed = wide / np.sqrt((wide**2).mean() + 1e-6)
    np.testing.assert_allclose(row_op(ops, level, 0, x, w=w, number=1e-6), normed * w, atol=2e-6)
    np.testing.assert_allclose(row_op(ops, level, 0, x, number=1e-6), normed, atol=2e-6)
    np.testing.assert_allclose(row_op(ops, level, 1, w, y=x, w=x, number=1e-6), w + normed * x, rtol=1e-6, atol=1e-5)
    tanh = 0.5 * wide * (1 + np.tanh(np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)))
    np.testing.assert_allclose(row_op(ops, level, 2, x, w=w), tanh * w, rtol=1e-6, atol=2e-6)
    erf = 0.5 * wide * (1 + np.vectorize(math.erf)(wide / np.sqrt(2)))
    np.testing.assert_allclose(row_op(ops, level, 3, x, w=w), erf * w, rtol=1e-6, atol=4e-6)
    np.testing.assert_allclose(row_op(ops, level, 4, x * 20, number=30), 30 * np.tanh(wide * 20 / 30), atol=1e-5)
    angles = rng.uniform(0, 6, 32)
    cosines, sines = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    head, first, second = x[:64], wide[:32], wide[32:64]
    turned = np.concatenate(
        [first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)]
    )
    np.testing.assert_allclose(row_op(ops, level, 5, head, y=sines, w=cosines, number=0.5), turned / 2, atol=2e-6)
    for n in (16, 32, 656):
        assert row_op(ops, level, 7, x[:n])[0] == x[:n].max()
        scaled = x[:n] * np.float32(30)
        sums = row_op(ops, level, 8, scaled, number=float(scaled.max()))[0]
        expected = np.exp(scaled.astype(np.float64) - scaled.max()).sum()
        np.testing.assert_allclose(sums, expected, rtol=1e-6)


@pytest.mark.parametrize("count", [2, 4, 8])
def test_streams(ops, level, count):
    rng = np.random.default_rng(5)
    x, y, own = rng.standard_normal((count, 80)), rng.standard_normal(80), rng.standard_normal(count)
    coefs, active = rng.standard_normal((count, count)), count - 1
    x, y, own, coefs = (one.astype(np.float32) for one in (x, y, own, coefs))

    def run(target, factors):
        made = x.copy()
        where = ctypes.c_void_p(None) if target is None else pointer(target)
        assert ops.gemma_op_streams(level, pointer(made), count, active, where, pointer(factors), 80) == 0
        return made

    wide = x.astype(np.float64)
    np.testing.assert_allclose(run(None, coefs), wide + coefs @ wide, atol=2e-6)
    np.testing.assert_allclose(run(y, own), wide + own[:, None] * (y - wide[active]), atol=2e-6)


def test_gates_are_cut_where_few_are_left(ops, level):
    x = np.random.default_rng(6).standard_normal(4096).astype(np.float32) * 3 + 5
    wide = x.astype(np.float64)
    expected = np.maximum(wide - (wide.mean() + 1.6448536 * wide.std()), 0)
    found = row_op(ops, level, 6, x, number=1.6448536)
    np.testing.assert_allclose(found, expected, atol=4e-6)
    assert 0.03 < (found > 0).mean() < 0.07


class Table(ctypes.Structure):
    _fields_ = (
        ("values", ctypes.c_void_p), ("scales", ctypes.c_void_p), ("form", ctypes.c_int32),
        ("rows", ctypes.c_int32), ("columns", ctypes.c_int32), ("group", ctypes.c_int32),
    )  # fmt: skip


@pytest.mark.parametrize("form", ["float32", "bfloat16", "float16", "uint8", "uint4"])
def test_rows_of_a_table_are_read_where_they_lie(ops, form):
    """Groups and pairs of codes are cut anywhere: columns 7 to 75 of groups of 32."""
    import torch

    from gemma_deploy.params.stream import pack_int4

    rng = np.random.default_rng(7)
    if form in ("uint8", "uint4"):
        least = -128 if form == "uint8" else -8
        codes = rng.integers(least, -least, (5, 96)).astype(np.int8)
        scales = rng.uniform(0.5, 2, (5, 3)).astype(np.float32)
        dense = codes * np.repeat(scales, 32, axis=1).astype(np.float64)
        packed = torch.from_numpy(codes)
        values = (pack_int4(packed) ^ 0x88 if form == "uint4" else packed.view(torch.uint8) ^ 0x80).numpy()
    else:
        rounded_ = torch.from_numpy(rng.standard_normal((5, 96)).astype(np.float32)).to(getattr(torch, form))
        dense, scales = rounded_.double().numpy(), np.zeros(1, np.float32)
        values = rounded_.view(torch.uint8).numpy()
    table = Table(values.ctypes.data, scales.ctypes.data, FORMS[form], 5, 96, 32)
    y = np.zeros(68, np.float32)
    assert ops.gemma_op_table_row(ctypes.byref(table), 3, 7, 68, ctypes.c_float(5.5), pointer(y)) == 0
    np.testing.assert_allclose(y, 5.5 * dense[3, 7:75], rtol=3e-7)
    for row, begin, count in ((5, 0, 1), (-1, 0, 1), (0, 90, 7), (0, -1, 1), (0, 0, -1)):
        assert ops.gemma_op_table_row(ctypes.byref(table), row, begin, count, ctypes.c_float(1), pointer(y)) == 2


def kept(x, form):
    """What a cache makes of keys or values [length, D]."""
    import torch

    if form == "bfloat16":
        return torch.from_numpy(x).bfloat16().double().numpy()
    if form == "float32":
        return x.astype(np.float64)
    scale = (np.abs(x).max(1, keepdims=True) / np.float32(127)).astype(np.float32)
    return np.rint(x * (np.float32(1) / scale)) * scale.astype(np.float64)


@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(("head_dim", "cap"), [(64, 0.0), (256, 20.0)])
def test_attention(ops, level, form, head_dim, cap):
    rng = np.random.default_rng(2)
    length = 700
    queries, keys, values = (rng.standard_normal((n, head_dim)).astype(np.float32) for n in (9, length, length))
    queries *= 0.5
    last = np.array([0, 1, 130, 127, 128, length - 1, 200, 250, 299], np.int32)
    first = np.maximum(0, last - np.array([0, 5, 60, 127, 20, 1000, 90, 100, 3])).astype(np.int32)

    def attend(*rows):
        some = [np.ascontiguousarray(one[list(rows)]) for one in (queries, first, last)]
        y = np.full((len(rows), head_dim), np.nan, np.float32)
        number = {"float32": 0, "bfloat16": 2, "int8": 3}[form]
        arguments = (*map(pointer, some), len(rows), pointer(keys), pointer(values), length, head_dim)
        assert ops.gemma_op_attend(level, number, *arguments, ctypes.c_float(cap), pointer(y)) == 0
        return y

    y = attend(*range(9))
    scores = queries.astype(np.float64) @ kept(keys, form).T
    scores = cap * np.tanh(scores / cap) if cap else scores
    place = np.arange(length)
    scores[(place < first[:, None]) | (place > last[:, None])] = -np.inf
    weights = np.exp(scores - scores.max(1, keepdims=True))
    expected = weights / weights.sum(1, keepdims=True) @ kept(values, form)
    # Queries and weights have 15 bits where keys and values are codes: 1e-3 seen, of 256 channels.
    np.testing.assert_allclose(y, expected, atol=2e-3 if form == "int8" else 2e-5)
    for row in (2, 5):
        np.testing.assert_array_equal(attend(row)[0], y[row])


def test_sizes_that_no_matrix_has_are_refused(ops, native_library):
    packed = Packed("uint8", 48, 640, 32)
    x, y = np.zeros((1, 640), np.float32), np.zeros((1, 48), np.float32)

    def status(level=b"plain", begin=0, end=3, count=1, **changes):
        matrix = Matrix.from_buffer_copy(packed.matrix)
        for key, value in changes.items():
            setattr(matrix, key, value)
        return ops.gemma_op_product(level, ctypes.byref(matrix), pointer(x), count, pointer(y), begin, end, 0, 1)

    assert status() == 0
    assert status(level=b"none") == 1
    wrong = [
        {"rows": 47}, {"rows": 0}, {"columns": 100}, {"columns": 0}, {"group": 48}, {"group": 16}, {"group": 4096},
        {"form": 9}, {"form": -1}, {"input_group": 16}, {"input_group": 96},
        {"input_group": 4096}, {"begin": -1}, {"end": 4}, {"begin": 2, "end": 1}, {"count": 0},
    ]  # fmt: skip
    assert [status(**changes) for changes in wrong] == [2] * len(wrong)
