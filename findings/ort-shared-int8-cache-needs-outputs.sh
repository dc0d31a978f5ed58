#!/usr/bin/env bash
# ONNX Runtime's GroupQueryAttention reads another layer's float cache without outputs of its own, but no int8 cache.
#
# version   onnxruntime 1.32.0, onnx 1.23.2, numpy 2.4.6; CPUExecutionProvider.
# expected  present_key and present_value are optional outputs. A layer without keys of its own (Gemma 4 E2B: keys of
#           length 0, the source layer's cache as past_key and past_value) has nothing to write, so it leaves them out.
#           That works with a float32 cache, and should with one of int8 codes (k_quant_type, k_scale).
# seen      The int8 model loads, and the first run fails: present_key and present_value must be provided for quantized
#           KV cache. With the two outputs it gives NumPy's numbers, and the codes once more, which nobody wants:
#           past and present are not one buffer where the cache is another node's output.
#
# Output:
#   float32 cache, no outputs: largest difference to NumPy 9e-08
#   int8 cache, no outputs: ...present_key and present_value must be provided for quantized KV cache
#   int8 cache, with outputs: largest difference to NumPy 2e-07, codes unchanged: True
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

ort.set_default_logger_severity(4)
HEADS, SIZE, TOKENS = 2, 16, 20
rng = np.random.default_rng(0)
codes = {name: rng.integers(-127, 128, (1, HEADS, TOKENS, SIZE)).astype(np.int8) for name in ("past_key", "past_value")}
steps = {name: rng.uniform(0.01, 0.02, (1, HEADS, 1, SIZE)).astype(np.float32) for name in ("k_scale", "v_scale")}
floats = {name: code * step for (name, code), step in zip(codes.items(), steps.values())}
query = rng.standard_normal((1, 1, HEADS * SIZE), np.float32)
INT8 = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}


def attention(caches, scales, outputs):
    nothing = np.zeros((1, 0, HEADS * SIZE), np.float32)
    given = {"query": query, "key": nothing, "value": nothing, **caches,
             "seqlens_k": np.array([TOKENS - 1], np.int32), "total": np.array([TOKENS], np.int32)}
    names = [*given, *([*[""] * 5, *scales] if scales else [])]
    given |= scales
    types = {np.dtype("float32"): T.FLOAT, np.dtype("int32"): T.INT32, np.dtype("int8"): T.INT8}
    inputs = [h.make_tensor_value_info(name, types[array.dtype], array.shape) for name, array in given.items()]
    kind = types[caches["past_key"].dtype]
    values = [h.make_tensor_value_info(name, T.FLOAT if name == "y" else kind, None) for name in outputs]
    node = h.make_node("GroupQueryAttention", names, outputs, domain="com.microsoft", num_heads=HEADS,
                       kv_num_heads=HEADS, **(INT8 if scales else {}))
    opsets = [h.make_opsetid("", 23), h.make_opsetid("com.microsoft", 1)]
    model = h.make_model(h.make_graph([node], "g", inputs, values), opset_imports=opsets, ir_version=11)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, given)


rows = query.astype(np.float64).reshape(HEADS, 1, SIZE)
scores = rows @ floats["past_key"][0].transpose(0, 2, 1).astype(np.float64) / np.sqrt(SIZE)
weights = np.exp(scores - scores.max(-1, keepdims=True))
right = (weights / weights.sum(-1, keepdims=True) @ floats["past_value"][0]).reshape(-1)


def off(found):
    return float(np.abs(found[0].reshape(-1) - right).max())


plain = off(attention(floats, {}, ["y"]))
print(f"float32 cache, no outputs: largest difference to NumPy {plain:.0e}")
try:
    attention(codes, steps, ["y"])
except Exception as error:  # ONNX Runtime's own kinds
    reason = " ".join(str(error).split())
    print(f"int8 cache, no outputs: ...{reason[reason.index('present_key'):]}")
else:
    sys.exit("CHANGED: an int8 cache is read without outputs")
found = attention(codes, steps, ["y", "present_key", "present_value"])
same = bool((found[1] == codes["past_key"]).all() and (found[2] == codes["past_value"]).all())
print(f"int8 cache, with outputs: largest difference to NumPy {off(found):.0e}, codes unchanged: {same}")
if plain > 1e-5 or off(found) > 1e-5 or not same:
    sys.exit("CHANGED: the numbers differ")
PYTHON
