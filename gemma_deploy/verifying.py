"""`verify`: is every byte of an artifact what its manifest says, and do its graphs hold together?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import onnx

from gemma_deploy.artifact.adapters import ADAPTERS, kept_names, kept_problems
from gemma_deploy.artifact.check import ROWS, file_problems, refuse
from gemma_deploy.artifact.network import network_problems
from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.backends import backend_of
from gemma_deploy.dtypes import BY_ONNX
from gemma_deploy.names import HEAD, MANIFEST, PARAMS
from gemma_deploy.params import ParamRow, ParamTable, damaged_rows
from gemma_deploy.params.naming import file_name, graph_file
from gemma_deploy.partition.ranks import sharding
from gemma_deploy.workdir import MARK

ONNX = ".onnx"
# Scalars, shapes and slices; a weight is larger.
LARGEST_CONSTANT_BYTES = 65536
TABLES = ("embed_tokens", HEAD)


def verify(path: Path, *, deep: bool = True, progress: Callable[[int, int], None] | None = None) -> list[str]:
    """Check an artifact and return what was checked.

    Args:
        deep: read and hash params.safetensors as well (seconds per gigabyte).

    Raises:
        ArtifactError: everything that is wrong, in one list.
    """
    artifact = Artifact.open(path)
    problems = file_problems(artifact) + _folder_problems(artifact)
    checked = [f"{len(artifact.manifest.files)} files present, sizes and hashes"]
    if adapters := kept_names(artifact):
        checked.append(f"{len(adapters)} adapters, each made for this artifact, its hash that of its record")
    tables = artifact.manifest.table.files
    for name, table in tables.items():
        if deep and (path / name).is_file():
            problems += damaged_rows(path / name, table, naming=artifact.manifest.naming, progress=progress)
            checked.append(f"{len(table.rows)} tensors of {name}, sha256 each")
    for folder in artifact.manifest.folders:
        for name in artifact.manifest.contract.graphs:
            file = path / folder / graph_file(name, artifact.manifest.naming)
            shown = file.relative_to(path).as_posix()
            if file.is_file():
                params = (Path(folder) / file_name(artifact.manifest.naming)).as_posix()
                rows = tables.get(params, ParamTable(())).rows
                if file.suffix == ONNX:
                    problems += _graph_problems(rows, file, shown, views=backend_of(artifact.manifest).shares_tensors)
                else:
                    problems += network_problems(rows, file, shown)
                checked.append(f"{shown}: full check, no weights inside, every tensor where its row says")
    problems += _table_problems(artifact) + _rank_problems(artifact)
    refuse(artifact, list(dict.fromkeys(problems)))
    return checked


def _folder_problems(artifact: Artifact) -> list[str]:
    """Rows that are not the ones the parameter file was written with, and files the manifest does not know."""
    files = artifact.manifest.files
    problems = []
    tables = artifact.manifest.table.files
    for name, facts in files.items():
        digest = tables[name].digest if name in tables else "none"
        if facts.sha256.startswith(ROWS) and facts.sha256 != ROWS + digest:
            problems.append(f"{name}: the rows in {MANIFEST} are not the ones it was written with")
    known = {*files, MANIFEST, MARK}
    found = (file.relative_to(artifact.path).as_posix() for file in artifact.path.rglob("*") if file.is_file())
    strangers = (name for name in found if name not in known and not name.startswith(f"{ADAPTERS}/"))
    problems += [f"{name} does not belong to the artifact" for name in sorted(strangers)]
    return problems + kept_problems(artifact)


def _graph_problems(params: Sequence[ParamRow], file: Path, shown: str, views: bool) -> list[str]:
    try:
        onnx.checker.check_model(str(file), full_check=True)
        model = onnx.load(str(file), load_external_data=False)
    except Exception as error:  # onnx raises many kinds for a damaged file; all mean the same here
        return [f"{shown}: {str(error).splitlines()[0]}"]
    rows = {row.name: row for row in params}
    problems = []
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            if tensor.ByteSize() > LARGEST_CONSTANT_BYTES:
                problems.append(f"{shown}: {tensor.name} lies inside the graph ({tensor.ByteSize()} bytes)")
            continue
        where = {entry.key: entry.value for entry in tensor.external_data}
        row = rows.get(tensor.name)
        got = (where.get("location"), _number(where.get("offset", "0")), _number(where.get("length", "0")))
        if row is None or _dtype(tensor) != row.dtype:
            if not (views and _shows_whole_rows(params, got)):
                problems.append(f"{shown}: {tensor.name} has no row in the manifest")
            elif got[2] != (needed := _nbytes(tensor)):
                problems.append(f"{shown}: {tensor.name} shows {got[2]} bytes, its shape and dtype say {needed}")
            continue
        says = (PARAMS, row.offset, row.nbytes)
        if got != says:
            problems.append(f"{shown}: {tensor.name} points to {got}, its row says {says}")
        if (_dtype(tensor), tuple(tensor.dims)) != (row.dtype, row.shape):
            problems.append(f"{shown}: {tensor.name} has another dtype or shape than its row")
    return problems


def _number(written: str) -> int:
    """A whole number of an .onnx file, which holds it as text; -1, which no row says, for what is none."""
    return int(written) if written.isascii() and written.isdigit() and len(written) < 20 else -1


def _dtype(tensor: onnx.TensorProto) -> str:
    """Its name here; "" of a type that no parameter file has."""
    known = BY_ONNX.get(tensor.data_type)
    return known.name if known else ""


def _nbytes(tensor: onnx.TensorProto) -> int:
    """Of the values, two of 4 bits to a byte."""
    known = BY_ONNX.get(tensor.data_type)
    bits = known.bits if known else 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return -(-math.prod(tensor.dims) * bits // 8)


def _shows_whole_rows(params: Sequence[ParamRow], span: tuple[str | None, int, int]) -> bool:
    """Whether a span of the parameter file is rows of one tensor, several one behind another, or all of it."""
    location, offset, length = span
    if offset == 0 and length == max((row.offset + row.nbytes for row in params), default=-1):
        return location == PARAMS  # an operator that computes the whole model takes it as it is
    for row in params:  # some rows of one matrix
        inside = row.offset <= offset and offset + length <= row.offset + row.nbytes
        row_bytes = max(1, row.nbytes // row.shape[0])
        if location == PARAMS and length > 0 and inside and not (offset - row.offset) % row_bytes:
            return length % row_bytes == 0
    ends = {row.offset: row.offset + row.nbytes for row in params}
    at = offset
    while at in ends and at < offset + length:
        at = ends[at]
    return location == PARAMS and length > 0 and at == offset + length


def _table_problems(artifact: Artifact) -> list[str]:
    """The token table is stored once in each file that needs it, also when the LM head reads it."""
    manifest = artifact.manifest
    model, problems = manifest.model, []
    layers, tied = model.num_hidden_layers, model.tie_word_embeddings
    parts = [(part.folder, part.layers, part.ranks) for part in manifest.parts] or [("", (0, layers), 1)]
    for folder, span, ranks in parts:
        file = (Path(folder) / file_name(manifest.naming)).as_posix()
        embeds, heads = span[0] == 0, span[1] == layers
        expected = int(embeds) + int(heads and not (tied and embeds))
        shape = (model.vocab_size // ranks, model.hidden_size)
        found = artifact.manifest.table.files.get(file, ParamTable(())).rows
        tables = [row.name for row in found if row.shape == shape and row.name.split(".")[-2] in TABLES]
        if len(tables) != expected:
            problems.append(f"{file}: token tables stored: {', '.join(tables) or 'none'}; expected {expected}")
    return problems


def _rank_problems(artifact: Artifact) -> list[str]:
    """What is not divided among ranks is the same in all of them."""
    seen: dict[tuple[str, str], str] = {}
    problems = []
    stages = {(Path(part.folder) / PARAMS).as_posix(): part.stage for part in artifact.manifest.parts}
    for row in artifact.manifest.params:
        repeated = row.file in stages and sharding(row.name, len(row.shape)) is None
        if repeated and seen.setdefault((stages[row.file], row.name), row.sha256) != row.sha256:
            problems.append(f"{row.file}: {row.name} is not what the other ranks have")
    return problems
