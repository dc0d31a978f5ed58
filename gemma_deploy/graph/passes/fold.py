"""Constant folding and dead-code removal on the traced skeleton (weights are hidden: only shape arithmetic folds)."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer, rewriter
from onnxscript.rewriter.rules.common import slice_split_rule

# Larger results (causal masks) are cheaper to compute at run time than to store in the .onnx file.
LARGEST_CONSTANT = 4096
ITERATIONS = 2  # as many as `optimizer.optimize_ir` does


class _AskedOfSlices:
    """`slice_split_rule`, which is asked about every node: about all but Slice it says no at once.

    For a pattern of two outputs the rewriter makes a table of all nodes each time, and compares each Slice there is:
    half of the time of an export.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(slice_split_rule, name)

    def try_rewrite(self, model: ir.Model, graph: ir.Graph | ir.Function, node: ir.Node, **options: Any) -> Any:
        return slice_split_rule.try_rewrite(model, graph, node, **options) if node.op_type == "Slice" else None


def _rules() -> list[Any]:
    """Those of `optimizer.optimize_ir`."""
    return [_AskedOfSlices() if rule is slice_split_rule else rule for rule in rewriter._DEFAULT_REWRITE_RULES]


def fold_constants(model: ir.Model) -> int:
    """Fold, drop no-op casts and reshapes, remove unused nodes. In place; returns the number of nodes removed."""
    before = len(model.graph)
    limits = {"input_size_limit": LARGEST_CONSTANT, "output_size_limit": LARGEST_CONSTANT}
    common.InlinePass()(model)
    for _ in range(ITERATIONS):  # the passes of `optimizer.optimize_ir`, in its order
        changed = [optimizer.fold_constants_ir(model, onnx_shape_inference=True, **limits).modified]
        for step in (
            rewriter.RewritePass(_rules()),
            common.RemoveUnusedNodesPass(),
            common.RemoveUnusedFunctionsPass(),
            common.RemoveUnusedOpsetsPass(),
        ):
            changed.append(step(model).modified)
        if not any(changed):
            break
    for step in (
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.CommonSubexpressionEliminationPass(),
        common.DeduplicateInitializersPass(),
        common.RemoveUnusedNodesPass(),
    ):
        step(model)
    return before - len(model.graph)
