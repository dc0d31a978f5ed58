#!/usr/bin/env bash
# onnxsim and onnxslim drop the metadata_props of nodes that they leave alone, and with them the module that torch's
# exporter wrote there.
#
# version   onnxsim 0.8.1, onnxslim 0.1.98, onnx 1.23.2, onnxruntime 1.32.0, numpy 2.4.6.
# expected  A node that a simplifier does not touch keeps its fields. torch's exporter puts the module path of each
#           node into metadata_props (pkg.torch.onnx.name_scopes), by which a layer is found again in the graph.
# seen      Nodes keep their names and lose metadata_props in both, the graph loses its own in onnxsim; doc_string,
#           which is older, stays in onnxsim and goes in onnxslim. Read module paths before simplifying.
#
# Output:
#   as made   nodes ['first', 'nothing', 'second'], with metadata 3, with doc_string 3; the graph's own 1
#   onnxsim   nodes ['first', 'second'], with metadata 0, with doc_string 2; the graph's own 0
#   onnxslim  nodes ['first', 'second'], with metadata 0, with doc_string 0; the graph's own 0
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-cache-dir --disable-pip-version-check \
    onnxsim==0.8.1 onnxslim==0.1.98 onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6

cd "$work"
HOME="$work" OMP_NUM_THREADS=1 "$work/venv/bin/python" - <<'PYTHON'
import contextlib
import io
import sys

import numpy as np
import onnx
import onnxsim
import onnxslim
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper as nh

nodes = [
    h.make_node("MatMul", ["x", "w"], ["a"], name="first"),
    h.make_node("Identity", ["a"], ["b"], name="nothing"),
    h.make_node("Relu", ["b"], ["y"], name="second"),
]
for node in nodes:
    node.doc_string = "text"
    entry = node.metadata_props.add()
    entry.key, entry.value = "pkg.torch.onnx.name_scopes", f"['', 'layers.0', 'layers.0.{node.name}']"
graph = h.make_graph(
    nodes,
    "g",
    [h.make_tensor_value_info("x", T.FLOAT, [1, 2])],
    [h.make_tensor_value_info("y", T.FLOAT, [1, 2])],
    [nh.from_array(np.eye(2, dtype=np.float32), "w")],
)
entry = graph.metadata_props.add()
entry.key, entry.value = "of the", "graph"
model = h.make_model(graph, opset_imports=[h.make_opsetid("", 21)], ir_version=10)
onnx.checker.check_model(model, full_check=True)


def copy():
    return onnx.ModelProto.FromString(model.SerializeToString())


with contextlib.redirect_stdout(io.StringIO()):
    results = {"as made": copy(), "onnxsim": onnxsim.simplify(copy())[0], "onnxslim": onnxslim.slim(copy())}
kept = {}
for name, one in results.items():
    kept[name] = sum(len(node.metadata_props) for node in one.graph.node)
    texts = sum(bool(node.doc_string) for node in one.graph.node)
    print(f"{name:<9} nodes {[node.name for node in one.graph.node]}, with metadata {kept[name]}, with doc_string {texts}; "
          f"the graph's own {len(one.graph.metadata_props)}")
names = {node.name for one in results.values() for node in one.graph.node}
if not {"first", "second"} <= names or kept != {"as made": 3, "onnxsim": 0, "onnxslim": 0}:
    sys.exit("CHANGED: metadata of nodes stays")
PYTHON
