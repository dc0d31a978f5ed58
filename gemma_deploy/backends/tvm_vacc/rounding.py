"""The rounding inside an artifact's graphs on its own: where it stands, and whether it gives NumPy's numbers.

What is around it is compared without it (`gates.gates_of` says why).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from gemma_deploy.architectures import Experts, PerLayer, input_groups
from gemma_deploy.artifact.manifest import Manifest
from gemma_deploy.backends.tvm_vacc.strict import lower
from gemma_deploy.graph.functions import DEQUANTIZE_CACHE, DOMAIN, PER_TOKEN, QUANTIZE_CACHE
from gemma_deploy.graph.passes.round_activations import FIRST_MATRIX
from gemma_deploy.parity.gates import Line
from gemma_deploy.runtime.session import load_file

TOKENS, CHANNELS = 64, 257
PARTS = ("key", "value")


def rounds(manifest: Manifest) -> bool:
    """Whether activations or the cache are rounded to codes inside the graphs."""
    return manifest.int8_cache or manifest.activations is not None


def rounding_lines(artifact: Path, manifest: Manifest) -> list[Line]:
    """Two gates for rounded activations, two for an int8 cache.

    Raises:
        ArtifactError: a graph is missing or damaged.
    """
    activations, cache = manifest.activations, manifest.int8_cache
    if not rounds(manifest):
        return []
    stored = {row.name.removesuffix(".weight") for row in manifest.params}  # not every layer has all linears
    layers = {part.folder: range(*part.layers) for part in manifest.parts}
    without = {layer for layer, (heads, _) in enumerate(manifest.contract.geometry or ()) if not heads}
    misplaced = different = uncached = other_codes = 0
    for folder in manifest.folders:
        own = layers.get(folder, range(manifest.model.num_hidden_layers))
        for graph in ("iter0", "iter1"):
            model = load_file(artifact / folder / f"{graph}.onnx")
            if activations is not None:
                linears = [linear for group in input_groups() for linear in group.readers]
                linears += [*PerLayer(0).linears, Experts.gate_up]
                expected = {f"model.layers.{i}.{linear}" for i in own for linear in linears} & stored
                expected -= set(activations.kept)
                misplaced += len(expected.symmetric_difference(rounded_linears(model)))
                different += differing_values(model)
            if cache:
                caches = [(layer, part) for layer in own if layer not in without for part in PARTS]
                uncached += sum(not _is_cached(model, layer, part, graph) for layer, part in caches)
                other_codes += differing_codes(model)
    lines = []
    if activations is not None:
        lines += [
            Line("linears whose input is rounded = those listed", "others", misplaced, 0, misplaced == 0),
            Line("rounding of activations = NumPy", "values that differ", different, 0, different == 0),
        ]
    if cache:
        lines += [
            Line("caches = codes that attention reads", "others", uncached, 0, uncached == 0),
            Line("codes and scales of the cache = NumPy", "values that differ", other_codes, 0, other_codes == 0),
        ]
    return lines


def _is_cached(model: ir.Model, layer: int, part: str, graph: str) -> bool:
    """Whether a part's codes and scale are made together, and read wherever they go, past and new."""
    made = {value.name: value for node in model.graph for value in node.outputs}
    codes, scale = (made.get(f"present.{layer}.{part}{end}") for end in ("", "_scale"))
    maker = None if codes is None else codes.producer()
    if codes is None or scale is None or maker is None or scale.producer() is not maker:
        return False
    exact, pairs = maker.inputs[0], [(codes, scale)]
    if graph == "iter1":
        inputs = {value.name: value for value in model.graph.inputs}
        past = f"past_key_values.{layer}.{part}"
        pairs.append((inputs[past], inputs[f"{past}_scale"]))
    read = all(
        [(user.op_type, index) for user, index in value.uses()] == [(DEQUANTIZE_CACHE, place)]
        for pair in pairs
        for place, value in enumerate(pair)
    )
    unread = exact is not None and [user for user, _ in exact.uses()] == [maker]
    return read and unread and maker.op_type == QUANTIZE_CACHE


def rounded_linears(model: ir.Model) -> set[str]:
    """Module paths of the linears that read a rounded value."""
    return {
        str(matrix.name).removesuffix(".weight")
        for node in model.graph
        if node.inputs and _rounds(node.inputs[0])
        for matrix in node.inputs[FIRST_MATRIX.get(node.op_type, 1) :][:1]
        if matrix is not None
    }


def _rounds(value: ir.Value | None) -> bool:
    node = None if value is None else value.producer()
    return node is not None and (node.domain, node.op_type) == (DOMAIN, PER_TOKEN)


def differing_values(model: ir.Model) -> int:
    """Run the graph's own function body on tokens of very different sizes, one of zeros, one of ties, and compare."""
    x = _tokens(np.logspace(-20, 20, TOKENS))
    found = _run_body(model, PER_TOKEN, {"x": x}, ["y"])[0]
    return int((found != rounded(x)).sum())


def differing_codes(model: ir.Model) -> int:
    """The same for both bodies of an int8 cache, with factors from 0.01 to 100; codes, scales and what is read."""
    x = _tokens(np.logspace(-6, 4, TOKENS))
    factor = np.logspace(-2, 2, CHANNELS).astype(np.float32).reshape(1, 1, CHANNELS)
    codes, scale = cache_codes(x, factor)
    made = _run_body(model, QUANTIZE_CACHE, {"x": x, "factor": factor}, ["codes", "scale"])
    feeds = {"codes": codes, "scale": scale, "factor": factor}
    read = _run_body(model, DEQUANTIZE_CACHE, feeds, ["y"], {"to": ir.DataType.FLOAT.value})[0]
    expected = (codes, scale, codes.astype(np.float32) * scale.astype(np.float32) * factor)
    return sum(int((one != other).sum()) for one, other in zip((*made, read), expected, strict=True))


def _tokens(sizes: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((1, TOKENS, CHANNELS)) * sizes[:, None]).astype(np.float32)
    x[0, 0], x[0, 1] = 0, np.linspace(-127, 127, CHANNELS).round() / 2
    x[0, 1, 0] = 127  # a scale of 1: halves lie between two codes
    return x


def _run_body(
    model: ir.Model,
    name: str,
    feeds: Mapping[str, np.ndarray],
    outputs: list[str],
    attributes: Mapping[str, int] | None = None,
) -> list[np.ndarray]:
    """Compute one operator with the body that the model gives it."""
    import onnxruntime as ort

    inputs = [
        ir.Value(name=key, type=ir.TensorType(ir.DataType.from_numpy(x.dtype)), shape=ir.Shape(x.shape))
        for key, x in feeds.items()
    ]
    node = ir.node(name, inputs, dict(attributes or {}), domain=DOMAIN, num_outputs=len(outputs))
    body = next(body for body in model.functions.values() if body.name == name).clone()
    inner = ir.Model(
        ir.Graph(inputs, list(node.outputs), nodes=[node], opset_imports=dict(model.opset_imports), name=name),
        ir_version=model.ir_version,
        functions=[body],
    )
    for value, key in zip(node.outputs, outputs, strict=True):
        value.name = key
    proto = ir.to_proto(lower(inner)).SerializeToString()
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    made: list[np.ndarray] = session.run(outputs, dict(feeds))
    return made


def rounded(x: np.ndarray) -> np.ndarray:
    """[..., channels] float32 -> codes -127 to 127 times absmax / 127 of the token."""
    scale = np.abs(x).max(-1, keepdims=True) / np.float32(127)
    scale = np.where(scale == 0, np.float32(1), scale)
    result: np.ndarray = np.rint(x / scale) * scale
    return result


def cache_codes(x: np.ndarray, factor: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[..., D] float32, [Hk, 1, D] -> int8 codes [..., D], float16 scales [..., 1]."""
    even = x / factor
    scale = (np.abs(even).max(-1, keepdims=True) / np.float32(127)).astype(np.float16)
    scale = np.where(scale == 0, np.float16(1), scale)
    codes = np.clip(np.rint(even / scale.astype(np.float32)), -127, 127).astype(np.int8)
    return codes, scale
