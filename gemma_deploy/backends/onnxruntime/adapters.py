"""A LoRA adapter of PEFT as a file that ONNX Runtime and onnxruntime-genai load beside an artifact.

The file (ONNX Runtime's adapter format) holds the graph's optional inputs (lora.py) by name: lora_A [in, rank], and
lora_B [rank, out] with the scaling in it, in the dtype of the activations. What is no plain product of two factors
beside a linear cannot be told to the graph, and has to be merged into the weights instead.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gemma_deploy import reading
from gemma_deploy.artifact.adapters import (
    FILE,
    FORMAT_VERSION,
    NAME,
    RECORD,
    RECORD_FILE,
    KeptAdapter,
    KeptRecord,
    folder_of,
    open_kept,
    slots_of,
)
from gemma_deploy.artifact.factors import linear_factors
from gemma_deploy.artifact.manifest import FileFacts
from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.artifact.weights import ArtifactWeights, config_of
from gemma_deploy.checkpoint.adapters import Adapter, LowRank, Replaced, TokenRows, Update
from gemma_deploy.errors import ArtifactError, NotBuiltError, UsageError
from gemma_deploy.graph.contract import AdapterSlots
from gemma_deploy.workdir import Maker, WorkDir
from gemma_deploy.writing import write_json

if TYPE_CHECKING:
    from onnxruntime import OrtValue

log = logging.getLogger(__name__)
MAKER = Maker("adapter", ArtifactError, "allow writing to the artifact, or work on a copy of it")
MERGE = "merge it into the weights instead: gemma-deploy compile RECIPE -s frontend.adapter={}"
MOST_NAMED = 3  # modules that a sentence names
Matrices = dict[str, np.ndarray]


def keep(artifact: Artifact, directory: Path, name: str | None = None, *, force: bool = False) -> KeptAdapter:
    """Convert an adapter and keep it in an artifact, whole or not at all; what is there and the same is left alone.

    Args:
        directory: that peft's save_pretrained wrote.
        name: of the kept adapter; by default that of the directory and the beginning of its fingerprint.
        force: replace another adapter of that name.

    Raises:
        CheckpointError: the directory is damaged, or of another model.
        NotBuiltError: it is no LoRA of linears alone, which can only be merged.
        UsageError: the artifact takes no adapters, or none of that rank; another adapter has that name.
        ArtifactError: the artifact cannot be written to.
    """
    slots = slots_of(artifact)
    adapter = Adapter.open(directory, config_of(artifact), names=(artifact.manifest.checkpoint.path,))
    for note in adapter.notes:
        log.warning("%s", note)
    matrices, fingerprint = folded(inputs_of(adapter, slots), artifact), adapter.fingerprint()
    name = name or f"{_plain(directory)}-{fingerprint[:8]}"
    with _AdapterDir(folder_of(artifact, name), artifact, fingerprint, force=force) as work:
        if not work.finished:
            write_file(work.path / FILE, matrices, slots.dtype)
            raw = (work.path / FILE).read_bytes()
            record = KeptRecord(
                format_version=FORMAT_VERSION,
                artifact=artifact.manifest.key,
                source=directory.resolve().name,
                fingerprint=fingerprint,
                rank=max(matrix.shape[1] for key, matrix in matrices.items() if key.endswith(".lora_A")),
                linears=len(matrices) // 2,
                file=FileFacts(bytes=len(raw), sha256=hashlib.sha256(raw).hexdigest()),
            )
            write_json(work.path / RECORD, record.model_dump(mode="json"))
            work.publish()
    return open_kept(artifact, name)


class _AdapterDir(WorkDir):
    """ADAPTERS/NAME while it is written."""

    def __init__(self, out: Path, artifact: Artifact, fingerprint: str, *, force: bool) -> None:
        super().__init__(out, MAKER)
        self.artifact, self.fingerprint, self.force = artifact, fingerprint, force

    def check(self) -> None:
        """See `WorkDir`: the same adapter, whole, is left alone."""
        if not reading.exists(self.out):
            return
        try:
            found = open_kept(self.artifact, self.out.name)
        except ArtifactError:
            if self.force:
                return
            raise
        if found.record.fingerprint == self.fingerprint and not found.problem():
            self.finished = True
        elif not self.force and found.record.fingerprint != self.fingerprint:
            raise UsageError(
                f"the artifact has another adapter of that name, made from {found.record.source}",
                where=str(self.out),
                next_step="give another --name, or --force to replace it",
            )


def _plain(directory: Path) -> str:
    """The name of a directory, of letters that a name may have."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", directory.resolve().name).strip("-.")[:80]
    return plain if NAME.fullmatch(plain) else "adapter"


def inputs_of(adapter: Adapter, slots: AdapterSlots) -> Matrices:
    """The graph's inputs for an adapter, float32.

    Raises:
        NotBuiltError: it is no LoRA of linears alone. UsageError: its ranks are larger than what the artifact takes.
    """
    refuse_what_is_merged_only(adapter, slots)
    too_large = [
        f"{name.removesuffix('.weight')}: rank {update.r}"
        for name, update in adapter.updates.items()
        if isinstance(update, LowRank) and update.r > slots.rank
    ]
    if too_large:
        raise UsageError(
            f"the artifact takes adapters of rank {slots.rank} at most",
            where=str(adapter.path),
            problems=_some(too_large),
            next_step="compile it with a larger adapters.rank, or " + MERGE.format(adapter.path),
        )
    found: Matrices = {}
    for name, update in adapter.updates.items():
        assert isinstance(update, LowRank), name
        down, up = slots.inputs(name.removesuffix(".weight"))
        found[down.name] = np.ascontiguousarray(update.a().T)
        found[up.name] = np.ascontiguousarray(update.b().T) * np.float32(update.scaling)
    return found


def folded(matrices: Matrices, artifact: Artifact) -> Matrices:
    """The same for weights whose columns were multiplied by factors (calibrated schemes).

    What a linear reads was divided by them, so that the columns of A are multiplied likewise; where rows of another
    linear make what is read, those were divided, and so are the columns of its B.
    """
    weights = ArtifactWeights(config_of(artifact), artifact.path, artifact.manifest)
    factors, found = linear_factors(weights), dict(matrices)
    for module, columns in factors.columns.items():
        if (name := f"{module}.lora_A") in found:
            found[name] = found[name] * columns[:, None]
    for module, rows in factors.rows.items():
        if (name := f"{module}.lora_B") in found:
            found[name] = found[name] / rows
    return found


def refuse_what_is_merged_only(adapter: Adapter, slots: AdapterSlots) -> None:
    """Refuse an adapter that does more than add a product of two factors to linears.

    Raises:
        NotBuiltError: with a sentence for each kind of update.
    """
    problems = [f"a token table of its own: {', '.join(adapter.bases)}"] if adapter.bases else []
    for sentence, is_so in _MERGED_ONLY.items():
        found = [name.removesuffix(".weight") for name, update in adapter.updates.items() if is_so(name, update, slots)]
        if found:
            problems.append(f"{sentence}: {', '.join(_some(found))}")
    if problems:
        raise NotBuiltError(
            "this adapter cannot be loaded beside an artifact, which takes plain LoRA of its linears alone",
            where=str(adapter.path),
            problems=problems,
            next_step=MERGE.format(adapter.path),
        )


_MERGED_ONLY: Mapping[str, Callable[[str, Update, AdapterSlots], bool]] = {
    "trained as a whole (modules_to_save)": lambda name, update, slots: isinstance(update, Replaced),
    "rows are trained (trainable_token_indices)": lambda name, update, slots: isinstance(update, TokenRows),
    "a magnitude for each row (DoRA)": lambda name, update, slots: (
        isinstance(update, LowRank) and update.magnitude is not None
    ),
    "LoRA of a module that is no linear of a layer": lambda name, update, slots: (
        isinstance(update, LowRank) and update.magnitude is None and name.removesuffix(".weight") not in slots.linears
    ),
}


def _some(found: list[str]) -> list[str]:
    """The first of them, and how many there are."""
    more = len(found) - MOST_NAMED
    return found if more <= 0 else [*found[:MOST_NAMED], f"and {more} more"]


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


def adapter_named(name: str, loaded: Mapping[str, KeptAdapter], where: Path) -> KeptAdapter:
    """One of the adapters that an engine has loaded.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in loaded:
        raise UsageError(
            f"no adapter {name[:100]!r} is loaded",
            where=str(where),
            expected=", ".join(loaded) or "one that is loaded first",
            next_step="name one of them, or load it",
        )
    return loaded[name]


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
            problems=_some(problems),
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
    for name, value in values.items():
        module, _, part = name.rpartition(".")
        if module not in slots.linears or part not in ("lora_A", "lora_B"):
            yield f"{name[:100]}: there is no such input"
            continue
        entering, leaving = slots.linears[module]
        shape = tuple(value.shape())
        first, second = (f"{module}.{which}" for which in ("lora_A", "lora_B"))
        if first not in values or second not in values:
            yield f"{name}: the other half of the pair is missing"
        elif value.data_type() != dtypes[slots.dtype]:
            yield f"{name}: {value.data_type()}, expected {dtypes[slots.dtype]}"
        elif len(shape) != 2 or shape[0 if part == "lora_A" else 1] != (entering if part == "lora_A" else leaving):
            yield f"{name}: shape {list(shape)} beside a linear of {entering} channels to {leaving}"
        elif list(values[first].shape())[-1:] != list(values[second].shape())[:1]:
            yield f"{name}: the ranks of the pair differ"
        elif shape[1 if part == "lora_A" else 0] > slots.rank:
            yield f"{name}: a rank above {slots.rank}"
