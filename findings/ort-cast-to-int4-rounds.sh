#!/usr/bin/env bash
# ONNX Runtime's Cast rounds to the nearest where the target is int4, uint4 or int2, and cuts off where it is int8;
# constant folding gives the other number.
#
# version   onnxruntime 1.32.0, onnx 1.23.2, onnxscript 0.7.2, numpy 2.4.6; CPUExecutionProvider.
# expected  A Cast from float32 to any integer cuts off towards zero: 1.7 is 1 as int4 just as it is as int8. onnx's
#           reference does so, NumPy with ml_dtypes too.
# seen      As int4 1.7 is 2, 2.5 is 3 and -0.5 is -1 (halves go away from zero, where QuantizeLinear takes the even
#           one); as int8 they are 1, 2 and 0. The same Cast of a constant gives 1, 2 and 0 once onnxscript's
#           optimizer has folded it, so that folding changes what the model computes.
#
# Output:
#   x                                [1.7000000476837158, 2.5, -0.5, -1.7000000476837158, 3.0]
#   reference, int8 and int4         [1, 2, 0, -1, 3] [1, 2, 0, -1, 3]
#   ONNX Runtime, int8               [1, 2, 0, -1, 3]
#   ONNX Runtime, int4               [2, 3, -1, -2, 3]
#   constant to int4, as it is       [2, 3, -1, -2, 3]
#   constant to int4, folded before  [1, 2, 0, -1, 3]
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-cache-dir --disable-pip-version-check \
    onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6 onnxscript==0.7.2

cd "$work"
HOME="$work" OMP_NUM_THREADS=1 "$work/venv/bin/python" - <<'PYTHON'
import logging
import sys

import numpy as np
import onnx
import onnxruntime as ort
import onnxscript.optimizer
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper as nh
from onnx.reference import ReferenceEvaluator

logging.disable(logging.WARNING)
x = np.array([1.7, 2.5, -0.5, -1.7, 3.0], np.float32)


def model(to, constant=False):
    graph = h.make_graph(
        [h.make_node("Cast", ["x"], ["codes"], to=to), h.make_node("Cast", ["codes"], ["y"], to=T.FLOAT)],
        "g",
        [] if constant else [h.make_tensor_value_info("x", T.FLOAT, [5])],
        [h.make_tensor_value_info("y", T.FLOAT, [5])],
        [nh.from_array(x, "x")] if constant else [],
    )
    return h.make_model(graph, opset_imports=[h.make_opsetid("", 21)], ir_version=10)


def seen(one, feed):
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(one.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feed)[0].astype(int).tolist()


reference = {name: ReferenceEvaluator(model(to)).run(None, {"x": x})[0].astype(int).tolist()
             for name, to in {"int8": T.INT8, "int4": T.INT4}.items()}
int8, int4 = seen(model(T.INT8), {"x": x}), seen(model(T.INT4), {"x": x})
constant = model(T.INT4, constant=True)
unfolded = seen(constant, {})
folded = seen(onnxscript.optimizer.optimize(onnx.ModelProto.FromString(constant.SerializeToString())), {})
print("x                               ", x.tolist())
print("reference, int8 and int4        ", reference["int8"], reference["int4"])
print("ONNX Runtime, int8              ", int8)
print("ONNX Runtime, int4              ", int4)
print("constant to int4, as it is      ", unfolded)
print("constant to int4, folded before ", folded)
cut = [1, 2, 0, -1, 3]
if not (reference == {"int8": cut, "int4": cut} and int8 == cut and int4 == unfolded == [2, 3, -1, -2, 3] and folded == cut):
    sys.exit("CHANGED: Cast to int4 cuts off, or one of the others rounds")
PYTHON
