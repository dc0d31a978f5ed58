"""Initializers as views of the parameter file, and what is made of them, evaluated by ONNX Runtime."""

import numpy as np
import onnx_ir as ir
import pytest

from gemma_deploy.backends.onnxruntime.nodes import Nodes
from gemma_deploy.backends.onnxruntime.parts import IR_VERSION, OPSET
from gemma_deploy.backends.onnxruntime.weights import Weights, largest_block
from gemma_deploy.errors import ExportError
from gemma_deploy.names import MICROSOFT
from tests.backends.make import FILE, ParamFile, open_session

ROWS, COLUMNS = (8, 6), 32
PAIR = ["a.gate_proj", "a.up_proj"]
CODES, SCALES = ([f"{name}.{what}" for name in PAIR] for what in ("weight", "scale"))


@pytest.fixture
def file(tmp_path):
    rng, made = np.random.default_rng(2), ParamFile(tmp_path)
    for name, rows in zip(CODES, ROWS, strict=True):
        made.add(name, rng.standard_normal((rows, COLUMNS)).astype(np.float32), (8, None))
    made.add("a.norm.weight", rng.standard_normal(COLUMNS).astype(np.float32))
    made.add("b.o_proj.weight", rng.standard_normal((4, COLUMNS)).astype(np.float32), (8, 16))
    made.add("b.down_proj.weight", rng.standard_normal((5, COLUMNS)).astype(np.float32), (8, None), transposed=True)
    return made


@pytest.fixture
def weights(file):
    return Weights(Nodes(), file.write(), FILE)


def value(weights, file, made, dtype=ir.DataType.FLOAT):
    """What a session computes at its beginning."""
    if made.name in weights.top.initializers:  # an output must be made by a node
        made = weights.top.one("Identity", [made], f"{made.name}.shown")
    made.type = ir.TensorType(dtype)
    graph = ir.Graph([], [made], nodes=weights.top.nodes, initializers=list(weights.top.initializers.values()),
                     opset_imports={"": OPSET, MICROSOFT: 1}, name="weights")  # fmt: skip
    (found,) = open_session(ir.Model(graph, ir_version=IR_VERSION), file.folder).run(None, {})
    return found


def signed(file, names=PAIR):
    return np.concatenate([file.signed[name] for name in names])


def test_two_matrices_that_lie_together_are_one_view(file, weights):
    view = weights.view(CODES, "both")
    assert tuple(view.shape) == (14, COLUMNS)
    np.testing.assert_array_equal(value(weights, file, view, ir.DataType.UINT8).astype(int) - 128, signed(file))
    assert weights.view(CODES, "both") is view


def test_a_view_reads_the_same_bytes_in_another_shape(file, weights):
    view = weights.view(CODES[:1], "blocks", (8, 2, 16), dtype=ir.DataType.UINT8)
    np.testing.assert_array_equal(
        value(weights, file, view, ir.DataType.UINT8).reshape(8, 32).astype(int) - 128, signed(file, PAIR[:1])
    )


@pytest.mark.parametrize("names", [CODES[::-1], [CODES[0], CODES[0]], [SCALES[0], CODES[0]]])
def test_what_does_not_lie_together_is_refused(weights, names):
    with pytest.raises(ExportError, match="does not lie behind") as caught:
        weights.view(names, "both")
    assert caught.value.where == FILE
    assert weights.unused() == [row.name for row in weights.rows.values()]


def test_a_name_that_is_not_in_the_file(weights):
    with pytest.raises(ExportError, match=f"a.down_proj.weight is not in {FILE}"):
        weights.view(["a.down_proj.weight"], "x")
    assert not weights.has("a.down_proj.weight")
    assert weights.has(CODES[0])


def test_a_gain_is_one_plus_the_weight_and_made_once(file, weights):
    gain = weights.gain("a.norm")
    assert weights.gain("a.norm") is gain
    np.testing.assert_array_equal(value(weights, file, gain), np.float32(1) + file.weights["a.norm.weight"])


def test_one_scale_per_row_is_repeated_for_every_block(file, weights):
    scales = weights.block_scales(SCALES, "both", 2)
    assert weights.block_scales(SCALES, "both", 2) is scales
    expected = np.repeat(np.concatenate([file.scales[name] for name in PAIR])[:, None], 2, 1)
    np.testing.assert_array_equal(value(weights, file, scales), expected)


def test_scales_of_groups_are_those_of_the_file(file, weights):
    scales = weights.block_scales(["b.o_proj.scale"], "o", 2)
    assert isinstance(scales.const_value, ir.ExternalTensor)
    np.testing.assert_array_equal(value(weights, file, scales), file.scales["b.o_proj"])
    with pytest.raises(AssertionError):
        weights.block_scales(["b.o_proj.scale"], "o", 4)


def test_transposed_codes_are_read_as_they_lie(file, weights):
    view = weights.view(["b.down_proj.weight"], "b.down_proj.weight")
    assert isinstance(view.const_value, ir.ExternalTensor)
    found = value(weights, file, view, ir.DataType.INT8)
    assert found.dtype == np.int8
    np.testing.assert_array_equal(found, file.signed["b.down_proj"].T)


def test_what_no_view_shows_is_told(weights):
    weights.view(CODES, "both")
    assert weights.unused() == [
        *SCALES, "a.norm.weight", "b.o_proj.scale", "b.down_proj.scale", "b.o_proj.weight", "b.down_proj.weight",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("columns", "most", "block"),
    [(640, 128, 128), (640, 256, 128), (2048, 32, 32), (1152, 256, 128), (6912, 256, 256), (48, 128, 16)],
)
def test_the_largest_block_that_divides_a_row(columns, most, block):
    assert largest_block(columns, most) == block
