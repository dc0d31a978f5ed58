#!/usr/bin/env bash
# MatMulNBits is another kernel where its matrix is no constant of the graph: other numbers, and dozens of times the time.
#
# version   onnxruntime 1.32.0 (CPU), onnx 1.23.2, numpy 2.4.6.
# expected  accuracy_level is an attribute of the node, and the shapes are the same: the same codes and scales give the same
#           numbers at about the same speed, whether they are initializers or what a Gather took out of a larger tensor (one
#           expert's matrix of many).
# seen      Activations are rounded to 8 bits for an initializer, which is packed when the session opens. For a matrix that is
#           computed nothing is rounded, whatever accuracy_level says: all of it is dequantized to float32 at every run and
#           multiplied then; one token takes 20 to 200 times as long, and memory for the float32 matrix. MatMulIntegerToFloat
#           takes matrices as they come.
#
# Output (milliseconds differ):
#   initializer: largest error 4.6e-03, 0.06 ms
#   gathered:    largest error 3.5e-07, 8.78 ms
#   the slower one takes at least 5 times as long: yes
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-cache-dir --disable-pip-version-check \
    onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6

cd "$work"
HOME="$work" "$work/venv/bin/python" - <<'PYTHON'
import sys
import time

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

K, N, BLOCK = 2816, 1408, 64
rng = np.random.default_rng(0)
codes = rng.integers(0, 256, (2, N, K // BLOCK, BLOCK)).astype(np.uint8)
scales = rng.uniform(0.5, 1.5, (2, N, K // BLOCK)).astype(np.float32) / 4096
x = rng.standard_normal((1, K)).astype(np.float32)


def session(nodes, tensors, inputs):
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, K]), *inputs],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, N])],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


product = helper.make_node(
    "MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft",
    K=K, N=N, bits=8, block_size=BLOCK, accuracy_level=4,
)  # fmt: skip
gathers = [helper.make_node("Gather", [f"all_{name}", "which"], [name]) for name in ("codes", "scales")]
which = helper.make_tensor_value_info("which", TensorProto.INT64, [])
matrix = ((codes[1].astype(np.float64) - 128) * scales[1][..., None]).reshape(N, K)
right, found = x.astype(np.float64) @ matrix.T, {}
for name, made, feeds in (
    ("initializer:", session([product], {"codes": codes[1], "scales": scales[1]}, []), {"x": x}),
    ("gathered:", session([*gathers, product], {"all_codes": codes, "all_scales": scales}, [which]),
     {"x": x, "which": np.array(1, np.int64)}),
):  # fmt: skip
    times = []
    for _ in range(30):
        started = time.perf_counter()
        (y,) = made.run(None, feeds)
        times.append(1e3 * (time.perf_counter() - started))
    error = float(np.abs(y - right).max() / np.abs(right).max())
    found[name] = error, min(times)
    print(f"{name:<12} largest error {error:.1e}, {min(times):.2f} ms")
(packed, quick), (computed, slow) = found.values()
print(f"the slower one takes at least 5 times as long: {'yes' if slow > 5 * quick else 'no'}")
if packed < 1e-4:
    sys.exit("CHANGED: activations are not rounded for an initializer")
if computed > 1e-5:
    sys.exit("CHANGED: activations are rounded for a matrix that is computed")
if slow < 5 * quick:
    sys.exit("CHANGED: a matrix that is computed is as quick")
PYTHON
