#!/usr/bin/env bash
# OpenVINO's conversion to paged attention drops a sliding window that is written with LogicalAnd, and says nothing.
#
# version   openvino 2026.4.1, numpy 2.4.6.
# expected  ScaledDotProductAttention has a mask as its fourth input, which says what is seen. SDPAToPagedAttention, what
#           openvino-genai's LLMPipeline does with a model unless it is told otherwise, keeps what the mask says, or
#           refuses it, as it refuses a model without that operator.
# seen      It recognizes the form in which masks of one tracer come (four BitwiseAnd in a row, and what stands around
#           them) and takes the window from there. Every other mask is dropped: the same window written with LogicalAnd
#           gives the same logits step by step, and a model without any window behind the conversion.
#
# Output:
#   largest difference of their logits 0.0
#   written with BitwiseAnd: paged attention has a window of 4
#   written with LogicalAnd: paged attention has a window of 0
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-cache-dir --disable-pip-version-check openvino==2026.4.1 numpy==2.4.6

cd "$work"
HOME="$work" OMP_NUM_THREADS=1 "$work/venv/bin/python" - <<'PYTHON'
import sys

import numpy as np
import openvino as ov
from openvino import opset13 as op
from openvino._offline_transformations import paged_attention_transformation

HEADS, SIZE, WINDOW = 2, 8, 4
i64, f32 = np.int64, np.float32


def const(*numbers):
    return op.constant(np.array(numbers, i64))


def scalar(number):
    return op.constant(i64(number))


def model(conjunction):
    """One attention with a cache, and a mask: causal, and no further back than the window."""
    names = ("input_ids", "attention_mask", "position_ids")
    ids, mask, positions = (op.parameter([-1, -1], i64, name=name) for name in names)
    rows = op.parameter([-1], np.int32, name="beam_idx")
    for one in (ids, mask, positions, rows):
        one.output(0).get_tensor().set_names({one.friendly_name})
    table = op.constant(np.random.default_rng(0).normal(size=(32, HEADS * SIZE)).astype(f32))
    hidden = op.gather(table, op.convert(ids, "i32"), scalar(0))
    heads = op.transpose(op.reshape(hidden, const(0, 0, HEADS, SIZE), True), const(0, 2, 1, 3))
    batch = op.gather(op.shape_of(ids), const(0), scalar(0))
    kept, sinks = [], []
    for part in ("key", "value"):
        empty = op.broadcast(op.constant(f32(0)), op.concat([batch, const(HEADS, 0, SIZE)], 0))
        state = op.read_value(empty, part, ov.Type.f32, ov.PartialShape([-1, HEADS, -1, SIZE]))
        kept.append(op.concat([op.gather(state, rows, scalar(0)), heads], 2))
        sinks.append(op.assign(kept[-1], part))
    new, total = (op.gather(op.shape_of(one), scalar(1), scalar(0)) for one in (ids, mask))
    keys = op.unsqueeze(op.range(scalar(0), total, scalar(1), "i64"), const(0, 1, 2))
    queries = op.unsqueeze(op.range(op.subtract(total, new), total, scalar(1), "i64"), const(0, 1, 3))
    yes = op.constant(np.array(True))
    seen = conjunction(yes, op.greater(keys, op.add(queries, scalar(-WINDOW))))
    seen = conjunction(yes, conjunction(seen, op.less_equal(keys, queries)))
    seen = conjunction(seen, op.unsqueeze(op.convert(mask, "boolean"), const(1, 2)))
    shape = op.concat([batch, const(1), op.unsqueeze(new, scalar(0)), op.unsqueeze(total, scalar(0))], 0)
    seen = op.broadcast(seen, shape, "bidirectional")
    added = op.select(seen, op.constant(f32(0)), op.constant(np.finfo(f32).min))
    added = op.slice(added, const(0), op.unsqueeze(total, scalar(0)), const(1), const(-1))
    attended = op.scaled_dot_product_attention(heads, *kept, added, op.constant(f32(SIZE**-0.5)))
    joined = op.reshape(op.transpose(attended, const(0, 2, 1, 3)), const(0, 0, -1), True)
    result = op.result(op.matmul(joined, table, False, True))
    return ov.Model([result], sinks, [ids, mask, positions, rows], "one layer")


def logits(made):
    compiled = ov.Core().compile_model(made, "CPU", {"INFERENCE_NUM_THREADS": "1", "INFERENCE_PRECISION_HINT": "f32"})
    ids = np.arange(1, 13, dtype=i64)[None]
    fed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "beam_idx": np.zeros(1, np.int32)}
    return compiled({port.any_name: fed.get(port.any_name, ids - 1) for port in compiled.inputs})[0]


def window(made):
    """What paged attention is told of it."""
    paged_attention_transformation(made)
    (node,) = (one for one in made.get_ops() if one.get_type_name() == "PagedAttentionExtension")
    told = ov.Model([op.result(node.input(10).get_source_output())], [], "told")
    return int(ov.compile_model(told, "CPU")({})[0])


written = {"BitwiseAnd": op.bitwise_and, "LogicalAnd": op.logical_and}
first, second = (logits(model(one)) for one in written.values())
print("largest difference of their logits", float(np.abs(first - second).max()))
found = {name: window(model(one)) for name, one in written.items()}
for name, told in found.items():
    print(f"written with {name}: paged attention has a window of {told}")
if found != {"BitwiseAnd": WINDOW, "LogicalAnd": 0} or np.abs(first - second).max():
    sys.exit("CHANGED: the window is kept, or something is said")
PYTHON
