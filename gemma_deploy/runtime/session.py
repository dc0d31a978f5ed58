"""ONNX Runtime sessions on an artifact's graphs: `strict` computes what the graph says, `fast` what ORT makes of it.

Measured with ORT 1.32 (tests/runtime/test_session.py shows each):
- From the extended level on, ORT rewrites the int8 function body into MatMulNBits with int8 *activations* (relative
  error 5e-3 instead of 2e-7). Strict sessions run at ORT_DISABLE_ALL, where DequantizeLinear, Transpose and MatMul stay.
- The CPU has no float16 arithmetic. ORT casts each operator's inputs to float32 and then drops the casts between two
  such operators, at every level, so that intermediate results are never rounded to float16. A strict session of a
  float16 graph gets an Identity after every operator with a float16 result: Identity has a float16 kernel, so the
  rounding happens.
- External data is memory-mapped; `session.disable_prepacking` keeps weights from being copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from gemma_deploy.errors import ArtifactError

Mode = Literal["strict", "fast"]


def open_session(path: Path, mode: Mode = "fast", *, threads: int = 0, outputs: Sequence[str] = ()) -> Any:
    """An `onnxruntime.InferenceSession` on the CPU.

    Args:
        path: an .onnx file of an artifact, params.safetensors beside it.
        threads: 0 takes all cores.
        outputs: names of intermediate values to return as well.

    Raises:
        ArtifactError: a file is missing, a value unknown, or ONNX Runtime refuses the graph.
    """
    import onnxruntime as ort

    if not path.is_file():
        raise ArtifactError("is missing", where=str(path), next_step="run `gemma-deploy verify`, then compile again")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if mode == "strict":
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        model: str | bytes = str(path)
        if outputs or mode == "strict":
            changed = changed_graph(path, mode, outputs)
            if changed is not None:
                model = changed
                folder = str(path.parent.resolve())
                options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except (RuntimeError, ValueError, ort.capi.onnxruntime_pybind11_state.Fail) as error:
        raise ArtifactError(
            f"ONNX Runtime refuses the graph: {str(error).splitlines()[0]}",
            where=str(path),
            next_step="run `gemma-deploy verify` on the artifact",
        ) from error


def changed_graph(path: Path, mode: Mode, outputs: Sequence[str]) -> bytes | None:
    """The graph with more outputs and, strict and float16, with explicit rounding; None when nothing changes."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    half = onnx.TensorProto.FLOAT16
    types = {value.name: value for value in (*model.graph.value_info, *model.graph.output)}
    rounded = _round_results(model, types, half) if mode == "strict" else 0
    present = {value.name for value in model.graph.output}
    missing = [name for name in outputs if name not in types]
    if missing:
        raise ArtifactError(f"no such value in the graph: {', '.join(missing)}", where=str(path))
    wanted = [name for name in dict.fromkeys(outputs) if name not in present]
    model.graph.output.extend(types[name] for name in wanted)
    return model.SerializeToString() if rounded or wanted else None


def _round_results(model: Any, types: dict[str, Any], half: int) -> int:
    """Put an Identity behind every node with a float16 result. In place; returns how many."""
    from onnx import helper

    nodes, count = [], 0
    for node in model.graph.node:
        nodes.append(node)
        for i, name in enumerate(node.output):
            known = types.get(name)
            if known is None or known.type.tensor_type.elem_type != half or node.op_type in ("Identity", "Cast"):
                continue
            node.output[i] = f"{name}.unrounded"
            nodes.append(helper.make_node("Identity", [node.output[i]], [name], name=f"{name}.round"))
            count += 1
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return count
