#!/usr/bin/env bash
# ONNX Runtime claims opset 24's Attention and refuses the short mask which that opset added.
#
# version   onnxruntime 1.32.0, onnx 1.23.2, numpy 2.4.6; CPUExecutionProvider.
# expected  The operator's text, opset 24: the last dimension of attn_mask may be shorter than total_sequence_length
#           and is padded with negative infinity. onnx's checker takes such a model and its reference computes it.
# seen      The model loads, and the first run fails: inconsistent total_sequence_length. The mask has to be padded in
#           the graph.
#
# Output:
#   mask of 5 columns, padded by hand: largest difference to the reference 1e-07
#   mask of 4 columns: ...inconsistent total_sequence_length (between attn_mask and past_key and past_value)
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
QUERIES, KEYS, MASKED, HEADS, SIZE = 3, 5, 4, 2, 8
rng = np.random.default_rng(0)
feed = {
    "q": rng.standard_normal((1, HEADS, QUERIES, SIZE), np.float32),
    "k": rng.standard_normal((1, HEADS, KEYS, SIZE), np.float32),
    "v": rng.standard_normal((1, HEADS, KEYS, SIZE), np.float32),
    "mask": rng.standard_normal((QUERIES, MASKED), np.float32),
}


def model(mask):
    graph = h.make_graph(
        [h.make_node("Attention", ["q", "k", "v", "mask"], ["y"])],
        "g",
        [h.make_tensor_value_info(name, T.FLOAT, value.shape) for name, value in {**feed, "mask": mask}.items()],
        [h.make_tensor_value_info("y", T.FLOAT, [1, HEADS, QUERIES, SIZE])],
    )
    one = h.make_model(graph, opset_imports=[h.make_opsetid("", 24)], ir_version=11)
    onnx.checker.check_model(one, full_check=True)
    return one


def seen(mask):
    session = ort.InferenceSession(model(mask).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {**feed, "mask": mask})[0]


padded = np.pad(feed["mask"], ((0, 0), (0, KEYS - MASKED)), constant_values=-np.inf)
reference = ReferenceEvaluator(model(feed["mask"])).run(None, feed)[0]
print(f"mask of {KEYS} columns, padded by hand: largest difference to the reference "
      f"{np.abs(seen(padded) - reference).max():.0e}")
try:
    seen(feed["mask"])
except Exception as error:  # ONNX Runtime's own kinds
    reason = " ".join(str(error).split())
    print(f"mask of {MASKED} columns: ...{reason[reason.index('inconsistent'):]}")
else:
    sys.exit("CHANGED: the short mask is computed")
if np.abs(seen(padded) - reference).max() > 1e-5:
    sys.exit("CHANGED: the reference reads the short mask otherwise")
PYTHON
