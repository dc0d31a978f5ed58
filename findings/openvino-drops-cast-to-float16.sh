#!/usr/bin/env bash
# OpenVINO's CPU plugin drops a Cast to float16 that a model contains, and keeps one to bfloat16.
#
# version   openvino 2026.4.1, onnx 1.23.2, onnxruntime 1.32.0, numpy 2.4.6.
# expected  Cast to float16 and back rounds to 11 bits, flushes 1e-9 to zero and turns 70000 into infinity: the model
#           says so itself, whatever precision the plugin chooses for the operators. ONNX Runtime and onnx's reference
#           do it.
# seen      The pair does nothing: every value comes back as it was, with default options and with
#           INFERENCE_PRECISION_HINT f32 and EXECUTION_MODE_HINT ACCURACY. With bfloat16 in its place the values are
#           rounded.
#
# Output:
#   x                                 [1.0001000e+00 7.0000000e+04 9.9999997e-10 3.3333334e-01]
#   float16, ONNX Runtime             [1.                inf 0.         0.33325195]
#   float16, OpenVINO, defaults       [1.0001000e+00 7.0000000e+04 9.9999997e-10 3.3333334e-01]
#   bfloat16, OpenVINO, defaults      [1.0000000e+00 7.0144000e+04 9.9680619e-10 3.3398438e-01]
#   float16, ONNX Runtime             [1.                inf 0.         0.33325195]
#   float16, OpenVINO, f32, ACCURACY  [1.0001000e+00 7.0000000e+04 9.9999997e-10 3.3333334e-01]
#   bfloat16, OpenVINO, f32, ACCURACY [1.0000000e+00 7.0144000e+04 9.9680619e-10 3.3398438e-01]
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

x = np.array([1.0001, 70000, 1e-9, 1 / 3], np.float32)
core = ov.Core()


def both(to, options):
    graph = h.make_graph(
        [h.make_node("Cast", ["x"], ["low"], to=to), h.make_node("Cast", ["low"], ["y"], to=T.FLOAT)],
        "g",
        [h.make_tensor_value_info("x", T.FLOAT, [4])],
        [h.make_tensor_value_info("y", T.FLOAT, [4])],
    )
    blob = h.make_model(graph, opset_imports=[h.make_opsetid("", 21)], ir_version=10).SerializeToString()
    compiled = core.compile_model(core.read_model(blob), "CPU", {"INFERENCE_NUM_THREADS": "1", **options})
    return ort.InferenceSession(blob, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0], compiled({"x": x})[0]


print("x                                ", x)
for name, options in {
    "defaults": {},
    "f32, ACCURACY": {"INFERENCE_PRECISION_HINT": "f32", "EXECUTION_MODE_HINT": "ACCURACY"},
}.items():
    expected, half = both(T.FLOAT16, options)
    brain = both(T.BFLOAT16, options)
    print("float16, ONNX Runtime            ", expected)
    print(f"float16, OpenVINO, {name:<14}", half)
    print(f"bfloat16, OpenVINO, {name:<13}", brain[1])
    if not (np.array_equal(half, x) and np.isinf(expected[1]) and np.array_equal(*brain)):
        sys.exit("CHANGED: the Cast to float16 is computed, or that to bfloat16 is not")
PYTHON
