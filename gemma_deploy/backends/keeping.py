"""LoRA adapters of PEFT beside an artifact: converted to what its runtime loads, and kept in it.

The file of a runtime holds two matrices for each linear that an adapter changes, by the names of `AdapterSlots`: lora_A
[in, rank], and lora_B [rank, out] with the scaling in it. What is no plain product of two factors beside a linear has
to be merged into the weights instead.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from gemma_deploy import reading
from gemma_deploy.artifact.adapters import (
    FORMAT_VERSION,
    NAME,
    RECORD,
    KeptAdapter,
    KeptRecord,
    file_of,
    folder_of,
    open_kept,
    slots_of,
)
from gemma_deploy.artifact.factors import linear_factors
from gemma_deploy.artifact.manifest import FileFacts
from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.artifact.weights import ArtifactWeights, config_of
from gemma_deploy.checkpoint import ModelConfig
from gemma_deploy.checkpoint.adapters import Adapter, LowRank, Replaced, TokenRows, Update
from gemma_deploy.errors import ArtifactError, NotBuiltError, UsageError
from gemma_deploy.graph.contract import AdapterSlots
from gemma_deploy.workdir import Maker, WorkDir
from gemma_deploy.writing import write_json

log = logging.getLogger(__name__)
MAKER = Maker("adapter", ArtifactError, "allow writing to the artifact, or work on a copy of it")
MERGE = "merge it into the weights instead: gemma-deploy compile RECIPE -s frontend.adapter={}"
MOST_NAMED = 3  # modules that a sentence names
Matrices = dict[str, np.ndarray]


def adapter_slots(config: ModelConfig, rank: int, dtype: str) -> AdapterSlots:
    """What an artifact with adapters takes: matrices of every linear of every layer, up to a rank."""
    linears = {
        f"{layer.prefix}{linear.name}": (linear.in_features, linear.out_features)
        for layer in config.layers
        for linear in layer.linears
    }
    return AdapterSlots(rank, dtype, linears)


def keep(
    artifact: Artifact,
    directory: Path,
    name: str | None = None,
    *,
    write: Callable[[Path, Matrices], None],
    force: bool,
) -> KeptAdapter:
    """Convert an adapter and keep it in an artifact, whole or not at all; what is there and the same is left alone.

    Args:
        directory: that peft's save_pretrained wrote.
        write: matrices to the file that the artifact's runtime loads.
        name: of the kept adapter; by default that of the directory and the beginning of its fingerprint.
        force: replace another adapter of that name.

    Raises:
        CheckpointError: the directory is damaged, or of another model.
        NotBuiltError: it is no LoRA of linears alone, which can only be merged.
        UsageError: the artifact takes no adapters, or none of that rank; another adapter has that name.
        ArtifactError: the artifact cannot be written to.
    """
    matrices, fingerprint = converted(artifact, directory)
    name = name or f"{_plain(directory)}-{fingerprint[:8]}"
    with _AdapterDir(folder_of(artifact, name), artifact, fingerprint, force=force) as work:
        if not work.finished:
            file = file_of(artifact)
            write(work.path / file, matrices)
            raw = (work.path / file).read_bytes()
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


def converted(artifact: Artifact, directory: Path) -> tuple[Matrices, str]:
    """An adapter as what an artifact takes, and the fingerprint of what its directory holds.

    Raises:
        CheckpointError, NotBuiltError, UsageError: see `keep`.
    """
    slots = slots_of(artifact)
    adapter = Adapter.open(directory, config_of(artifact), names=(artifact.manifest.checkpoint.path,))
    for note in adapter.notes:
        log.warning("%s", note)
    return folded(inputs_of(adapter, slots), artifact), adapter.fingerprint()


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
            problems=some_of(too_large),
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
            problems.append(f"{sentence}: {', '.join(some_of(found))}")
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


def some_of(found: list[str]) -> list[str]:
    """The first of them, and how many there are."""
    more = len(found) - MOST_NAMED
    return found if more <= 0 else [*found[:MOST_NAMED], f"and {more} more"]


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


def loaded(
    artifact: Artifact,
    adapter: str | Path,
    known: dict[str, KeptAdapter],
    *,
    keeping: Callable[[Artifact, Path], KeptAdapter],
) -> str:
    """Make an adapter ready: the name that it is asked for by; see `Engine.load_adapter`.

    Args:
        known: those that are ready, by these names; it is added.
        keeping: how a directory of peft's is kept.
    """
    slots_of(artifact)
    given = str(adapter)
    if reading.is_dir(given):
        kept, name = keeping(artifact, Path(given)), Path(given).resolve().name
    else:
        kept, name = open_kept(artifact, given), given
    kept.check()
    if known.get(name, kept) != kept:
        name = kept.name
    known[name] = kept
    return name


def misfits(shapes: Mapping[str, tuple[int, ...]], slots: AdapterSlots) -> Iterator[str]:
    """Matrices that belong to no linear, or are of another shape, and halves of pairs.

    Args:
        shapes: of all matrices of an adapter, by input.
    """
    for name, shape in shapes.items():
        module, _, part = name.rpartition(".")
        if module not in slots.linears or part not in ("lora_A", "lora_B"):
            yield f"{name[:100]}: there is no such input"
            continue
        entering, leaving = slots.linears[module]
        first, second = (f"{module}.{which}" for which in ("lora_A", "lora_B"))
        if first not in shapes or second not in shapes:
            yield f"{name}: the other half of the pair is missing"
        elif len(shape) != 2 or shape[0 if part == "lora_A" else 1] != (entering if part == "lora_A" else leaving):
            yield f"{name}: shape {list(shape)} beside a linear of {entering} channels to {leaving}"
        elif shapes[first][-1:] != shapes[second][:1]:
            yield f"{name}: the ranks of the pair differ"
        elif shape[1 if part == "lora_A" else 0] > slots.rank:
            yield f"{name}: a rank above {slots.rank}"
