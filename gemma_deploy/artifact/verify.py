"""`verify`: is every byte of an artifact what its manifest says, and do its graphs hold together?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx

from gemma_deploy.artifact.check import PARAMS, ROWS, file_problems, open_complete, refuse
from gemma_deploy.artifact.manifest import MANIFEST, Artifact
from gemma_deploy.params import damaged_rows

# Scalars, shapes and slices; a weight is larger.
LARGEST_CONSTANT_BYTES = 65536
ONNX_DTYPES = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.BFLOAT16: "bfloat16",
    onnx.TensorProto.INT8: "int8",
}


def verify(path: Path, *, deep: bool = True, progress: Callable[[int, int], None] | None = None) -> list[str]:
    """Check an artifact and return what was checked.

    Args:
        deep: read and hash params.safetensors as well (seconds per gigabyte).

    Raises:
        ArtifactError: everything that is wrong, in one list.
    """
    artifact = open_complete(path)
    problems = file_problems(artifact) + _folder_problems(artifact)
    checked = [f"{len(artifact.manifest['files'])} files present, sizes and hashes"]
    params = path / PARAMS
    if deep and params.is_file():
        problems += damaged_rows(params, artifact.params, progress=progress)
        checked.append(f"{len(artifact.params.rows)} tensors of {PARAMS}, sha256 each")
    for name in artifact.manifest["contract"]["graphs"]:
        file = path / f"{name}.onnx"
        if file.is_file():
            problems += _graph_problems(artifact, file)
            checked.append(f"{name}.onnx: full check, no weights inside, every tensor where its row says")
    problems += _table_problems(artifact)
    refuse(artifact, list(dict.fromkeys(problems)))
    return checked


def _folder_problems(artifact: Artifact) -> list[str]:
    """Rows that are not the ones the parameter file was written with, and files the manifest does not know."""
    files = artifact.manifest["files"]
    problems = []
    for name, facts in files.items():
        if facts["sha256"].startswith(ROWS) and facts["sha256"] != ROWS + artifact.params.digest:
            problems.append(f"{name}: the rows in {MANIFEST} are not the ones it was written with")
    known = {*files, MANIFEST}
    strangers = (file.name for file in artifact.path.iterdir() if file.name not in known)
    problems += [f"{name} does not belong to the artifact" for name in sorted(strangers)]
    return problems


def _graph_problems(artifact: Artifact, file: Path) -> list[str]:
    try:
        onnx.checker.check_model(str(file), full_check=True)
        model = onnx.load(str(file), load_external_data=False)
    except Exception as error:  # onnx raises many kinds for a damaged file; all mean the same here
        return [f"{file.name}: {str(error).splitlines()[0]}"]
    rows = {row.name: row for row in artifact.params.rows}
    problems = []
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            if tensor.ByteSize() > LARGEST_CONSTANT_BYTES:
                problems.append(f"{file.name}: {tensor.name} lies inside the graph ({tensor.ByteSize()} bytes)")
            continue
        where = {entry.key: entry.value for entry in tensor.external_data}
        row = rows.get(tensor.name)
        if row is None:
            problems.append(f"{file.name}: {tensor.name} has no row in the manifest")
            continue
        got = (where.get("location"), int(where.get("offset", 0)), int(where.get("length", 0)))
        says = (PARAMS, row.offset, row.nbytes)
        if got != says:
            problems.append(f"{file.name}: {tensor.name} points to {got}, its row says {says}")
        if (ONNX_DTYPES.get(tensor.data_type), tuple(tensor.dims)) != (row.dtype, row.shape):
            problems.append(f"{file.name}: {tensor.name} has another dtype or shape than its row")
    return problems


def _table_problems(artifact: Artifact) -> list[str]:
    """The token table is stored once, also when the LM head reads it."""
    model = artifact.manifest["model"]
    shape = (model["vocab_size"], model["hidden_size"])
    tables = [row.name for row in artifact.params.rows if row.shape == shape]
    expected = 1 if model["tie_word_embeddings"] else 2
    return [] if len(tables) == expected else [f"token tables stored: {', '.join(tables)}; expected {expected}"]
