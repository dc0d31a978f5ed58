"""ONNX Runtime sessions on graphs whose weights lie in params.safetensors beside them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_deploy.errors import ArtifactError, DeployError
from gemma_deploy.names import PARAMS

if TYPE_CHECKING:
    import onnx_ir as ir
    import onnxruntime as ort

log = logging.getLogger(__name__)
LARGEST_GRAPH_BYTES = 256 << 20  # of Gemma 2 27B: 1.5 MB
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
    size = path.stat().st_size
    if size > LARGEST_GRAPH_BYTES:
        raise ArtifactError(f"has {size} bytes, which no graph without weights has", where=str(path), next_step=VERIFY)
    try:
        model = ir.load(path)
    except Exception as error:  # onnx_ir and protobuf raise many kinds for a damaged file
        raise ArtifactError(f"is not an ONNX graph: {error}", where=str(path), next_step=VERIFY) from error
    _refuse_weights_elsewhere(model, path)
    return model


def _refuse_weights_elsewhere(model: ir.Model, path: Path) -> None:
    """See that all weights lie in the parameter file, before anything reads one.

    Raises:
        ArtifactError: naming those that do not.
    """
    import onnx_ir as ir

    size = path.with_name(PARAMS).stat().st_size
    problems = []
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        start, length = tensor.offset or 0, tensor.length if tensor.length is not None else size
        if tensor.location != PARAMS:
            problems.append(f"{name[:80]}: {str(tensor.location)[:80]!r}")
        elif tensor.dtype == ir.DataType.STRING:  # which has no size
            problems.append(f"{name[:80]}: text, not numbers")
        elif not 0 <= start <= start + length <= size or length < tensor.nbytes:
            problems.append(f"{name[:80]}: bytes {start} to {start + length} of {size}")
    if problems:
        raise ArtifactError(
            f"{len(problems)} weight(s) do not lie in the parameter file",
            where=str(path),
            problems=problems[:20],
            expected=f"every one inside {PARAMS} beside the graph",
            next_step=VERIFY,
        )


@contextmanager
def as_compiled(path: Path) -> Iterator[None]:
    """Say that a graph is none that `compile` makes, where changing it fails: it can be opened and is another model's.

    Raises:
        ArtifactError: whatever goes wrong but what is explained already, or is the machine's.
    """
    try:
        yield
    except (DeployError, OSError, MemoryError):
        raise
    except Exception as error:
        log.debug("where it happened", exc_info=True)
        raise ArtifactError(
            f"is not a graph that this version makes ({type(error).__name__}: {str(error)[:200]})",
            where=str(path),
            next_step=f"{VERIFY}; -v shows where it happened",
        ) from error


def open_graph(
    model: ir.Model, folder: Path, *, strict: bool = False, threads: int = 0, lean: bool = False
) -> ort.InferenceSession:
    """A session on a graph of ONNX Runtime's back end, as it is or changed; its weights lie in `folder`.

    Args:
        strict: compute operator by operator, with weights where they lie; threads: 0 for as many as there are cores.
        lean: plan no memory of a run beforehand: where every run has another length, plans are kept of all of them.

    Raises:
        ArtifactError: ONNX Runtime refuses it.
    """
    import onnx_ir as ir

    options = session_options(folder, threads, strict)
    options.enable_mem_pattern = not lean
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
