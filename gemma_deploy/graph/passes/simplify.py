"""onnxsim on the weightless skeleton, for what folding leaves: nothing, in the exports there are (onnxsim 0.8.1).

Of 426 to 1615 traced nodes, folding leaves 171 to 623, of which onnxsim removes none. Run first it removes 199 to 939
and folding the rest, down to the same operators; but it drops the metadata of nodes, from which name_outputs.py tells
what each module returns, and renames what it merges. So it runs last.
"""

from __future__ import annotations

import onnx_ir as ir
import onnxsim

from gemma_deploy.errors import ExportError


def simplify(model: ir.Model, functions: list[ir.Function]) -> tuple[ir.Model, int]:
    """A simplified copy and the number of nodes that went. Names of surviving values are kept.

    Args:
        functions: bodies of the custom operators, so that the checker inside knows them.

    Raises:
        ExportError: onnxsim refused the graph.
    """
    before = len(model.graph)
    for function in functions:
        model.functions[function.identifier()] = function
    for domain in {node.domain for node in model.graph if node.domain}:
        model.opset_imports[domain] = 1
    proto = ir.to_proto(model)
    try:
        # Numerics are checked by parity, on real text, later; here there are no weights to run with. Folding is done
        # (fold.py) and stays off: it would store the causal masks, P x P each, in the .onnx file.
        simple, _ = onnxsim.simplify(proto, check_n=0, skip_constant_folding=True, skip_fuse_bn=True)
    except (RuntimeError, ValueError) as error:
        raise ExportError(
            f"onnxsim: {error}", where="export stage", next_step="check the version of onnxsim against constraints.txt"
        ) from error
    result = ir.from_proto(simple)
    return result, before - len(result.graph)
