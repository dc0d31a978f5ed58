"""Constant folding and dead-code removal on the traced skeleton (weights are hidden: only shape arithmetic folds)."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer

# Larger results (causal masks) are cheaper to compute at run time than to store in the .onnx file.
LARGEST_CONSTANT = 4096


def fold_constants(model: ir.Model) -> int:
    """Fold, drop no-op casts and reshapes, remove unused nodes. In place; returns the number of nodes removed."""
    before = len(model.graph)
    optimizer.optimize_ir(
        model, input_size_limit=LARGEST_CONSTANT, output_size_limit=LARGEST_CONSTANT, onnx_shape_inference=True
    )
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.DeduplicateInitializersPass()(model)
    common.RemoveUnusedNodesPass()(model)
    return before - len(model.graph)
