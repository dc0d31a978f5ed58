"""Point a graph's initializers into params.safetensors (ONNX external data) and write the .onnx file.

Last step of the export: ir.Model without weights + parameter table -> a file of some hundred kilobytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

import onnx
import onnx_ir as ir

from gemma_deploy.dtypes import BY_NAME
from gemma_deploy.errors import ExportError
from gemma_deploy.writing import whole_file

ONNX = ".onnx"


def onnx_type(dtype: str) -> ir.DataType:
    """The type of a dtype in a graph, by its name here."""
    return ir.DataType(BY_NAME[dtype].onnx)


class Row(Protocol):
    """What is read of a parameter table's row."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def dtype(self) -> str: ...  # noqa: D102
    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def offset(self) -> int: ...  # noqa: D102
    @property
    def nbytes(self) -> int: ...  # noqa: D102


def weightless(model: ir.Model) -> dict[str, ir.Value]:
    """The initializers that wait for their data."""
    return {name: value for name, value in model.graph.initializers.items() if value.const_value is None}


def attach_external(models: Mapping[str, ir.Model], rows: Iterable[Row], location: str) -> None:
    """Point every waiting initializer of every graph at its row. In place.

    Args:
        location: the parameter file's name, relative to the .onnx file.

    Raises:
        ExportError: an initializer without a row, a row no graph reads, or another dtype or shape; all at once.
    """
    table = {row.name: row for row in rows}
    problems, used = [], set()
    for graph, model in models.items():
        for name, value in weightless(model).items():
            row = table.get(name)
            if row is None:
                problems.append(f"{graph}: initializer {name} is not in {location}")
                continue
            used.add(name)
            shape = tuple(value.shape.numpy()) if value.shape is not None else ()
            if row.dtype == "int4" and value.dtype == ir.DataType.INT8:  # torch has no such type: traced as int8
                value.type = ir.TensorType(ir.DataType.INT4)
            if onnx_type(row.dtype) != value.dtype or tuple(row.shape) != shape:
                here, there = f"{value.dtype} {list(shape)}", f"{row.dtype} {list(row.shape)}"
                problems.append(f"{graph}: {name} is {here} in the graph, {there} in the file")
                continue
            value.const_value = ir.ExternalTensor(
                location, row.offset, row.nbytes, onnx_type(row.dtype), shape=ir.Shape(shape), name=name
            )
    problems += [f"{name} is in {location} but no graph reads it" for name in table if name not in used]
    if problems:
        raise ExportError("graphs and parameter file disagree", problems=problems, next_step="this is a bug: report it")


def serialized(model: ir.Model) -> bytes:
    """The .onnx file's bytes, the same for the same graph."""
    return ir.to_proto(model).SerializeToString(deterministic=True)


def write_graph(graph: bytes, path: Path) -> None:
    """Write a graph's file under a temporary name, check it in full where it is an .onnx file, rename it.

    The parameter file must lie beside it already: the checker looks for it.

    Raises:
        ExportError: the ONNX checker refused the graph.
    """
    with whole_file(path) as partial:
        partial.write_bytes(graph)
        if path.suffix != ONNX:
            return
        try:
            onnx.checker.check_model(str(partial), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise ExportError(
                f"the ONNX checker refused the graph: {error}", where=path.name, next_step="this is a bug: report it"
            ) from error
