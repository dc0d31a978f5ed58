"""Softmax and GELU of float16 graphs: between casts in every generation, one operator in ONNX Runtime, rounded once."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from gemma_deploy.graph.contract import GRAPHS
from gemma_deploy.graph.passes.widen import WIDENED, widen


def graph_of(op, **attributes):
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT16), shape=ir.Shape(("rows", 64)))
    node = ir.node(op, [x], attributes)
    y = node.outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT16), x.shape
    graph = ir.Graph([x], [y], nodes=[node], opset_imports={"": 21}, name="one")
    return ir.Model(graph, ir_version=10)


def exactly(op, x, approximate="none"):
    """By NumPy, in float64."""
    if op == "Softmax":
        powers = np.exp(x - x.max(-1, keepdims=True))
        return powers / powers.sum(-1, keepdims=True)
    if approximate == "tanh":
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    import math

    return 0.5 * x * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))


@pytest.mark.parametrize(
    ("op", "attributes"),
    [("Softmax", {"axis": -1}), ("Gelu", {"approximate": "tanh"}), ("Gelu", {"approximate": "none"})],
)
def test_it_is_one_operator_whose_result_is_rounded_once(tmp_path, op, attributes):
    model = graph_of(op, **attributes)
    assert widen(model) == 1
    assert widen(model) == 0
    assert [node.op_type for node in model.graph] == ["Cast", op, "Cast"]
    assert (model.graph.outputs[0].name, model.graph.outputs[0].dtype) == ("y", ir.DataType.FLOAT16)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "run.onnx")
    options.log_severity_level = 4
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    assert [node.op_type for node in ir.load(tmp_path / "run.onnx").graph] == ["Cast", op, "Cast"]
    x = (np.random.default_rng(0).standard_normal((50, 64)) * 4).astype(np.float16)
    found = session.run(None, {"x": x})[0]
    wanted = exactly(op, x.astype(np.float64), attributes.get("approximate", "none"))
    half_a_step = np.spacing(np.abs(wanted).astype(np.float16)).astype(np.float64) / 2
    # a tie may fall to either side of a float32 result: 1e-6 of the largest
    assert (np.abs(found - wanted) <= half_a_step + 1e-6 * np.abs(wanted).max()).all()


def test_other_operators_and_other_types_stay(tmp_path):
    model = graph_of("Tanh")
    assert widen(model) == 0
    model = graph_of("Softmax", axis=-1)
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.type = ir.TensorType(ir.DataType.FLOAT)
    assert widen(model) == 0


def test_every_generation_has_them_in_float32(built, model_type, config):
    for name in GRAPHS:
        graph = ir.load(built(model_type, "fp16")[0] / f"{name}.onnx").graph
        found = [node for node in graph if node.op_type in WIDENED]
        assert sum(node.op_type == "Gelu" for node in found) == config.num_hidden_layers
        assert sum(node.op_type == "Softmax" for node in found) == config.num_hidden_layers
        types = {value.dtype for node in found for value in (node.inputs[0], node.outputs[0])}
        assert types == {ir.DataType.FLOAT}
        made = {value.name: value.dtype for node in graph for value in node.outputs}
        assert made["model.layers.1.mlp.act_fn.out"] == ir.DataType.FLOAT16
