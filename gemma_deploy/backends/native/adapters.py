"""LoRA adapters of PEFT beside an artifact of `backend.type: native`: kept as safetensors, packed for the library.

A text is computed with one or with none, whatever texts are computed beside it (src/adapter.h).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from gemma_deploy import reading
from gemma_deploy.artifact.adapters import RECORD_FILE, KeptAdapter, open_kept, slots_of
from gemma_deploy.artifact.manifest import Manifest
from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.backends import keeping
from gemma_deploy.backends.keeping import Matrices, adapter_slots, misfits, some_of
from gemma_deploy.checkpoint.config import ModelConfig
from gemma_deploy.errors import ArtifactError
from gemma_deploy.graph.contract import AdapterSlots
from gemma_deploy.params.panels import COLUMNS, ROWS
from gemma_deploy.reading import open_regular

# As the library names the linears that may have an adapter beside them: keys of a layer's line in the plan.
LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
FORMS = ("float32", "bfloat16")


def slots_for(config: ModelConfig, rank: int, dtype: str) -> AdapterSlots:
    """What artifacts take of an adapter: matrices of the linears of attention and MLP, up to a rank.

    Args:
        dtype: one of `FORMS`, in which the library has them.
    """
    slots = adapter_slots(config, rank, dtype)
    other = set()
    for layer in config.layers:
        beside = [] if layer.per_layer is None else [*layer.per_layer.linears]
        beside += [] if layer.laurel is None else [layer.laurel.left, layer.laurel.right]
        other |= {f"{layer.prefix}{name}" for name in beside}
    return replace(slots, linears={name: sizes for name, sizes in slots.linears.items() if name not in other})


def keep(artifact: Artifact, directory: Path, name: str | None = None, *, force: bool = False) -> KeptAdapter:
    """Keep an adapter in an artifact; see `keeping.keep`."""
    dtype = slots_of(artifact).dtype
    return keeping.keep(
        artifact, directory, name, write=lambda file, matrices: write_file(file, matrices, dtype), force=force
    )


def write_file(file: Path, matrices: Matrices, dtype: str) -> None:
    """Write matrices by the names of `AdapterSlots`, as float32, rounded to `dtype` before."""
    from safetensors.numpy import save_file

    save_file({name: _rounded(one, dtype) for name, one in sorted(matrices.items())}, file)


def _rounded(matrix: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        import ml_dtypes

        matrix = matrix.astype(ml_dtypes.bfloat16)
    return np.ascontiguousarray(matrix, np.float32)


def read_kept(kept: KeptAdapter, slots: AdapterSlots | None) -> Matrices:
    """The matrices of a kept adapter.

    Args:
        slots: of the artifact that keeps it, which has some.

    Raises:
        ArtifactError: its file has changed since it was made, or does not fit the artifact.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    assert slots is not None, kept.path
    kept.check()
    try:
        with open_regular(kept.file) as opened:
            matrices: Matrices = load(opened.read(kept.record.file.bytes))
    except (SafetensorError, OSError) as error:
        raise ArtifactError(str(error), where=str(kept.file), next_step=RECORD_FILE.next_step) from error
    problems = [f"{name}: {one.dtype}, expected float32" for name, one in matrices.items() if one.dtype != np.float32]
    problems += misfits({name: one.shape for name, one in matrices.items()}, slots)
    if problems:
        raise ArtifactError(
            "does not hold what the artifact takes",
            where=str(kept.file),
            problems=some_of(problems),
            next_step=RECORD_FILE.next_step,
        )
    return matrices


def matrices_of(artifact: Artifact, adapter: str | Path) -> Matrices:
    """The matrices of a kept adapter, or of a directory that peft wrote, which is not kept.

    Raises:
        UsageError, ArtifactError, CheckpointError, NotBuiltError: see `Engine.load_adapter`.
    """
    slots = slots_of(artifact)
    if reading.is_dir(adapter):
        return keeping.converted(artifact, Path(adapter))[0]
    return read_kept(open_kept(artifact, str(adapter)), slots)


def form_of(manifest: Manifest) -> str:
    """One of `FORMS`: to what the kernels of an artifact round adapters.

    Beside weights of codes, to bfloat16: several adapters in a step are read from memory like weights, and half as much
    of it shows, while what is lost is far less than what codes lose.
    """
    slots = manifest.contract.adapters
    return FORMS[1] if slots is None or manifest.whole_scheme.codes else slots.dtype


def packed(matrices: Mapping[str, np.ndarray], plan: str, form: str = FORMS[0]) -> tuple[str, np.ndarray]:
    """An adapter as the library takes it.

    Args:
        matrices: lora_A [in, rank] and lora_B [rank, out] of modules, float32.
        plan: of the model, which says where they belong.
        form: one of `FORMS`, to which they are rounded.

    Returns:
        A line for each linear, and the bytes of all panels that these lines point into.
    """
    lines, pieces, at = [], [], 0
    places = _places(plan)
    pack = _PACKED[form]
    for name in sorted(one.removesuffix(".lora_A") for one in matrices if one.endswith(".lora_A")):
        down, up = matrices[f"{name}.lora_A"], matrices[f"{name}.lora_B"]
        rank = -(-down.shape[1] // ROWS) * ROWS
        layer, linear = places[name]
        found = []
        for rows, columns in ((down.T, COLUMNS), (up.T, ROWS)):
            padding = tuple((0, -size % of) for size, of in zip(rows.shape, (ROWS, columns), strict=True))
            found.append(pack(np.pad(rows, padding)))
        ends = [at, at + found[0].size]
        lines.append(f"adapts layer={layer} linear={linear} form={form} rank={rank} down={ends[0]} up={ends[1]}")
        pieces += found
        at = ends[1] + found[1].size
    return "\n".join(lines), np.concatenate(pieces) if pieces else np.empty(0, np.uint8)


def _floats(rows: np.ndarray) -> np.ndarray:
    """[columns][16 rows] of each panel, as bytes."""
    panels = rows.reshape(-1, ROWS, rows.shape[1]).swapaxes(1, 2)
    return np.ascontiguousarray(panels, np.float32).reshape(-1).view(np.uint8)


def _halves(rows: np.ndarray) -> np.ndarray:
    """[columns / 2][16 rows][2 columns] of each panel in bfloat16, as bytes."""
    import ml_dtypes

    halves = rows.astype(ml_dtypes.bfloat16).view(np.uint16)
    panels = halves.reshape(-1, ROWS, rows.shape[1] // 2, 2).swapaxes(1, 2)
    return np.ascontiguousarray(panels).reshape(-1).view(np.uint8)


_PACKED: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {"float32": _floats, "bfloat16": _halves}


def _places(plan: str) -> dict[str, tuple[int, str]]:
    """Module -> its layer, and what the library calls it there."""
    found: dict[str, tuple[int, str]] = {}
    layer = 0
    for line in plan.splitlines():
        word, *pairs = line.split()
        if word != "layer":
            continue
        named = dict(pair.split("=", 1) for pair in pairs)
        found |= {named[one].removesuffix(".weight"): (layer, one) for one in LINEARS if one in named}
        layer += 1
    return found
