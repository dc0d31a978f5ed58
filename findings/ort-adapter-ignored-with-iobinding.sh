#!/usr/bin/env bash
# ONNX Runtime computes without the active adapter, and says nothing, where inputs and outputs are bound.
#
# version   onnxruntime 1.32.0, onnx 1.23.2, numpy 2.4.6; CPUExecutionProvider, Linux x86-64.
# expected  `RunOptions.add_active_adapter` ("Adds specified adapter as an active adapter") holds for every run that is
#           given these options: run(outputs, feeds, options) and run_with_iobinding(binding, options) alike; or the
#           second one refuses them.
# seen      run computes with the adapter. run_with_iobinding takes the same options and gives the numbers of the model
#           alone; the only trace is a line of the log, of level warning. The adapter's matrices have to be bound as
#           inputs, by their names, with bind_ortvalue_input (bind_cpu_input knows no input that has a default).
#
# Output:
#   run, options                       with the adapter
#   run_with_iobinding, options        without the adapter
#   run_with_iobinding, bound matrices with the adapter
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

stored = ort.AdapterFormat()
stored.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in (("lora_A", a), ("lora_B", b))})
stored.export_adapter("two.onnx_adapter")
adapter, options = ort.LoraAdapter(), ort.RunOptions()
adapter.Load("two.onnx_adapter")
options.add_active_adapter(adapter)


def which(y):
    found = [word for word, expected in (("without", x @ w), ("with", x @ w + x @ a @ b))
             if np.abs(y - expected).max() < 1e-4]
    return found[0] if found else "neither"


def bound(matrices, *given):
    binding = session.io_binding()
    binding.bind_cpu_input("x", x)
    for name, value in matrices.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(value))
    binding.bind_output("y", "cpu")
    session.run_with_iobinding(binding, *given)
    return binding.get_outputs()[0].numpy()


plain, ignored = which(session.run(None, {"x": x}, options)[0]), which(bound({}, options))
by_name = which(bound({"lora_A": a, "lora_B": b}))
print(f"run, options                       {plain} the adapter")
print(f"run_with_iobinding, options        {ignored} the adapter")
print(f"run_with_iobinding, bound matrices {by_name} the adapter")
if (plain, ignored, by_name) != ("with", "without", "with"):
    sys.exit("CHANGED: an active adapter counts where inputs are bound")
PYTHON
