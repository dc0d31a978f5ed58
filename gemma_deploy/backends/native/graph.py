"""model.onnx of an artifact: one operator, `gemma.deploy::GemmaDecoder`, that computes the whole model.

ONNX Runtime runs it with the library; `plan_in` reads the plan back for the library's own interface.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gemma_deploy.backends.native.library import read_plan
from gemma_deploy.names import PARAMS

if TYPE_CHECKING:
    import onnx_ir as ir

    from gemma_deploy.graph.contract import GraphContract

DOMAIN, OPERATOR, VERSION = "gemma.deploy", "GemmaDecoder", 1
MODEL = "model"
GRAPH = f"{MODEL}.onnx"
OPSET = 21
PARAMETERS = "parameters"


def build_graph(contract: GraphContract, plan: str, file_bytes: int) -> ir.Model:
    """The graph of a plan.

    Args:
        file_bytes: of the parameter file, which is one initializer as a whole.
    """
    import onnx_ir as ir

    from gemma_deploy.graph.external import onnx_type

    inputs, outputs = (
        [
            ir.Value(name=port.name, type=ir.TensorType(onnx_type(port.dtype)), shape=ir.Shape(port.shape))
            for port in ports
        ]
        for ports in (contract.inputs(MODEL), contract.outputs(MODEL))
    )
    tensor = ir.ExternalTensor(PARAMS, 0, file_bytes, ir.DataType.UINT8, shape=ir.Shape((file_bytes,)), name=PARAMETERS)
    parameters = ir.Value(
        name=PARAMETERS, type=ir.TensorType(ir.DataType.UINT8), shape=ir.Shape((file_bytes,)), const_value=tensor
    )
    caches = inputs[2:]  # however many there are, so they come last
    node = ir.node(
        OPERATOR,
        [*inputs[:2], parameters, *caches],
        {"plan": plan},
        domain=DOMAIN,
        outputs=outputs,
        name=OPERATOR,
        version=VERSION,
    )
    graph = ir.Graph(
        inputs, outputs, nodes=[node], initializers=[parameters], opset_imports={"": OPSET, DOMAIN: VERSION}, name=MODEL
    )
    return ir.Model(graph, ir_version=10)


def plan_in(folder: Path) -> str:
    """The plan of an artifact.

    Raises:
        ArtifactError: its graph is missing, or holds none.
    """
    return read_plan(folder / GRAPH)
