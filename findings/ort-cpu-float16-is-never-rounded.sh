#!/usr/bin/env bash
# ONNX Runtime on the CPU does not round between two float16 operators, not even with all optimizations off, so that
# two outputs of one graph contradict each other.
#
# version   onnxruntime 1.32.0, onnx 1.23.2, numpy 2.4.6; CPUExecutionProvider, Linux x86-64.
# expected  Add and Sub of float16 give float16 (ONNX, type constraint T): (60000 + 60000) - 60000 is inf and (1 +
#           2048) - 2048 is 0, as in NumPy. ORT_DISABLE_ALL changes nothing about the graph, and a Cast to float16
#           that the model itself holds is computed.
# seen      The sum stays in float32 until the graph's output: the difference is 60000 and 1 while the sum, read as a
#           second output of the same run, is inf and 2048. A Cast to float16 in the model is dropped in front of a
#           float16 operator too. A model that overflows on a device with real float16 looks healthy here.
#
# Output:
#   sum                       [      inf 2.048e+03]
#   sum - b, expected         [inf  0.]
#   sum - b, seen             [6.e+04 1.e+00]
#   square of float16(x), expected [inf  1.]
#   square of float16(x), seen     [4.9000e+09 1.0002e+00]
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-cache-dir --disable-pip-version-check \
    onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6

cd "$work"
HOME="$work" OMP_NUM_THREADS=1 "$work/venv/bin/python" - <<'PYTHON'
import sys

import numpy as np
import onnxruntime as ort
from onnx import TensorProto as T
from onnx import helper as h


def run(nodes, feed, kind, outputs):
    types = {np.dtype("float16"): T.FLOAT16, np.dtype("float32"): T.FLOAT}
    graph = h.make_graph(
        nodes,
        "g",
        [h.make_tensor_value_info(name, types[value.dtype], value.shape) for name, value in feed.items()],
        [h.make_tensor_value_info(name, kind, None) for name in outputs],
    )
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 21)], ir_version=10)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feed)


a, b = np.array([60000, 1], np.float16), np.array([60000, 2048], np.float16)
with np.errstate(over="ignore"):
    expected = (a + b) - b
nodes = [h.make_node("Add", ["a", "b"], ["sum"]), h.make_node("Sub", ["sum", "b"], ["difference"])]
total, difference = run(nodes, {"a": a, "b": b}, T.FLOAT16, ["sum", "difference"])
print("sum                      ", total)
print("sum - b, expected        ", expected)
print("sum - b, seen            ", difference)

x = np.array([70000, 1.0001], np.float32)
nodes = [
    h.make_node("Cast", ["x"], ["half"], to=T.FLOAT16),
    h.make_node("Mul", ["half", "half"], ["square"]),
    h.make_node("Cast", ["square"], ["y"], to=T.FLOAT),
]
(square,) = run(nodes, {"x": x}, T.FLOAT, ["y"])
with np.errstate(over="ignore"):
    print("square of float16(x), expected", np.square(x.astype(np.float16)).astype(np.float32))
print("square of float16(x), seen    ", square)

if not (np.isinf(total[0]) and difference.tolist() == [60000, 1] and np.isfinite(square[0]) and square[1] > 1):
    sys.exit("CHANGED: float16 results are rounded now")
PYTHON
