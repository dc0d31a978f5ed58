"""The plan in model.onnx, read by the library: what the onnx package reads there, or a message."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from gemma_deploy.backends.native.graph import DOMAIN, GRAPH, OPERATOR, plan_in
from gemma_deploy.errors import ArtifactError

PLAN = "model version=1 name=\u00e9\n" + "layer heads=4 kv_heads=2 eps=1e-06\n" * 6
NO_PLAN = "is not a graph of one GemmaDecoder with a plan"


def node(operator=OPERATOR, domain=DOMAIN, **attributes):
    return helper.make_node(operator, ["ids", "parameters"], ["logits"], domain=domain, name="x", **attributes)


def model_of(*nodes):
    ports = [
        helper.make_tensor_value_info(name, kind, ["batch", "sequence"])
        for name, kind in (("ids", TensorProto.INT64), ("logits", TensorProto.FLOAT))
    ]
    parameters = helper.make_tensor("parameters", TensorProto.UINT8, [9], bytes(9), raw=True)
    graph = helper.make_graph(list(nodes), "model", ports[:1], ports[1:], initializer=[parameters])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid(DOMAIN, 1)])


WHOLE = model_of(node(scale=0.5, sizes=[1, 2, 300], plan=PLAN, other="text"))


def plan_by_onnx(data):
    """The plan as the onnx package has it; None where it reads none."""
    try:
        (one,) = onnx.load_model_from_string(data).graph.node
        (plan,) = (found for found in one.attribute if found.name == "plan")
    except Exception:
        return None
    return plan.s if (one.op_type, one.domain) == (OPERATOR, DOMAIN) else None


def test_a_plan_is_read_as_the_onnx_package_reads_it(native_library, tmp_path):
    (tmp_path / GRAPH).write_bytes(WHOLE.SerializeToString())
    assert plan_in(tmp_path) == PLAN


@pytest.mark.parametrize(
    "model",
    [
        model_of(),
        model_of(node(plan=PLAN), node(plan=PLAN)),
        model_of(node(plan=7)),
        model_of(node(plane=PLAN)),
        model_of(node(operator="MatMul", plan=PLAN)),
        model_of(node(domain="", plan=PLAN)),
    ],
    ids=["nothing", "two", "number", "other attribute", "other operator", "other domain"],
)
def test_a_graph_without_one_is_refused(native_library, tmp_path, model):
    (tmp_path / GRAPH).write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match=NO_PLAN):
        plan_in(tmp_path)


def test_no_file_and_no_graph_are_told(native_library, tmp_path):
    with pytest.raises(ArtifactError, match="No such file"):
        plan_in(tmp_path)
    (tmp_path / GRAPH).write_bytes(b"")
    with pytest.raises(ArtifactError, match="no file that holds anything"):
        plan_in(tmp_path)
    (tmp_path / GRAPH).write_text("no graph at all")
    with pytest.raises(ArtifactError, match="is not an ONNX graph") as told:
        plan_in(tmp_path)
    assert str(tmp_path / GRAPH) in str(told.value)


def test_a_damaged_graph_gives_what_the_onnx_package_reads_or_a_message(native_library, tmp_path):
    """Cut at every byte, and with bytes changed at random."""
    whole, rng, read = WHOLE.SerializeToString(), np.random.default_rng(0), 0
    damaged = [whole[:size] for size in range(1, len(whole))]
    for _ in range(400):
        changed = bytearray(whole)
        for place in rng.integers(0, len(whole), rng.integers(1, 4)):
            changed[place] = rng.choice([0, 1, 2, 7, 127, 128, 255, rng.integers(256)])
        damaged.append(bytes(changed))
    for data in damaged:
        (tmp_path / GRAPH).write_bytes(data)
        try:
            found = plan_in(tmp_path)
        except ArtifactError:
            continue
        expected = plan_by_onnx(data)
        if expected is not None:  # it also refuses names that are no UTF-8, and enums that it does not know
            assert found == expected.decode(errors="replace")
            read += 1
    assert read > 30
