"""The weights an artifact holds against the checkpoint's, tensor by tensor.

Logits of a quantized artifact are compared with those of a reference that computes with the artifact's own weights, so
a weight that was stored wrongly is in both. Here it is compared with what it was made from.

A calibrated scheme divides what a linear reads by factors and multiplies the linear's columns by them. Those factors
are not taken from the program that made them: they are read off the artifact, by how much a norm's gain (1 + weight)
has become smaller, and the rows of v_proj and up_proj. Error compensation moves errors into columns that read next to
nothing: those of down_proj in the demo are off by three times themselves (all of w4a16_gptq's together by 0.73). So of
o_proj and down_proj the median column decides (0.143).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from gemma_deploy.artifact.weights import ArtifactWeights
from gemma_deploy.checkpoint import WeightSource
from gemma_deploy.machine import give_memory_back
from gemma_deploy.names import EMBEDDING_WEIGHT, LAYERS, NORM, NORM_WEIGHT
from gemma_deploy.parity.gates import STORED_WEIGHTS, Line
from gemma_deploy.patched import patched_module
from gemma_deploy.progress import Tick
from gemma_deploy.quantization.folding import shared_rows

BLOCK_BYTES = 8 << 20  # of a matrix as float32
CLOSED = 1e-5  # of a norm's largest gain: a channel below it counts for nothing, and its factor cannot be read
# Norm of what a tensor is off, relative to its own norm, by its type in the file. Largest seen on the real 270M, the
# demo and tiny models of three generations, damping of 0.01 and columns in order of size among them: float32 0,
# bfloat16 0, float16 4e-9, int8 0.018, int4 0.145. Two tensors that changed places are off by 1.4.
LIMITS = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 4e-3, "int8": 0.05, "int4": 0.4}


@dataclass(frozen=True)
class Difference:
    """One tensor: what it is off, relative to itself, its type in the file, and how much that type may be off."""

    name: str
    error: float
    dtype: str

    @property
    def limit(self) -> float:
        """The largest error that its stored type allows."""
        return LIMITS[self.dtype]


def weights_line(
    checkpoint: WeightSource, stored: ArtifactWeights, *, folded: bool, embed_scale: str, progress: Tick | None = None
) -> Line:
    """The tensor that is off most, measured by its limit.

    Args:
        checkpoint: what the artifact was made from.
        stored: its weights.
        folded: whether columns were multiplied by factors (the calibrated schemes).
        embed_scale: rounding of the embedding's scale, "exact" or "bf16".
        progress: called with (tensors compared, all of them).
    """
    found = differences(checkpoint, stored, folded=folded, embed_scale=embed_scale)
    worst = max(
        _told(found, len(checkpoint.tensors), progress),
        key=lambda one: math.inf if math.isnan(one.error) else one.error / one.limit,
    )
    name = f"relative error of the worst tensor ({worst.name}, {worst.dtype})"
    return Line(STORED_WEIGHTS, name, worst.error, worst.limit, worst.error <= worst.limit)


def taken_over_line(checkpoint: WeightSource, stored: ArtifactWeights, names: Iterable[str]) -> Line:
    """How many numbers of the matrices that were taken over differ: every one is a code times a scale.

    Args:
        names: of the matrices.
    """
    wrong = 0
    for name in names:
        count, width = checkpoint.tensors[name].shape
        step = max(1, BLOCK_BYTES // (4 * width))
        for start in range(0, count, step):
            stop = min(start + step, count)
            same = checkpoint.rows(name, start, stop) == stored.rows(name, start, stop)
            wrong += same.size - int(np.count_nonzero(same))
        give_memory_back()
    return Line(STORED_WEIGHTS, "taken-over numbers that differ", wrong, 0, wrong == 0)


def _told(found: Iterable[Difference], count: int, progress: Tick | None) -> Iterator[Difference]:
    """The same, telling how many there were."""
    for number, one in enumerate(found, 1):
        if progress is not None:
            progress(min(number, count), count)
        yield one


def differences(
    checkpoint: WeightSource, stored: ArtifactWeights, *, folded: bool, embed_scale: str
) -> Iterator[Difference]:
    """Every tensor in model order; a block of rows of both is in memory. See `weights_line`."""
    compared = _Compared(checkpoint, stored)
    if folded:
        yield from _folded(compared, embed_scale)
        return
    for name, info in checkpoint.tensors.items():
        yield compared.norm(name) if len(info.shape) == 1 else compared.matrix(name)


def _folded(compared: _Compared, embed_scale: str) -> Iterator[Difference]:
    config = compared.checkpoint.config
    yield compared.matrix(EMBEDDING_WEIGHT, columns=compared.embedding_factors(embed_scale))
    for layer in config.layers:
        prefix, groups = layer.prefix, layer.groups
        norms = {group.norm for group in groups}
        makers = {group.maker for group in groups}
        smaller: dict[str | None, np.ndarray] = {}  # factors of a maker's rows
        for group in groups:
            columns = compared.norm_factors(f"{prefix}{group.norm}") if group.norm else None
            if group.maker:
                shared = shared_rows(layer, group)
                columns = 1 / (smaller[group.maker] if shared is None else smaller[group.maker][shared.numpy()])
            for reader in group.readers:
                name, rows = f"{prefix}{reader}.weight", None
                if reader in makers:
                    rows = smaller[reader] = compared.row_factors(name, columns)
                yield compared.matrix(name, columns=columns, rows=rows, typical=bool(group.maker))
        for name, info in compared.checkpoint.tensors.items():
            local = name.removeprefix(prefix).removesuffix(".weight")
            if name.startswith(prefix) and len(info.shape) == 1 and local not in norms:
                yield compared.norm(name)
        if layer.experts is not None:
            yield compared.matrix(f"{prefix}{layer.experts.router}.weight")
            for stack in layer.experts.stacks(layer.hidden_size):
                yield compared.matrix(f"{prefix}{stack}", typical=True)
        for small in layer.small:
            yield compared.matrix(f"{prefix}{small}.weight")
    if config.sentence is not None:
        yield compared.norm(f"{NORM}.weight")
        for name in config.sentence.tensors():
            yield compared.matrix(name)
        return
    for name, info in compared.checkpoint.tensors.items():  # of per-layer vectors, and of streams
        if not name.startswith(LAYERS) and name not in (EMBEDDING_WEIGHT, NORM_WEIGHT, config.head_weight):
            yield compared.norm(name) if len(info.shape) == 1 else compared.matrix(name)
    yield compared.matrix(config.head_weight, columns=compared.norm_factors(NORM), use="LM head, ")


@dataclass(frozen=True)
class _Compared:
    """The two sets of weights."""

    checkpoint: WeightSource
    stored: ArtifactWeights

    def gains(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """What a norm's weight, or a number, multiplies by, [hidden] float64: the checkpoint's and the artifact's."""
        size, both = self.checkpoint.tensors[name].shape[0], (self.checkpoint, self.stored)
        offset = self.checkpoint.config.architecture.norm_offset if name.endswith(".weight") else 0.0
        expected, found = (offset + one.rows(name, 0, size).astype(np.float64) for one in both)
        return expected, found

    def norm_factors(self, norm: str) -> np.ndarray:
        """[hidden] by which a norm's gain was divided; 1 where it lets nothing through."""
        expected, found = self.gains(f"{norm}.weight")
        open_ = np.abs(expected) > CLOSED * np.abs(expected).max()
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(open_, expected / found, 1).astype(np.float32)

    def embedding_factors(self, embed_scale: str) -> np.ndarray | None:
        """[hidden] by which the embedding's output was divided; None where it has one scale for all columns."""
        import torch

        scale = self.stored.embedding_scale()
        if scale is None:
            return None
        hidden = self.checkpoint.config.hidden_size
        root = patched_module("layers_vacc").rounded_sqrt(hidden, torch.float32, embed_scale)
        return (root / scale).astype(np.float32)

    def row_factors(self, name: str, columns: np.ndarray | None) -> np.ndarray:
        """[out] by which the checkpoint's rows come nearest to the artifact's."""
        factors = []
        for _, expected, found in self._blocks(name, columns):
            both = np.einsum("ij,ij->i", expected, found, dtype=np.float64)
            own = np.einsum("ij,ij->i", expected, expected, dtype=np.float64)
            factors.append(np.where(own > 0, both / np.where(own > 0, own, 1), 1))
        return np.concatenate(factors).astype(np.float32)

    def norm(self, name: str) -> Difference:
        """A norm by its gain, or a number."""
        expected, found = self.gains(name)
        return Difference(name, _relative(_square(found - expected), _square(expected)), self.stored.dtype(name))

    def matrix(
        self,
        name: str,
        *,
        columns: np.ndarray | None = None,
        rows: np.ndarray | None = None,
        typical: bool = False,
        use: str = "",
    ) -> Difference:
        """A matrix [out, in].

        Args:
            columns: [in] by which the checkpoint's columns are multiplied; rows: [out], its rows.
            typical: take the median of the columns, each relative to itself, instead of all together.
            use: of a matrix that has several.
        """
        width = self.checkpoint.tensors[name].shape[1]
        error, energy = np.zeros(width), np.zeros(width)
        for start, expected, found in self._blocks(name, columns):
            if rows is not None:
                expected = expected * rows[start : start + len(found), None]
            energy += np.einsum("ij,ij->j", expected, expected)
            found -= expected
            error += np.einsum("ij,ij->j", found, found)
        if typical:
            off = float(np.median([_relative(*column) for column in zip(error, energy, strict=True)]))
        else:
            off = _relative(error.sum(), energy.sum())
        return Difference(use + name, off, self.stored.dtype(name))

    def _blocks(self, name: str, columns: np.ndarray | None) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """First row, the checkpoint's rows with their columns multiplied, and the artifact's, which may be changed."""
        count, width = self.checkpoint.tensors[name].shape
        step = max(1, BLOCK_BYTES // (4 * width))
        for start in range(0, count, step):
            stop = min(start + step, count)
            expected = self.checkpoint.rows(name, start, stop)
            yield start, expected if columns is None else expected * columns, self.stored.rows(name, start, stop)
        give_memory_back()


def _square(values: np.ndarray) -> float:
    """Sum of squares."""
    flat = values.reshape(-1)
    return float(np.dot(flat, flat))


def _relative(error: float, energy: float) -> float:
    """0 where nothing is off, whatever the size; infinite where zeros became something."""
    if error == 0 or energy == 0:
        return 0.0 if error == 0 else math.inf
    return math.sqrt(error / energy)
