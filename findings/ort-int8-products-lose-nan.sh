#!/usr/bin/env bash
# In ONNX Runtime's dynamically quantized products a NaN comes out as ordinary numbers.
#
# version   onnxruntime 1.32.0, onnx 1.23.2, numpy 2.4.6; CPUExecutionProvider on x86-64 (AVX2 or newer).
# expected  A row of activations that holds a NaN gives NaN, as MatMul does, as onnx's reference for
#           DynamicQuantizeLinear does (its scale is NaN then), and as MatMulNBits with accuracy_level 0 does: whoever
#           looks for NaN in logits finds a model that overflowed.
# seen      The kernels look for the largest and smallest activation in a way that passes over NaN nearly everywhere
#           in a row, and round the NaN to some code. DynamicQuantizeLinear, DynamicQuantizeMatMul and MatMulNBits
#           with accuracy_level 4 give finite results; with an infinity in its place no row is finite.
#
# Output:
#   scale of DynamicQuantizeLinear, a NaN in x: reference nan, seen 0.00784
#   DynamicQuantizeMatMul: finite rows with a NaN at 64 of 64 places, with inf at 0
#   MatMulNBits, accuracy_level 4: finite rows with a NaN at 62 of 64 places, with inf at 0
#   MatMulNBits, accuracy_level 0: finite rows with a NaN at 0 of 64 places, with inf at 0
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
from onnx import numpy_helper as nh
from onnx.reference import ReferenceEvaluator

K, N, BLOCK = 64, 16, 32
rng = np.random.default_rng(0)


def model(node, outputs, initializers=()):
    graph = h.make_graph(
        [node],
        "g",
        [h.make_tensor_value_info("x", T.FLOAT, ["rows", K])],
        [h.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()],
        list(initializers),
    )
    opsets = [h.make_opsetid("", 21), h.make_opsetid("com.microsoft", 1)]
    return h.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def session(blob):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(blob, options, providers=["CPUExecutionProvider"])


def microsoft(kind, names, initializers, **attributes):
    node = h.make_node(kind, ["x", *names], ["y"], domain="com.microsoft", **attributes)
    return session(model(node, {"y": T.FLOAT}, [nh.from_array(v, n) for n, v in zip(names, initializers)]))


def finite_rows(one, value):
    """At how many of the K places does `value` in a row leave the row's results finite?"""
    count = 0
    for place in range(K):
        x = rng.standard_normal((2, K)).astype(np.float32)
        x[0, place] = value
        count += bool(np.isfinite(one.run(None, {"x": x})[0][0]).all())
    return count


scales = np.full((N, K // BLOCK), 0.01, np.float32)
packed = rng.integers(0, 256, (N, K // BLOCK, BLOCK)).astype(np.uint8)
signed = rng.integers(-127, 128, (K, N)).astype(np.int8)
sizes = {"K": K, "N": N, "bits": 8, "block_size": BLOCK}
products = {
    "DynamicQuantizeMatMul": microsoft("DynamicQuantizeMatMul", ["w", "s"], [signed, np.full(N, 0.01, np.float32)]),
    "MatMulNBits, accuracy_level 4": microsoft("MatMulNBits", ["w", "s"], [packed, scales], accuracy_level=4, **sizes),
    "MatMulNBits, accuracy_level 0": microsoft("MatMulNBits", ["w", "s"], [packed, scales], accuracy_level=0, **sizes),
}
quantize = model(
    h.make_node("DynamicQuantizeLinear", ["x"], ["codes", "scale", "zero"]),
    {"codes": T.UINT8, "scale": T.FLOAT, "zero": T.UINT8},
)
x = np.linspace(-1, 1, 2 * K, dtype=np.float32).reshape(2, K)
x[0, 3] = np.nan
with np.errstate(invalid="ignore"):
    reference = ReferenceEvaluator(onnx.load_from_string(quantize)).run(None, {"x": x})[1]
seen = session(quantize).run(None, {"x": x})[1]
print(f"scale of DynamicQuantizeLinear, a NaN in x: reference {reference}, seen {seen:.5f}")
counts = {}
for name, one in products.items():
    counts[name] = finite_rows(one, np.nan)
    print(f"{name}: finite rows with a NaN at {counts[name]} of {K} places, with inf at {finite_rows(one, np.inf)}")
lost = [count for name, count in counts.items() if not name.endswith("0")]
if not (np.isnan(reference) and np.isfinite(seen) and min(lost) > K // 2):
    sys.exit("CHANGED: a NaN stays one now")
PYTHON
