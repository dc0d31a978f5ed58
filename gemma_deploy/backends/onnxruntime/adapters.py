"""A LoRA adapter of PEFT as a file that ONNX Runtime and onnxruntime-genai load beside an artifact.

The file (ONNX Runtime's adapter format) holds the graph's optional inputs (lora.py) by name: lora_A [in, rank], and
lora_B [rank, out] with the scaling in it, in the dtype of the activations. What is no plain product of two factors
beside a linear cannot be told to the graph, and has to be merged into the weights instead.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gemma_deploy.artifact.adapters import RECORD_FILE, KeptAdapter, slots_of
from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.backends import keeping
from gemma_deploy.backends.keeping import Matrices, misfits, some_of
from gemma_deploy.errors import ArtifactError
from gemma_deploy.graph.contract import AdapterSlots

if TYPE_CHECKING:
    from onnxruntime import OrtValue


def keep(artifact: Artifact, directory: Path, name: str | None = None, *, force: bool = False) -> KeptAdapter:
    """Keep an adapter in an artifact as ONNX Runtime loads it; see `keeping.keep`."""
    dtype = slots_of(artifact).dtype
    return keeping.keep(
        artifact, directory, name, write=lambda file, matrices: write_file(file, matrices, dtype), force=force
    )


def write_file(file: Path, matrices: Matrices, dtype: str) -> None:
    """Write ONNX Runtime's adapter format.

    Args:
        matrices: float32, by input; dtype: in which they are stored, rounded to nearest.
    """
    import onnxruntime as ort

    # Kept until the file is written: ONNX Runtime copies no bfloat16 matrix, and does not keep the array it lies in.
    values = {name: _value(matrix, dtype) for name, matrix in sorted(matrices.items())}
    stored = ort.AdapterFormat()
    stored.set_adapter_version(1)
    stored.set_model_version(1)
    stored.set_parameters(values)
    stored.export_adapter(str(file))


def _value(matrix: np.ndarray, dtype: str) -> OrtValue:
    from onnx import TensorProto
    from onnxruntime import OrtValue

    if dtype == "float32":
        return OrtValue.ortvalue_from_numpy(matrix)
    import ml_dtypes

    halves = matrix.astype(ml_dtypes.bfloat16).view(np.uint16)
    return OrtValue.ortvalue_from_numpy_with_onnx_type(halves, TensorProto.BFLOAT16)


def values_of(kept: KeptAdapter, slots: AdapterSlots | None) -> dict[str, OrtValue]:
    """Read a kept adapter's file, by input.

    Args:
        slots: of the artifact that keeps it, which has some.

    Raises:
        ArtifactError: it has changed since it was made, or does not fit the artifact.
    """
    assert slots is not None, kept.path
    import onnxruntime as ort

    kept.check()
    try:
        values = ort.AdapterFormat.read_adapter(str(kept.file)).get_parameters()
    except Exception as error:  # ORT's own have no common base
        raise ArtifactError(
            f"ONNX Runtime refuses it: {str(error).splitlines()[0]}",
            where=str(kept.file),
            next_step=RECORD_FILE.next_step,
        ) from error
    if problems := list(_misfits(values, slots)):
        raise ArtifactError(
            "does not hold what the artifact's graph takes",
            where=str(kept.file),
            problems=some_of(problems),
            next_step=RECORD_FILE.next_step,
        )
    return values


def arrays_of(values: Mapping[str, OrtValue]) -> Matrices:
    """The same as float32 arrays of their own."""
    return {name: _array(value) for name, value in values.items()}


def _array(value: OrtValue) -> np.ndarray:
    if value.data_type() == "tensor(float)":
        return np.array(value.numpy(), np.float32)
    raw = ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes())  # NumPy has no bfloat16
    halves = np.frombuffer(raw, np.uint16).astype(np.uint32) << 16
    return halves.view(np.float32).reshape(value.shape())


def _misfits(values: Mapping[str, OrtValue], slots: AdapterSlots) -> Iterator[str]:
    """Inputs that the graph has not, or of another shape or type, and halves of pairs."""
    dtypes = {"float32": "tensor(float)", "bfloat16": "tensor(bfloat16)"}
    yield from misfits({name: tuple(value.shape()) for name, value in values.items()}, slots)
    for name, value in values.items():
        if value.data_type() != dtypes[slots.dtype]:
            yield f"{name}: {value.data_type()}, expected {dtypes[slots.dtype]}"
