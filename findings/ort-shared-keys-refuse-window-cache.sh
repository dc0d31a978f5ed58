#!/usr/bin/env bash
# ONNX Runtime's GroupQueryAttention has caches of a window and layers without keys of their own, but not both at once.
#
# version   onnxruntime 1.32.0, onnx 1.23.2, numpy 2.4.6; CPUExecutionProvider.
# expected  sliding_window_cache=1 keeps a window in a buffer, and keys of length 0 let a layer read another one's cache
#           (Gemma 4 E2B: layers that share keys and values). A layer with a window that shares should do both.
# seen      The model loads, and the first run fails: sliding_window_cache=1 is not supported when kv_sequence_length
#           == 0. The buffer read as a whole cache, of the L(T) positions in it, gives the right numbers where the
#           query's own position is given beside it (position_ids); without that it is turned as if it stood at L(T) - 1.
#
# Output:
#   a buffer of 11 for a window of 8, after 20 tokens: 8 positions are in it
#   sharing, as a window cache: ...sliding_window_cache=1 is not supported when kv_sequence_length == 0 (shared KV).
#   sharing, as a whole cache, with position_ids: largest difference to the full cache 0e+00
#   the same without position_ids: 2e-01
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
HEADS, SIZE, WINDOW, CAPACITY, TOKENS = 2, 16, 8, 11, 20
rng = np.random.default_rng(0)
x = {name: rng.standard_normal((1, TOKENS, HEADS * SIZE), np.float32) for name in ("query", "key", "value")}
angles = np.arange(64)[:, None] * 10000.0 ** (-np.arange(0, SIZE, 2) / SIZE)
rotary = {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
NAMES = ("query", "key", "value", "past_key", "past_value", "seqlens_k", "total", "cos", "sin")


def attention(feeds, *, windowed, positions=None):
    more = {} if positions is None else {"positions": np.array([[positions]])}
    given = {**feeds, **rotary, **more}
    types = {np.dtype("float32"): T.FLOAT, np.dtype("int32"): T.INT32, np.dtype("int64"): T.INT64}
    inputs = [h.make_tensor_value_info(name, types[array.dtype], array.shape) for name, array in given.items()]
    outputs = [h.make_tensor_value_info(name, T.FLOAT, None) for name in ("y", "present_key", "present_value")]
    node = h.make_node(
        "GroupQueryAttention", [*NAMES, *more], [value.name for value in outputs], domain="com.microsoft",
        num_heads=HEADS, kv_num_heads=HEADS, do_rotary=1, local_window_size=WINDOW,
        **({"sliding_window_cache": 1} if windowed else {}),
    )
    graph = h.make_graph([node], "g", inputs, outputs)
    opsets = [h.make_opsetid("", 23), h.make_opsetid("com.microsoft", 1)]
    model = h.make_model(graph, opset_imports=opsets, ir_version=11)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, given)


def counts(last, total):
    return {"seqlens_k": np.array([last], np.int32), "total": np.array([total], np.int32)}


def cache(length):
    return {name: np.zeros((1, HEADS, length, SIZE), np.float32) for name in ("past_key", "past_value")}


def sharing(keys, values):
    """The last token's query, and keys of an earlier layer."""
    nothing = np.zeros((1, 0, HEADS * SIZE), np.float32)
    one = {"query": x["query"][:, -1:], "key": nothing, "value": nothing}
    return one | {"past_key": keys, "past_value": values}


_, full_key, full_value = attention({**x, **cache(0), **counts(TOKENS - 1, TOKENS)}, windowed=False)
_, key, value = attention({**x, **cache(CAPACITY), **counts(TOKENS - 1, TOKENS)}, windowed=True)
step = CAPACITY - WINDOW + 1
held = TOKENS - step * -(-(TOKENS - CAPACITY) // step)
print(f"a buffer of {CAPACITY} for a window of {WINDOW}, after {TOKENS} tokens: {held} positions are in it")
right = attention({**sharing(full_key, full_value), **counts(TOKENS - 1, TOKENS)}, windowed=False)[0]
try:
    attention({**sharing(key, value), **counts(TOKENS - 1, TOKENS)}, windowed=True)
except Exception as error:  # ONNX Runtime's own kinds
    reason = " ".join(str(error).split())
    print(f"sharing, as a window cache: ...{reason[reason.index('sliding_window_cache'):]}")
else:
    sys.exit("CHANGED: a window cache is read without new keys")
whole = {**sharing(key, value), **counts(held - 1, held)}
turned = np.abs(attention(whole, windowed=False, positions=TOKENS - 1)[0] - right).max()
plain = np.abs(attention(whole, windowed=False)[0] - right).max()
print(f"sharing, as a whole cache, with position_ids: largest difference to the full cache {turned:.0e}")
print(f"the same without position_ids: {plain:.0e}")
if turned > 1e-5 or plain < 1e-3:
    sys.exit("CHANGED: the buffer is read otherwise")
PYTHON
