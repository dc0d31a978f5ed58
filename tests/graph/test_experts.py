"""Bodies of the operators for experts, in ONNX Runtime, against NumPy in float64."""

import math

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from gemma_deploy.graph.functions import DOMAIN, EXPERTS, QUANTIZED_EXPERTS, used_functions

COUNT, HIDDEN, WIDTH = 5, 32, 16


def expected(x, weights, given, gate_up, down):
    """One token after the other, each through its own experts."""
    out = np.zeros(x.shape)
    for at in np.ndindex(*given.shape):
        expert, token = given[at], x[at[:-1]].astype(np.float64)
        gate, up = np.split(gate_up[expert].astype(np.float64) @ token, 2)
        gelu = 0.5 * gate * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
        out[at[:-1]] += weights[at] * (down[expert].astype(np.float64) @ (gelu * up))
    return out


def run(op, inputs, attributes):
    """A model of one node, its body inlined by ONNX Runtime."""
    values = []
    for name, (array, dtype) in inputs.items():
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(array.shape))
        value.const_value = ir.tensor(array, dtype=dtype, name=name)
        values.append(value)
    fed, kept = values[:3], values[3:]
    node = ir.node(op, values, {"approximate": "tanh", **attributes}, domain=DOMAIN)
    made = node.outputs[0]
    made.name, made.type = "y", ir.TensorType(ir.DataType.FLOAT)
    imports = {"": 24, DOMAIN: 1}
    graph = ir.Graph(fed, [made], nodes=[node], initializers=kept, opset_imports=imports, name="experts")
    model = ir.Model(graph, ir_version=10)
    for function in used_functions(model, 24):
        model.functions[function.identifier()] = function
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {value.name: inputs[value.name][0] for value in fed})[0]


@pytest.fixture
def case():
    rng = np.random.default_rng(4)
    x = rng.standard_normal((2, 3, HIDDEN), np.float32)
    weights = rng.random((2, 3, 2)).astype(np.float32)
    given = np.stack([rng.permutation(COUNT)[:2] for _ in range(6)]).reshape(2, 3, 2)
    stacks = [rng.standard_normal(shape, np.float32) for shape in ((COUNT, 2 * WIDTH, HIDDEN), (COUNT, HIDDEN, WIDTH))]
    return x, weights, given, stacks


def common(case):
    x, weights, given, _ = case
    FLOAT = ir.DataType.FLOAT
    return {"x": (x, FLOAT), "weights": (weights, FLOAT), "experts": (given, ir.DataType.INT64)}


def test_floats(case):
    named = zip(("gate_up", "down"), case[3], strict=True)
    inputs = common(case) | {name: (stack, ir.DataType.FLOAT) for name, stack in named}
    right = expected(*case[:3], *case[3])
    # 4e-7 of the largest seen: sums in float32
    np.testing.assert_allclose(run(EXPERTS, inputs, {}), right, rtol=0, atol=2e-6 * np.abs(right).max())


def test_the_number_behind_the_last_expert_adds_nothing(case):
    """So a rank is told of experts of other ranks: here two of them have three and two."""
    x, weights, given, (gate_up, down) = case
    right, parts = expected(*case[:3], gate_up, down), []
    for first, stop in ((0, 3), (3, 5)):
        local = np.where((given >= first) & (given < stop), given - first, stop - first)
        stacks = {"gate_up": (gate_up[first:stop], ir.DataType.FLOAT), "down": (down[first:stop], ir.DataType.FLOAT)}
        parts.append(run(EXPERTS, common((x, weights, local, None)) | stacks, {}))
    np.testing.assert_allclose(sum(parts), right, rtol=0, atol=2e-6 * np.abs(right).max())
    assert all(np.abs(part).max() > 0.1 * np.abs(right).max() for part in parts)


@pytest.mark.parametrize(("dtype", "most", "groups"), [("INT8", 127, 1), ("INT8", 127, 2), ("INT4", 7, 2)])
def test_codes_with_scales_of_rows_or_groups(case, dtype, most, groups):
    rng, inputs, stacks, sizes = np.random.default_rng(5), common(case), [], {}
    for name, stack in zip(("gate_up", "down"), case[3], strict=True):
        codes = rng.integers(-most, most + 1, stack.shape).astype(np.int8)
        scale = (rng.random((*stack.shape[:2], groups)) / most).astype(np.float32)
        sizes[f"{name}_block_size"] = stack.shape[2] // groups
        stacks.append(codes * np.repeat(scale.astype(np.float64), stack.shape[2] // groups, axis=2))
        if dtype == "INT4":
            import ml_dtypes

            codes = codes.astype(ml_dtypes.int4)
        inputs |= {name: (codes, ir.DataType[dtype]), f"{name}_scale": (scale, ir.DataType.FLOAT)}
    right = expected(*case[:3], *stacks)
    found = run(QUANTIZED_EXPERTS, inputs, sizes)
    np.testing.assert_allclose(found, right, rtol=0, atol=2e-6 * np.abs(right).max())
