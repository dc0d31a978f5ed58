"""ONNX Runtime sessions on graphs whose weights lie in params.safetensors beside them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gemma_deploy.errors import ArtifactError

if TYPE_CHECKING:
    import onnx_ir as ir
    import onnxruntime as ort

PARAMS = "params.safetensors"
VERIFY = "run `gemma-deploy verify` on the artifact, then compile it again"


def load_file(path: Path) -> ir.Model:
    """One .onnx file with its parameter file beside it.

    Raises:
        ArtifactError: the file or params.safetensors is missing, or it is no ONNX graph.
    """
    import onnx_ir as ir

    for file in (path, path.with_name(PARAMS)):
        if not file.is_file():
            raise ArtifactError("is missing", where=str(file), next_step=VERIFY)
    try:
        return ir.load(path)
    except Exception as error:  # onnx_ir and protobuf raise many kinds for a damaged file
        raise ArtifactError(f"is not an ONNX graph: {error}", where=str(path), next_step=VERIFY) from error


def open_graph(model: ir.Model, folder: Path, *, strict: bool = False, threads: int = 0) -> ort.InferenceSession:
    """A session on a graph of ONNX Runtime's back end, as it is or changed; its weights lie in `folder`.

    Args:
        strict: compute operator by operator, with weights where they lie; threads: 0 for as many as there are cores.

    Raises:
        ArtifactError: ONNX Runtime refuses it.
    """
    import onnx_ir as ir

    options = session_options(folder, threads, strict)
    if strict:
        options.enable_cpu_mem_arena = False
    return opened(ir.to_proto(model).SerializeToString(), options, folder)


def session_options(folder: Path, threads: int, strict: bool) -> ort.SessionOptions:
    """Options of a session on a graph whose weights lie in `folder`; see `open_graph`."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # what ORT refuses is raised as well
    if strict:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return options


def opened(model: str | bytes, options: ort.SessionOptions, where: Path) -> ort.InferenceSession:
    """A session on the CPU.

    Raises:
        ArtifactError: ONNX Runtime refuses the graph.
    """
    import onnxruntime as ort

    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ORT's own have no common base
        reason = str(error).splitlines()[0]
        raise ArtifactError(f"ONNX Runtime refuses it: {reason}", where=str(where), next_step=VERIFY) from error
