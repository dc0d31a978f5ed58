#!/usr/bin/env bash
# OpenVINO's QuantizeLinear rounds halves to the odd multiple where the zero point is odd.
#
# version   openvino 2026.4.1, onnx 1.23.2, onnxruntime 1.32.0, numpy 2.4.6.
# expected  ONNX: y = saturate(round(x / y_scale) + y_zero_point), halves to even, so that the zero point moves codes
#           and nothing else: 0.5 and 1.5 become 0 and 2 steps.
# seen      The zero point is added before rounding. With zero point 1 or -1 every half goes the other way (0.5
#           becomes one step, 2.5 three), with 0 or 2 none does. Values at a half are the rule where scales are powers
#           of two. ONNX Runtime and onnx's reference round as ONNX says.
#
# Output:
#   x                          [-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]
#   zero point -1, ONNX Runtime [-2.0, -2.0, 0.0, 0.0, 2.0, 2.0]
#   zero point -1, OpenVINO     [-3.0, -1.0, -1.0, 1.0, 1.0, 3.0]
#   zero point  0, ONNX Runtime [-2.0, -2.0, 0.0, 0.0, 2.0, 2.0]
#   zero point  0, OpenVINO     [-2.0, -2.0, 0.0, 0.0, 2.0, 2.0]
#   zero point  1, ONNX Runtime [-2.0, -2.0, 0.0, 0.0, 2.0, 2.0]
#   zero point  1, OpenVINO     [-3.0, -1.0, -1.0, 1.0, 1.0, 3.0]
#   zero point  2, ONNX Runtime [-2.0, -2.0, 0.0, 0.0, 2.0, 2.0]
#   zero point  2, OpenVINO     [-2.0, -2.0, 0.0, 0.0, 2.0, 2.0]
#   values that differ, for each zero point: {-1: 6, 0: 0, 1: 6, 2: 0}
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-cache-dir --disable-pip-version-check \
    openvino==2026.4.1 onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6

cd "$work"
HOME="$work" OMP_NUM_THREADS=1 "$work/venv/bin/python" - <<'PYTHON'
import sys

import numpy as np
import onnxruntime as ort
import openvino as ov
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper as nh

x = np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5], np.float32)
core = ov.Core()
print("x                         ", x.tolist())
other = {}
for zero in (-1, 0, 1, 2):
    graph = h.make_graph(
        [
            h.make_node("QuantizeLinear", ["x", "scale", "zero"], ["codes"]),
            h.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["y"]),
        ],
        "g",
        [h.make_tensor_value_info("x", T.FLOAT, [6])],
        [h.make_tensor_value_info("y", T.FLOAT, [6])],
        [nh.from_array(np.float32(1), "scale"), nh.from_array(np.int8(zero), "zero")],
    )
    blob = h.make_model(graph, opset_imports=[h.make_opsetid("", 21)], ir_version=10).SerializeToString()
    hints = {"INFERENCE_PRECISION_HINT": "f32", "EXECUTION_MODE_HINT": "ACCURACY", "INFERENCE_NUM_THREADS": "1"}
    seen = core.compile_model(core.read_model(blob), "CPU", hints)({"x": x})[0]
    expected = ort.InferenceSession(blob, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    print(f"zero point {zero:2}, ONNX Runtime", expected.tolist())
    print(f"zero point {zero:2}, OpenVINO    ", seen.tolist())
    if not np.array_equal(expected, np.rint(x)):
        sys.exit("CHANGED: ONNX Runtime does not round to even")
    other[zero] = int((seen != expected).sum())
print("values that differ, for each zero point:", other)
if other != {-1: 6, 0: 0, 1: 6, 2: 0}:
    sys.exit("CHANGED: halves are rounded otherwise now")
PYTHON
