"""The weights an artifact holds, put together and dequantized.

A calibrated scheme's torch reference computes with them, and parity/weights.py compares them with the checkpoint's.

Read from the parameter files alone, through the plan that says which rows and columns each rank and stage has, and the
manifest's table that says where they lie.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from gemma_deploy.artifact.manifest import Manifest
from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.checkpoint import ModelConfig, TensorInfo
from gemma_deploy.checkpoint.expected import expected_tensors
from gemma_deploy.checkpoint.index import read_json
from gemma_deploy.checkpoint.shapes import as_matrix
from gemma_deploy.dtypes import BY_NAME
from gemma_deploy.names import COLUMN_FACTOR, CONFIG
from gemma_deploy.params import blocks, panels
from gemma_deploy.params.naming import file_name
from gemma_deploy.params.plan import COLUMN_SCALE, ParamSpec, build_plan
from gemma_deploy.params.rescaled import exponent_of, rescaled
from gemma_deploy.params.table import ParamRow
from gemma_deploy.partition import parts_of
from gemma_deploy.quantization.rescaling import Rescaling
from gemma_deploy.schemes import CodeForm, Codes, Scheme, Storage


def config_of(artifact: Artifact) -> ModelConfig:
    """The config of an artifact's model.

    Raises:
        CheckpointError: its config.json is missing or damaged.
    """
    raw, _ = read_json(artifact.path / CONFIG, missing="compile the recipe again with --force")
    return ModelConfig.from_dict(raw, str(artifact.path / CONFIG))


class ArtifactWeights:
    """A `WeightSource` with the artifact's numbers, under the names and in the shapes of the checkpoint, float32.

    Args:
        config: of the checkpoint.
        artifact: directory; manifest: its manifest, or what will become it.
    """

    def __init__(self, config: ModelConfig, artifact: Path, manifest: Manifest) -> None:
        self.config, self.path, self._table = config, artifact, manifest.table
        self.tensors = {
            name: TensorInfo(name, as_matrix(shape), "float32", artifact, 4 * math.prod(shape))
            for name, shape in expected_tensors(config).items()
        }
        recipe, context = manifest.recipe, manifest.contract.context
        rows = {(row.file, row.name): row for row in manifest.params}
        parts = parts_of(self.config.num_hidden_layers, recipe.split.points, recipe.frontend.model_kwargs.tp)
        scheme = Scheme(manifest.scheme).form
        storage = manifest.storage or Storage()
        self._rescaling, self._storage = manifest.rescaling or Rescaling(), storage
        form = _form_of(manifest)
        self._scales: dict[str, tuple[int, ...]] = {}
        self._coded: dict[str, str] = {}  # scale -> matrix
        self._pieces: dict[str, list[tuple[Path, ParamRow, ParamSpec]]] = {}
        for part in parts:
            file = part.file(file_name(form.naming))
            plan = build_plan(
                self.config,
                scheme,
                context,
                part=part,
                storage=storage,
                form=form,
                factors=manifest.contract.adapters is not None,
            )
            for spec in plan:
                if spec.source is not None:
                    row = rows[file, spec.name]
                    self._pieces.setdefault(spec.name, []).append((artifact / file, row, spec))
                    if BY_NAME[row.dtype].block:
                        self._coded[spec.name] = spec.name
                    if spec.name.endswith(".scale") and spec.name not in self.tensors:
                        module = spec.name.removesuffix(".scale")
                        codes = storage.of(module)
                        assert codes is not None  # float16 has no scales
                        self._coded[spec.name] = module if module in self.tensors else f"{module}.weight"
                        self._scales[spec.name] = codes.scale_shape(self.tensors[self._coded[spec.name]].shape)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) as float32, codes times their scale, powers of two of a float16 artifact undone."""
        info: TensorInfo = self.tensors[name]
        if name in self._coded and name not in self._scales:
            codes, scales = self._blocks(name, start, stop)
            return _times(codes, scales)
        values = self._gather(name, info.shape, start, stop)
        if exponent_of(name, values.ndim, self._rescaling):
            values = rescaled(
                values, name, self._rescaling, norm_offset=self.config.architecture.norm_offset, undo=True
            )
        scale = f"{name.removesuffix('.weight')}.scale"
        if scale not in self._scales:
            return values
        scales = self._gather(scale, self._scales[scale], start, stop).reshape(stop - start, -1)
        return _times(values, scales)

    def code_names(self) -> tuple[str, ...]:
        """Names of the matrices that are codes, in file order."""
        return tuple(self._coded.values())

    def codes(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """A matrix of `code_names` as it is stored: int8 [rows, columns], float32 [rows, groups]."""
        if name in self._coded:
            return self._blocks(name, 0, self.tensors[name].shape[0])
        shape, scale = self.tensors[name].shape, f"{name.removesuffix('.weight')}.scale"
        scales = self._gather(scale, self._scales[scale], 0, shape[0]).reshape(shape[0], -1)
        return self._gather(name, shape, 0, shape[0]).astype(np.int8), scales

    def form_of(self, module: str) -> Codes:
        """Bits and groups of the codes of a linear, by its path."""
        return self._storage.linear(module)

    def raw_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """As `rows`: the artifact has no other form of its weights."""
        return self.rows(name, start, stop)

    def weights_fingerprint(self) -> str:
        """Of the table of what the files hold."""
        return self._table.digest

    def dtype(self, name: str) -> str:
        """Type of a tensor's numbers in the file; codes are int8 or int4, whatever their zero point."""
        dtype = self._pieces[name][0][1].dtype
        return f"int{BY_NAME[dtype].bits}" if BY_NAME[dtype].block else dtype.removeprefix("u")

    def embedding_scale(self) -> np.ndarray | None:
        """[hidden] by which embedded rows are multiplied, sqrt(hidden_size) included; None where that is one number."""
        if COLUMN_SCALE not in self._pieces:
            return None
        return self._gather(COLUMN_SCALE, (self.config.hidden_size,), 0, self.config.hidden_size)

    def column_factors(self) -> dict[str, np.ndarray]:
        """Name of each float32 [columns] by which the columns of linears that read one input were multiplied.

        Of an artifact in one part; empty where the scheme moves no factors.
        """
        names = [name for name in self._pieces if name.endswith(f".{COLUMN_FACTOR}")]
        sizes = [self._pieces[name][0][1].shape for name in names]
        return {name: self._gather(name, size, 0, size[0]) for name, size in zip(names, sizes, strict=True)}

    def _blocks(self, name: str, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Codes and scales of a matrix whose codes lie behind their scales."""
        ((file, row, _),) = self._pieces[name]
        size = row.nbytes // row.shape[0]
        stored = np.fromfile(file, np.uint8, (stop - start) * size, offset=row.offset + start * size)
        return blocks.decode(stored.reshape(stop - start, size), row.dtype)

    def _gather(self, name: str, shape: tuple[int, ...], start: int, stop: int) -> np.ndarray:
        """Rows of a tensor from all files that hold some of it, as float32; NaN where none does."""
        found = np.full((stop - start, *shape[1:]), np.nan, np.float32)
        for file, row, spec in self._pieces[name]:
            at = 0  # row of the file's tensor
            for first, last in spec.rows or ((0, shape[0]),):
                low, high = max(first, start), min(last, stop)
                if low < high:
                    if spec.planes and "int" in row.dtype:
                        found[low - start : high - start] = _read_planes(file, row, (low, high), shape)
                        continue
                    if spec.planes:
                        scales = _read(file, row, low, high, False)[:, : math.prod(shape[1:])]  # not those of padding
                        found[low - start : high - start] = scales.reshape(-1, *shape[1:])
                        continue
                    if spec.panels is not None:
                        found[low - start : high - start] = _read_panels(file, row, (low, high), shape)
                        continue
                    span, dimensions = (at + low - first, at + high - first), len(shape)
                    part = _rows_of(file, row, *span, transposed=spec.transposed, dimensions=dimensions)
                    columns = slice(*spec.columns) if spec.columns else slice(None)
                    part = part - np.float32(spec.added) if spec.added else part
                    found[(slice(low - start, high - start), *((columns,) if len(shape) > 1 else ()))] = part
                at += last - first
        return found


def _times(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Codes [rows, ...] times scales [rows, groups], float32."""
    dequantized: np.ndarray = (values.reshape(*scales.shape, -1) * scales[..., None]).reshape(values.shape)
    return dequantized


def _form_of(manifest: Manifest) -> CodeForm:
    kernels, naming = manifest.kernels, manifest.contract.naming
    return CodeForm(
        transposed=kernels is not None and kernels.integer,
        panels=bool(manifest.contract.panels),
        planes=manifest.contract.candidates is not None,
        experts_transposed=kernels is not None,
        rotary=naming is None,
        naming=naming or "own",
    )


def _rows_of(file: Path, row: ParamRow, start: int, stop: int, *, transposed: bool, dimensions: int) -> np.ndarray:
    """Rows of a tensor that is read as one of so many `dimensions`: those of a stack lie below each other."""
    extra = len(row.shape) - dimensions
    flat = replace(row, shape=(math.prod(row.shape[: extra + 1]), *row.shape[extra + 1 :]))
    if not (extra and transposed):
        return _read(file, flat, start, stop, transposed)
    _, columns, rows = row.shape
    parts = []
    for matrix in range(start // rows, -(-stop // rows)):
        whole = _read(file, flat, matrix * columns, (matrix + 1) * columns, False)
        parts.append(whole[:, max(0, start - matrix * rows) : stop - matrix * rows].T)
    return np.concatenate(parts)


def _read_panels(file: Path, row: ParamRow, rows: tuple[int, int], shape: tuple[int, ...]) -> np.ndarray:
    """Rows [start, stop) of a tensor that lies in panels, [stop - start, ...] of `shape`."""
    start, stop = rows
    if len(row.shape) == 1:
        vector: np.ndarray = np.fromfile(file, row.dtype, row.shape[0], offset=row.offset)[start:stop]
        return vector
    first, last, bits = start // panels.ROWS, -(-stop // panels.ROWS), BY_NAME[row.dtype].bits
    nbytes = panels.ROWS * row.shape[1] * bits // 8
    stored = np.fromfile(file, np.uint8, (last - first) * nbytes, offset=row.offset + first * nbytes)
    if row.dtype == "bfloat16":
        halves = panels.unpack(stored.view(np.uint16), row.dtype, row.shape[1])
        found = (halves.astype(np.uint32) << 16).view(np.float32)
    else:
        elements = stored if bits < 16 else stored.view(row.dtype)
        found = panels.unpack(elements, row.dtype, row.shape[1])
    begin = first * panels.ROWS
    return found[start - begin : stop - begin, : math.prod(shape[1:])].reshape(stop - start, *shape[1:])


def _read_planes(file: Path, row: ParamRow, rows: tuple[int, int], shape: tuple[int, ...]) -> np.ndarray:
    """The same of codes that lie in two planes."""
    start, stop = rows
    first, last = start // panels.ROWS, -(-stop // panels.ROWS)
    nbytes = panels.ROWS * row.shape[1] // 2
    high, low = (
        np.fromfile(file, np.uint8, (last - first) * nbytes, offset=row.offset + plane + first * nbytes)
        for plane in (0, row.nbytes // 2)
    )
    begin = first * panels.ROWS
    return panels.unpack_planes(high, low, row.shape[1])[start - begin : stop - begin, : shape[1]]


def _read(file: Path, row: ParamRow, start: int, stop: int, transposed: bool) -> np.ndarray:
    """Rows of one stored tensor, which are columns of a transposed one."""
    if transposed:
        whole = np.memmap(file, row.dtype, "r", row.offset, row.shape)
        return np.asarray(whole[:, start:stop]).T
    width = int(np.prod(row.shape[1:]))
    if row.dtype.endswith("int4"):
        pairs = np.fromfile(file, np.uint8, (stop - start) * width // 2, offset=row.offset + start * width // 2)
        pairs = (pairs ^ (0x88 if row.dtype == "uint4" else 0)).view(np.int8)
        flat = np.stack([(pairs << 4) >> 4, pairs >> 4], axis=-1)  # the first of a pair is the low half
    elif row.dtype == "bfloat16":
        halves = np.fromfile(file, np.uint16, (stop - start) * width, offset=row.offset + start * width * 2)
        flat = (halves.astype(np.uint32) << 16).view(np.float32)
    else:
        dtype = np.dtype(row.dtype)
        flat = np.fromfile(file, dtype, (stop - start) * width, offset=row.offset + start * width * dtype.itemsize)
        flat = (flat ^ 0x80).view(np.int8) if row.dtype == "uint8" else flat
    return flat.reshape(stop - start, *row.shape[1:])
