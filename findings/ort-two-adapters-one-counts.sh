#!/usr/bin/env bash
# Of two active adapters ONNX Runtime computes one, where both change the same matrix; it neither adds nor refuses them.
#
# version   onnxruntime 1.32.0, onnx 1.23.2, numpy 2.4.6; CPUExecutionProvider, Linux x86-64.
# expected  `RunOptions.add_active_adapter` adds to a list of active adapters. Several LoRA adapters that are active
#           together are summed in peft (`set_adapter([...])`), or two values for one input are refused.
# seen      The run goes through and gives exactly what one of the two gives alone, in either order the one that was
#           added first; the other has no effect. To have both, their matrices have to be put side by side into one
#           adapter.
#
# Output:
#   first, then second: what first alone gives
#   second, then first: what second alone gives
#   side by side      : the sum of both
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
from onnx import numpy_helper as n

ort.set_default_logger_severity(4)
rng = np.random.default_rng(0)
x, w, a, b = (rng.standard_normal(shape, np.float32) for shape in ((3, 8), (8, 6), (8, 2), (2, 6)))
graph = h.make_graph(
    [
        h.make_node("MatMul", ["x", "w"], ["base"]),
        h.make_node("MatMul", ["x", "lora_A"], ["inner"]),
        h.make_node("MatMul", ["inner", "lora_B"], ["update"]),
        h.make_node("Add", ["base", "update"], ["y"]),
    ],
    "g",
    [
        h.make_tensor_value_info("x", T.FLOAT, ["rows", 8]),
        h.make_tensor_value_info("lora_A", T.FLOAT, [8, "rank"]),
        h.make_tensor_value_info("lora_B", T.FLOAT, ["rank", 6]),
    ],
    [h.make_tensor_value_info("y", T.FLOAT, ["rows", 6])],
    [n.from_array(w, "w"), n.from_array(a[:, :0], "lora_A"), n.from_array(b[:0], "lora_B")],
)
model = h.make_model(graph, opset_imports=[h.make_opsetid("", 21)], ir_version=10)
session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

other = [rng.standard_normal(matrix.shape, np.float32) for matrix in (a, b)]
adapters = {"first": (a, b), "second": tuple(other), "both": (np.hstack([a, other[0]]), np.vstack([b, other[1]]))}
loaded = {}
for name, pair in adapters.items():
    stored = ort.AdapterFormat()
    stored.set_parameters({f"lora_{which}": ort.OrtValue.ortvalue_from_numpy(matrix) for which, matrix in zip("AB", pair)})
    stored.export_adapter(f"{name}.onnx_adapter")
    loaded[name] = ort.LoraAdapter()
    loaded[name].Load(f"{name}.onnx_adapter")


def run(*names):
    options = ort.RunOptions()
    for name in names:
        options.add_active_adapter(loaded[name])
    return session.run(None, {"x": x}, options)[0]


def which(y):
    parts = {name: x @ one @ two for name, (one, two) in adapters.items() if name != "both"}
    expected = {f"what {name} alone gives": part for name, part in parts.items()}
    expected["the sum of both"] = sum(parts.values())
    return next((what for what, part in expected.items() if np.abs(y - x @ w - part).max() < 1e-4), "something else")


found = [which(run("first", "second")), which(run("second", "first")), which(run("both"))]
print(f"first, then second: {found[0]}")
print(f"second, then first: {found[1]}")
print(f"side by side      : {found[2]}")
if found != ["what first alone gives", "what second alone gives", "the sum of both"]:
    sys.exit("CHANGED: two active adapters are computed in another way")
PYTHON
