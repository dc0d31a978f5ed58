#!/usr/bin/env bash
# BitwiseAnd and BitShift of bytes take several times as long as a sum of the same bytes in float32, with rounding.
#
# version   onnxruntime 1.32.0 (CPU), onnx 1.23.2, numpy 2.4.6.
# expected  And and shift are the cheapest operations there are; taking two 4-bit codes out of a byte costs what copying the
#           bytes costs, and any way through float32 more.
# seen      Both run at about a byte a cycle on one thread, whatever the session may use, nine times as long as Gather copies
#           the same bytes. QLinearAdd of com.microsoft, which reads bytes, adds in float32 and rounds, is vectorized and takes
#           a third to a fifth of the time, on every thread:
#             high = round(byte / 16 - 7.5 / 16), never halfway between two numbers;  low = byte - 16 high
#           are the same codes for every byte.
#
# Output (milliseconds differ; one thread, 16 MiB):
#   BitwiseAnd 5.3 ms, BitShift 4.8 ms; QLinearAdd: high 1.0 ms, low 1.6 ms
#   the same codes: yes
#   And and shift take at least 1.5 times as long: yes
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

MICROSOFT = "com.microsoft"
CONSTANTS = {
    "f": np.uint8(15), "four": np.uint8(4), "zero": np.uint8(0), "unit": np.uint8(1), "one": np.float32(1),
    "sixteenth": np.float32(1 / 16), "shift": np.float32(7.5 / 16), "times": np.float32(-16),
}  # fmt: skip
data = np.random.default_rng(0).integers(0, 256, 16 << 20).astype(np.uint8)
data[:256] = np.arange(256)


def session(node, names):
    values = [helper.make_tensor_value_info(name, TensorProto.UINT8, ["n"]) for name in (*names, "y")]
    graph = helper.make_graph(
        [node], "g", values[:-1], values[-1:],
        [numpy_helper.from_array(np.array(value), name) for name, value in CONSTANTS.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def measured(node, **feeds):
    """The output, and milliseconds of the processor, the least of 15."""
    opened, times = session(node, feeds), []
    for _ in range(15):
        started = time.process_time()
        (y,) = opened.run(None, feeds)
        times.append(1e3 * (time.process_time() - started))
    return y, min(times)


node = helper.make_node
low, and_ms = measured(node("BitwiseAnd", ["b", "f"], ["y"]), b=data)
high, shift_ms = measured(node("BitShift", ["b", "four"], ["y"], direction="RIGHT"), b=data)
inputs = ["b", "sixteenth", "zero", "zero", "shift", "unit", "one", "zero"]
own_high, high_ms = measured(node("QLinearAdd", inputs, ["y"], domain=MICROSOFT), b=data)
inputs = ["b", "one", "zero", "h", "times", "zero", "one", "zero"]
own_low, low_ms = measured(node("QLinearAdd", inputs, ["y"], domain=MICROSOFT), b=data, h=own_high)
print(f"BitwiseAnd {and_ms:.1f} ms, BitShift {shift_ms:.1f} ms; QLinearAdd: high {high_ms:.1f} ms, low {low_ms:.1f} ms")
same = np.array_equal(low, own_low) and np.array_equal(high, own_high)
print(f"the same codes: {'yes' if same else 'no'}")
slow = and_ms + shift_ms > 1.5 * (high_ms + low_ms)
print(f"And and shift take at least 1.5 times as long: {'yes' if slow else 'no'}")
if not same:
    sys.exit("CHANGED: QLinearAdd gives other codes")
if not slow:
    sys.exit("CHANGED: And and shift are as quick")
PYTHON
