#!/usr/bin/env bash
# RMSNormalization declares a type of its own for its scale, and no model that uses it can be valid.
#
# version   onnx 1.23.2, onnxruntime 1.32.0, numpy 2.4.6.
# expected  Opset 23 declares X: T, scale: V and Y: V, so that gains may be float32 where activations are float16
#           (Gemma's gain is 1 + w and wants it): Y is float32 then.
# seen      onnx's own shape inference gives Y the type of X, which its schema check then calls inconsistent: with two
#           types the full check fails whatever Y is declared as. onnx's reference gives X's type. The operator's
#           function body multiplies T by V, so that ONNX Runtime refuses the model as well.
#
# Output:
#   schema: X: T, scale: V, Y: V
#   x float32, scale float32, y float32: reference gives float32, ONNX Runtime: loads,
#       check: valid
#   x float32, scale float16, y float32: reference gives float32, ONNX Runtime: refused,
#       check: ...RMSNormalization): Y has inconsistent type tensor(float)
#   x float32, scale float16, y float16: reference gives float32, ONNX Runtime: refused,
#       check: ...RMSNormalization): Y has inconsistent type tensor(float)
#   x float16, scale float32, y float32: reference gives float16, ONNX Runtime: refused,
#       check: ...SNormalization): Y has inconsistent type tensor(float16)
#   x float16, scale float32, y float16: reference gives float16, ONNX Runtime: refused,
#       check: ...SNormalization): Y has inconsistent type tensor(float16)
#   x float16, scale float16, y float16: reference gives float16, ONNX Runtime: loads,
#       check: valid
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
import onnx
import onnxruntime as ort
from onnx import TensorProto as T
from onnx import helper as h
from onnx.reference import ReferenceEvaluator

ort.set_default_logger_severity(4)
NAMES = {T.FLOAT: "float32", T.FLOAT16: "float16"}
schema = onnx.defs.get_schema("RMSNormalization", 23)
print("schema:", ", ".join(f"{one.name}: {one.type_str}" for one in [*schema.inputs, *schema.outputs]))


def last(error):
    return " ".join(str(error).split())[-56:]


results = {}
for x, scale, y in [(a, b, c) for a in NAMES for b in NAMES for c in NAMES if a != b or b == c]:
    graph = h.make_graph(
        [h.make_node("RMSNormalization", ["x", "scale"], ["y"])],
        "g",
        [h.make_tensor_value_info("x", x, [2, 8]), h.make_tensor_value_info("scale", scale, [8])],
        [h.make_tensor_value_info("y", y, [2, 8])],
    )
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 23)], ir_version=11)
    try:
        onnx.checker.check_model(model, full_check=True)
        checked = "valid"
    except Exception as error:  # one of onnx's two kinds
        checked = "..." + last(error)
    try:
        ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        loaded = "loads"
    except Exception:  # ONNX Runtime's own kind
        loaded = "refused"
    feed = {"x": np.ones((2, 8), NAMES[x]), "scale": np.ones(8, NAMES[scale])}
    reference = ReferenceEvaluator(model).run(None, feed)[0].dtype
    print(f"x {NAMES[x]}, scale {NAMES[scale]}, y {NAMES[y]}: reference gives {reference}, ONNX Runtime: {loaded},")
    print(f"    check: {checked}")
    results[x == scale] = results.get(x == scale, []) + [(checked == "valid", loaded == "loads")]
if set(results[True]) != {(True, True)} or set(results[False]) != {(False, False)}:
    sys.exit("CHANGED: some model with two types is valid")
PYTHON
