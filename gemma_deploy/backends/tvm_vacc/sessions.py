"""ONNX Runtime sessions on the static pair: `strict` computes what the graph says, `fast` what ORT makes of it.

Measured with ORT 1.32 (tests/runtime/test_session.py shows each):
- From the extended level on, ORT rewrites the int8 function body into MatMulNBits with int8 *activations* (relative
  error 5e-3 instead of 2e-7). Strict sessions run at ORT_DISABLE_ALL, where DequantizeLinear and MatMul stay. Fast
  sessions open a graph with that rewriting done: see fast.py.
- The CPU has no float16 arithmetic. ORT casts each operator's inputs to float32 and then drops the casts between two
  such operators, at every level, so that intermediate results are never rounded to float16. Strict sessions open a
  graph with the rounding written out: see strict.py.
- External data is memory-mapped; `session.disable_prepacking` keeps strict sessions from copying weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import onnx_ir as ir

from gemma_deploy.backends.tvm_vacc import fast, strict
from gemma_deploy.backends.tvm_vacc.contract import PartFolders
from gemma_deploy.backends.tvm_vacc.join import join
from gemma_deploy.errors import ArtifactError
from gemma_deploy.runtime.session import VERIFY, as_compiled, load_file, opened, session_options

if TYPE_CHECKING:
    import numpy as np
    import onnxruntime as ort

Mode = Literal["strict", "fast"]


def open_session(
    path: Path,
    mode: Mode = "fast",
    threads: int = 0,
    *,
    outputs: Sequence[str] = (),
    arrays: dict[str, np.ndarray] | None = None,
    dump: Path | None = None,
    stages: PartFolders = (),
    whole: bool = True,
) -> ort.InferenceSession:
    """Open a graph on the CPU.

    Args:
        path: an .onnx file of an artifact, params.safetensors beside it.
        mode: see above.
        threads: of one operator; 0 for as many as there are cores.
        outputs: inner values to return after the graph's own outputs.
        arrays: weights in the fast kernel's form, shared by the sessions of one artifact: filled and read.
        dump: where ORT writes the graph that it will really run.
        stages, whole: of a divided artifact: see `load_graph`.

    Raises:
        ArtifactError: a file is missing, a value unknown, or ONNX Runtime refuses the graph.
    """
    import onnxruntime as ort

    options = session_options(path.parent, threads, mode == "strict")
    if dump is not None:
        options.optimized_model_filepath = str(dump)
    arrays = arrays if arrays is not None else {}
    model, names = changed_graph(path, mode, outputs, arrays=arrays, stages=stages, whole=whole)
    given = [ort.OrtValue.ortvalue_from_numpy(arrays[name]) for name in names]
    if given:
        options.add_external_initializers(names, given)
    session = opened(model, options, path)
    session.given = given  # ORT reads them where they lie, on processors for which it does not pack weights
    return session


def load_graph(path: Path, stages: PartFolders = (), *, whole: bool = True) -> ir.Model:
    """A graph of an artifact, its parameters where they lie.

    Args:
        path: the .onnx file; of a divided artifact where an undivided one would have it.
        stages: folders of the parts whose graphs are joined; whole: these are all of them, else one stage.

    Raises:
        ArtifactError: a file is missing, or it is no ONNX graph.
    """
    if not stages:
        return load_file(path)
    with as_compiled(path):
        return join(path.parent, path.stem, stages, whole=whole)


def changed_graph(
    path: Path,
    mode: Mode,
    outputs: Sequence[str],
    *,
    arrays: dict[str, np.ndarray],
    stages: PartFolders = (),
    whole: bool = True,
) -> tuple[bytes, list[str]]:
    """The graph as it is handed to ORT, lowered and with inner values among its outputs; it holds no weights.

    Returns:
        The graph, and which of `arrays` the session must be given; all others lie in params.safetensors.

    Raises:
        ArtifactError: the file is no ONNX graph, or makes no such value.
    """
    model = load_graph(path, stages, whole=whole)
    names: list[str] = []
    with as_compiled(path):
        if mode == "strict":
            model = strict.lower(model)
        else:
            names = fast.to_matmulnbits(model, arrays)
        _expose(model, outputs, path)
        return ir.to_proto(model).SerializeToString(), names


def _expose(model: ir.Model, outputs: Sequence[str], path: Path) -> None:
    """Make inner values graph outputs, in the order asked for. In place."""
    made = {value.name: value for node in model.graph for value in node.outputs}
    missing = [name for name in outputs if name not in made]
    if missing:
        raise ArtifactError("the graph makes no such value", where=str(path), problems=missing, next_step=VERIFY)
    own = {value.name for value in model.graph.outputs}
    model.graph.outputs.extend(made[name] for name in dict.fromkeys(outputs) if name not in own)
