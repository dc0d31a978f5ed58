"""One linear at a time against NumPy: the rounding of activations, the integer product, what 14 bits add."""

import numpy as np
import onnx_ir as ir
import pytest

from gemma_deploy.backends.onnxruntime.exact import exact
from gemma_deploy.backends.onnxruntime.linears import Matrix, product_of, rounded_tokens
from gemma_deploy.backends.onnxruntime.nodes import Nodes
from gemma_deploy.backends.onnxruntime.parts import IR_VERSION, OPSET
from gemma_deploy.backends.onnxruntime.weights import Weights
from gemma_deploy.names import MICROSOFT
from tests.backends.make import FILE, ParamFile, off, open_session

NAMES = ("a.q_proj", "a.k_proj", "a.v_proj")
ROWS, COLUMNS = (48, 16, 16), 96


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(bits, group) -> a file with three matrices that read one input; no bits: float32."""
    known = {}

    def get(bits=8, group=None, columns=COLUMNS, transposed=False):
        key = bits, group, columns, transposed
        if key not in known:
            rng, file = np.random.default_rng(5), ParamFile(tmp_path_factory.mktemp("linear"))
            for name, rows in zip(NAMES, ROWS, strict=True):
                matrix = rng.standard_normal((rows, columns)).astype(np.float32)
                file.add(f"{name}.weight", matrix, (bits, group) if bits else None, transposed)
            known[key] = file, file.write()
        return known[key]

    return get


@pytest.fixture(scope="module")
def transposed(files):
    """A file of three matrices for integer products, and its rows."""
    return files(transposed=True)


def graph_of(rows, names=NAMES, in_14_bits=False, block=32):
    """x -> out: integer products side by side of transposed codes, else one product for all."""
    nodes, x = Nodes(), given()
    weights = Weights(nodes, rows, FILE)
    if Matrix(weights, names[:1], names[0], block=block).integer:
        tokens = rounded_tokens(nodes, x, "a.qkv_proj", in_14_bits=in_14_bits)
        matrices = [Matrix(weights, [name], name, block=block) for name in names]
        outs = [one.integer_product(nodes, tokens, f"{one.name}.out") for one in matrices]
        made = nodes.one("Concat", outs, "out", axis=-1)
    else:
        made = Matrix(weights, names, "a.qkv_proj", block=block).product(nodes, x, "out")
    return model_of(nodes, x, made)


def model_of(nodes, x, *made):
    for value in made:
        value.type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], made, nodes=nodes.nodes, initializers=list(nodes.initializers.values()),
                     opset_imports={"": OPSET, MICROSOFT: 1}, name="linear")  # fmt: skip
    return ir.Model(graph, ir_version=IR_VERSION)


def given():
    return ir.Value(name="x", shape=ir.Shape(("b", "s", "k")), type=ir.TensorType(ir.DataType.FLOAT))


def fetched(file, model, x, *names, optimize=False):
    """The product, or the named inner values."""
    for node in model.graph:
        for value in node.outputs:
            if value.name in names:
                model.graph.outputs.append(value)
    session = open_session(model, file.folder, optimize)
    found = dict(zip([value.name for value in session.get_outputs()], session.run(None, {"x": x}), strict=True))
    return [found[name] for name in names] if names else next(iter(found.values()))


def matrix_of(file, names=NAMES):
    return np.concatenate([file.weights[f"{name}.weight"] for name in names])


def together(values, names=NAMES):
    return np.concatenate([values[name] for name in names])


@pytest.fixture(scope="module")
def x():
    """Two rows of 20 tokens, of very different sizes."""
    rng = np.random.default_rng(6)
    return (rng.standard_normal((2, 20, COLUMNS)) * 10.0 ** rng.uniform(-4, 4, (2, 20, 1))).astype(np.float32)


def test_codes_of_a_token_are_rounded_to_its_own_127_steps(transposed, x):
    file, rows = transposed
    (high,) = fetched(file, graph_of(rows), x, "a.qkv_proj.high")
    assert high.dtype == np.uint8
    even = x / np.abs(x).max(-1, keepdims=True)
    # By the same float32 division, so that ties fall the same way: to even, as np.rint.
    expected = np.rint(even / np.float32(1 / 127)).astype(int) + 128
    np.testing.assert_array_equal(high.astype(int), expected)
    assert set(np.abs(high.astype(int) - 128).max(-1).ravel()) == {127}


def integer_product(file, x):
    """Codes times codes in integers, then both scales: float64."""
    token = np.abs(x).max(-1, keepdims=True)
    codes = np.rint(x / token / np.float32(1 / 127)).astype(np.int64)
    total = codes @ together(file.signed).astype(np.int64).T
    return total, total * (token.astype(np.float64) / 127) * together(file.scales).astype(np.float64)


@pytest.mark.parametrize("optimize", [False, True])
def test_the_integer_product_is_exact(transposed, x, optimize):
    """Every sum of products is the integer it must be."""
    file, rows = transposed
    got = fetched(file, graph_of(rows), x, optimize=optimize)
    total, expected = integer_product(file, x)
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=0)
    token = np.abs(x).max(-1, keepdims=True).astype(np.float64)
    back = got / (token / 127) / together(file.scales)
    np.testing.assert_array_equal(np.rint(back), total)


@pytest.mark.parametrize("optimize", [False, True])
def test_both_halves_of_a_product_of_14_bits_are_exact(transposed, x, optimize):
    """Each is the integer it must be, and their sum what 14 bits stand for."""
    file, rows = transposed
    wanted = "a.qkv_proj.codes", "a.q_proj.product", "out"
    codes, product, out = fetched(file, graph_of(rows, in_14_bits=True), x, *wanted, optimize=optimize)
    assert (codes.dtype, codes.shape) == (np.uint8, (2, 20, 2, COLUMNS))
    signed, scales = (together(values).astype(np.float64) for values in (file.signed, file.scales))
    total = (codes.astype(np.float64) - 64) @ signed.T
    np.testing.assert_array_equal(np.rint(product * 63 / scales[: ROWS[0]]), total[..., : ROWS[0]])
    token = np.abs(x).max(-1, keepdims=True).astype(np.float64)
    expected = token * scales * (total[:, :, 0] + total[:, :, 1] / 126) / 63
    assert np.abs((out - expected) / np.abs(expected).max(-1, keepdims=True)).max() < 1e-6  # 1.7e-7 was the most


def test_the_largest_codes_do_not_saturate(tmp_path):
    """Not even in a product of 14 bits on processors that add pairs of u8 by s8 products in 16 bits: see its codes."""
    file = ParamFile(tmp_path)
    file.add("a.q_proj.weight", np.ones((16, 512), np.float32), (8, None), transposed=True)
    rows, halves = file.write(), np.arange(-512, 512) / 126  # every step of the high half, and every tie between two
    tokens = np.concatenate([np.ones((1, 512)), -np.ones((1, 512)), halves.reshape(2, 512), np.eye(512)[:1],
                             np.random.default_rng(8).uniform(-1, 1, (200, 512))])[None]  # fmt: skip
    for size in (1.0, 1e-20, 3e38):
        given = (tokens / np.abs(tokens).max(-1, keepdims=True) * size).astype(np.float32)
        (codes,) = fetched(file, graph_of(rows, NAMES[:1], in_14_bits=True), given, "a.qkv_proj.codes", optimize=True)
        assert (codes.min(), codes.max()) == (1, 127)
        assert 2 * int(codes.max()) * int(np.abs(file.signed["a.q_proj"]).max()) < 2**15
    for in_14_bits in (False, True):
        got = fetched(
            file, graph_of(rows, NAMES[:1], in_14_bits=in_14_bits), np.ones((1, 16, 512), np.float32), optimize=True
        )
        np.testing.assert_allclose(got, 512, rtol=1e-6)


def test_its_steps_are_those_of_14_bits(transposed, x):
    """The halves together come 126 times nearer to float32 than the high one alone, and 62 times than 8 bits."""
    file, rows = transposed
    expected = x.astype(np.float64) @ matrix_of(file).astype(np.float64).T
    token = np.abs(x).max(-1, keepdims=True)

    def error(got):
        return np.sqrt((((got - expected) / token) ** 2).mean())

    wanted = "out", *(f"{name}.product" for name in NAMES)
    both, *halves = fetched(file, graph_of(rows, in_14_bits=True), x, *wanted)
    high = np.concatenate([half[:, :, 0] for half in halves], -1) * token
    assert 115 < error(high) / error(both) < 137
    assert 57 < error(fetched(file, graph_of(rows), x)) / error(both) < 68


def test_the_low_half_is_what_the_high_half_left(transposed, x):
    file, rows = transposed
    high, low, codes = (
        value.astype(int)
        for value in fetched(
            file, graph_of(rows, in_14_bits=True), x, *(f"a.qkv_proj.{k}" for k in ("high", "low", "codes"))
        )
    )
    np.testing.assert_array_equal(codes, np.concatenate([high, low], 2))
    even = x.astype(np.float64) / np.abs(x).max(-1, keepdims=True)
    read = ((high - 64) + (low - 64) / 126)[:, :, 0] / 63
    assert np.abs(high[:, :, 0] - 64 - even * 63).max() < 0.5001  # nearest: the rest is not more than half a step
    assert np.abs(read - even).max() < 1.1 * 0.5 / (63 * 126)
    assert np.abs(low - 64).max() == 63


@pytest.mark.parametrize("in_14_bits", [False, True])
@pytest.mark.parametrize("size", [0.0, 1e-38])
def test_a_token_of_zeros_stays_finite_and_leaves_the_others_alone(transposed, x, in_14_bits, size):
    file, rows = transposed
    silent = x.copy()
    silent[:, 3] *= size
    got, full = (fetched(file, graph_of(rows, in_14_bits=in_14_bits), one) for one in (silent, x))
    assert np.isfinite(got).all()
    assert np.abs(got[:, 3]).max() < 1e-30
    (codes,) = fetched(file, graph_of(rows, in_14_bits=in_14_bits), silent, "a.qkv_proj.high")
    assert (codes[:, 3] == (64 if in_14_bits else 128)).all()  # and not what a division by zero leaves
    np.testing.assert_array_equal(np.delete(got, 3, 1), np.delete(full, 3, 1))


@pytest.mark.parametrize("in_14_bits", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_token_gives_the_same_bits_alone_and_among_others(files, in_14_bits, threads):
    """As MatMulNBits in blocks of 128 does not."""
    file, rows = files(columns=640, transposed=True)
    x = np.random.default_rng(9).standard_normal((2, 20, 640)).astype(np.float32)
    session = open_session(graph_of(rows, in_14_bits=in_14_bits), file.folder, threads=threads)
    (whole,) = session.run(None, {"x": x})
    alone = [session.run(None, {"x": token[None, None]})[0][0, 0] for token in x.reshape(40, 640)]
    np.testing.assert_array_equal(whole.reshape(40, -1), alone)
    np.testing.assert_array_equal(session.run(None, {"x": x[:1, 5:12]})[0], whole[:1, 5:12])


def test_one_large_token_does_not_coarsen_its_neighbours(transposed, x):
    """With one scale for all tokens, which DynamicQuantizeLinear has, the smaller ones would be lost."""
    file, rows = transposed
    got = fetched(file, graph_of(rows), x)
    expected = x.astype(np.float64) @ matrix_of(file).astype(np.float64).T
    worst = (np.abs(got - expected).max(-1) / np.abs(expected).max(-1)).max()
    assert worst < 0.02


@pytest.mark.parametrize(("bits", "group", "transposed", "op"), [
    (8, None, True, "MatMulIntegerToFloat"), (8, None, False, "MatMulNBits"), (8, 32, False, "MatMulNBits"),
    (4, 32, False, "MatMulNBits"), (4, None, False, "MatMulNBits"), (0, None, False, "FusedMatMul"),
])  # fmt: skip
def test_the_kernel_follows_the_form_of_the_codes(files, x, bits, group, transposed, op):
    file, rows = files(bits, group, transposed=transposed)
    model = graph_of(rows)
    ops = [node.op_type for node in model.graph]
    assert {"MatMulIntegerToFloat", "MatMulNBits", "FusedMatMul"} & set(ops) == {op}
    assert ("QuantizeLinear" in ops) == transposed
    expected = x @ matrix_of(file).T
    size = np.abs(expected).max(-1, keepdims=True)
    assert np.abs((fetched(file, model, x, optimize=True) - expected) / size).max() < (0.03 if bits else 1e-5)
    right = graph_of(rows)
    exact(right)
    assert np.abs((fetched(file, right, x) - expected) / size).max() < 1e-5


def test_rows_of_a_matrix_are_a_matrix(files, x):
    """The LM head in parts."""
    for bits, group in ((8, None), (8, 32), (4, 32), (0, None)):
        file, rows = files(bits, group)
        name, nodes, read = NAMES[0], Nodes(), given()
        weights = Weights(nodes, rows, FILE)
        made = [Matrix(weights, [name], f"part.{i}", block=32, part=part).product(nodes, read, f"out.{i}")
                for i, part in enumerate(((0, 16), (16, 19), (19, 48)))]  # fmt: skip
        parts = open_session(model_of(nodes, read, *made), file.folder).run(None, {"x": x})
        assert [part.shape[-1] for part in parts] == [16, 3, 29]
        whole = fetched(file, graph_of(rows, (name,)), x, optimize=True)
        np.testing.assert_allclose(np.concatenate(parts, -1), whole, rtol=0, atol=1e-6 * np.abs(whole).max())


@pytest.mark.parametrize("bits", [8, 4])
def test_three_matrices_in_one_product_are_the_three_alone(files, x, bits):
    file, rows = files(bits, None if bits == 8 else 32)
    whole = fetched(file, graph_of(rows), x, optimize=True)
    apart = [fetched(file, graph_of(rows, (name,)), x, optimize=True) for name in NAMES]
    assert np.abs(whole).max() > 0
    np.testing.assert_allclose(whole, np.concatenate(apart, -1), rtol=0, atol=1e-5 * np.abs(whole).max())


def rounded_in_blocks(x, block):
    """Activations as MatMulNBits of accuracy level 4 sees them."""
    grouped = x.reshape(-1, x.shape[-1] // block, block)
    scale = np.abs(grouped).max(-1, keepdims=True) / np.float32(127)
    scale[scale == 0] = 1
    return (np.rint(grouped / scale) * scale).reshape(x.shape)


@pytest.mark.parametrize(("columns", "asked", "used"), [(128, 32, 32), (128, 64, 64), (96, 128, 32), (48, 32, 16)])
def test_the_block_kernel_rounds_activations_in_blocks_of_the_asked_size(files, columns, asked, used):
    file, rows = files(8, None, columns)
    rng = np.random.default_rng(7)
    x = (rng.standard_normal((1, 4, columns)) * 10 ** rng.uniform(-1, 1, columns)).astype(np.float32)
    model = graph_of(rows, block=asked)
    (node,) = (node for node in model.graph if node.op_type == "MatMulNBits")
    assert node.attributes["block_size"].value == used
    matrix = matrix_of(file).astype(np.float64)
    errors = {block: off(fetched(file, model.clone(), x, optimize=True), rounded_in_blocks(x, block) @ matrix.T)
              for block in (16, 32, 64) if columns % block == 0}  # fmt: skip
    assert errors[used] < 1e-5
    assert all(error > 1e-4 for block, error in errors.items() if block != used), errors


def test_the_product_of_a_linear():
    assert product_of("model.layers.3.self_attn.v_proj") == "model.layers.3.self_attn.qkv_proj"
    assert product_of("model.layers.3.mlp.up_proj") == "model.layers.3.mlp.gate_up_proj"
    assert product_of("model.layers.3.self_attn.o_proj") == "model.layers.3.self_attn.o_proj"
    assert product_of("model.layers.3.mlp.down_proj") == "model.layers.3.mlp.down_proj"
