#!/usr/bin/env bash
# onnxscript's optimizer makes one Clip of two whose ranges do not meet, which computes something else.
#
# version   onnxscript 0.7.2, onnx 1.23.2, onnxruntime 1.32.0, numpy 2.4.6.
# expected  optimize() keeps what a model computes. Clip to [0, 1] and then to [2, 3] is 2 everywhere; Clip to [-3,
#           -1] and then Relu is 0 everywhere.
# seen      The bounds are merged one by one (largest minimum, smallest maximum), and the minimum of what comes out is
#           above its maximum, so that the maximum decides: 1 and -1 everywhere, without a warning. onnxsim 0.8.1
#           leaves both pairs alone.
#
# Output:
#   Clip to [0, 1], Clip to [2, 3]
#       as written     [2.0, 2.0, 2.0, 2.0, 2.0]
#       by onnxscript  [1.0, 1.0, 1.0, 1.0, 1.0] ['Clip']
#       by onnxsim     [2.0, 2.0, 2.0, 2.0, 2.0] ['Clip', 'Clip']
#   Clip to [-3, -1], Relu
#       as written     [0.0, 0.0, 0.0, 0.0, 0.0]
#       by onnxscript  [-1.0, -1.0, -1.0, -1.0, -1.0] ['Clip']
#       by onnxsim     [0.0, 0.0, 0.0, 0.0, 0.0] ['Clip', 'Relu']
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-cache-dir --disable-pip-version-check \
    onnxscript==0.7.2 onnxsim==0.8.1 onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6

cd "$work"
HOME="$work" OMP_NUM_THREADS=1 "$work/venv/bin/python" - <<'PYTHON'
import sys

import numpy as np
import onnx
import onnxruntime as ort
import onnxscript.optimizer
import onnxsim
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper as nh

x = np.array([-5, -2, 0.5, 2.5, 9], np.float32)


def model(nodes, **bounds):
    graph = h.make_graph(
        nodes,
        "g",
        [h.make_tensor_value_info("x", T.FLOAT, [5])],
        [h.make_tensor_value_info("y", T.FLOAT, [5])],
        [nh.from_array(np.float32(value), name) for name, value in bounds.items()],
    )
    return h.make_model(graph, opset_imports=[h.make_opsetid("", 21)], ir_version=10)


def run(one):
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(one.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0].tolist()


CASES = {
    "Clip to [0, 1], Clip to [2, 3]": model(
        [h.make_node("Clip", ["x", "a", "b"], ["one"]), h.make_node("Clip", ["one", "c", "d"], ["y"])], a=0, b=1, c=2, d=3
    ),
    "Clip to [-3, -1], Relu": model(
        [h.make_node("Clip", ["x", "a", "b"], ["one"]), h.make_node("Relu", ["one"], ["y"])], a=-3, b=-1
    ),
}
holds = True
for name, one in CASES.items():
    optimized = onnxscript.optimizer.optimize(onnx.ModelProto.FromString(one.SerializeToString()))
    simplified, _ = onnxsim.simplify(onnx.ModelProto.FromString(one.SerializeToString()))
    plain, seen = run(one), run(optimized)
    print(name)
    print("    as written    ", plain)
    print("    by onnxscript ", seen, [node.op_type for node in optimized.graph.node])
    print("    by onnxsim    ", run(simplified), [node.op_type for node in simplified.graph.node])
    holds &= plain != seen and run(simplified) == plain
if not holds:
    sys.exit("CHANGED: the optimized model computes what the model does")
PYTHON
