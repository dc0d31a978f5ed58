"""The rounding of activations on its own: where it stands in the graphs, and whether it gives NumPy's numbers.

What is around it is compared without it (gates.py says why).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from gemma_deploy.graph.functions import DOMAIN, PER_TOKEN
from gemma_deploy.parity.gates import Line
from gemma_deploy.parity.segments import LEVELS
from gemma_deploy.runtime.session import load_file
from gemma_deploy.runtime.strict import lower

TOKENS, CHANNELS = 64, 257


def rounding_lines(artifact: Path, manifest: Mapping[str, Any]) -> list[Line]:
    """Two gates; none for an artifact that rounds no activations.

    Raises:
        ArtifactError: a graph is missing or damaged.
    """
    rounding = (manifest.get("quantization") or {}).get("activations")
    if rounding is None:
        return []
    folders = [part["folder"] for part in manifest["parts"]] or ["."]
    layers = {part["folder"]: range(*part["layers"]) for part in manifest["parts"]}
    misplaced, different = 0, 0
    for folder in folders:
        expected = {
            f"model.layers.{layer}.{linear}"
            for layer in layers.get(folder, range(manifest["model"]["num_hidden_layers"]))
            for level in LEVELS
            for linear in level
        } - set(rounding["kept"])
        for graph in ("iter0", "iter1"):
            model = load_file(artifact / folder / f"{graph}.onnx")
            misplaced += len(expected.symmetric_difference(rounded_linears(model)))
            different += differing_values(model)
    return [
        Line("linears whose input is rounded = those listed", "others", misplaced, 0, misplaced == 0),
        Line("rounding of activations = NumPy", "values that differ", different, 0, different == 0),
    ]


def rounded_linears(model: ir.Model) -> set[str]:
    """Module paths of the linears that read a rounded value."""
    return {
        str(node.inputs[1].name).removesuffix(".weight")
        for node in model.graph
        if len(node.inputs) > 1 and node.inputs[1] is not None and _rounds(node.inputs[0])
    }


def _rounds(value: ir.Value | None) -> bool:
    node = None if value is None else value.producer()
    return node is not None and (node.domain, node.op_type) == (DOMAIN, PER_TOKEN)


def differing_values(model: ir.Model) -> int:
    """Run the graph's own function body on tokens of very different sizes, one of zeros, one of ties, and compare."""
    import onnxruntime as ort

    rng = np.random.default_rng(0)
    x = (rng.standard_normal((1, TOKENS, CHANNELS)) * np.logspace(-20, 20, TOKENS)[:, None]).astype(np.float32)
    x[0, 0], x[0, 1] = 0, np.linspace(-127, 127, CHANNELS).round() / 2
    x[0, 1, 0] = 127  # a scale of 1: halves lie between two codes
    value = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(x.shape))
    node = ir.node(PER_TOKEN, [value], domain=DOMAIN)
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    alone = ir.Graph([value], [node.outputs[0]], nodes=[node], opset_imports=dict(model.opset_imports), name="rounding")
    functions = [body.clone() for body in model.functions.values() if body.name == PER_TOKEN]
    proto = ir.to_proto(lower(ir.Model(alone, ir_version=model.ir_version, functions=functions))).SerializeToString()
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    found = ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    return int((found != rounded(x)).sum())


def rounded(x: np.ndarray) -> np.ndarray:
    """[..., channels] float32 -> codes -127 to 127 times absmax / 127 of the token."""
    scale = np.abs(x).max(-1, keepdims=True) / np.float32(127)
    scale = np.where(scale == 0, np.float32(1), scale)
    result: np.ndarray = np.rint(x / scale) * scale
    return result
