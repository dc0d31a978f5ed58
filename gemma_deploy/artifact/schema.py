"""What manifest.json holds, as far as anything here reads them: types and bounds, checked before use.

A file of an artifact may come from anywhere. What passes here neither raises in whoever reads it nor leads outside the
artifact, and no number in it lets a loop or an array grow without measure.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from gemma_deploy.partition.parts import FOLDER

LARGEST_EXPONENT = 64  # of a power of two that float16 tensors are divided by; the real ones are below 8
_LAYERS, _LAYER_POINT = "model.layers.", re.compile(r"model\.layers\.[0-9]{1,4}\..+")


def inside(name: str) -> str:
    """A path of a file in an artifact, as a manifest has it.

    Raises:
        ValueError: it is absolute, or leads out of the artifact.
    """
    if "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
        raise ValueError("not the path of a file in the artifact")
    return name


def _point(name: str) -> str:
    if name.startswith(_LAYERS) and not _LAYER_POINT.fullmatch(name):
        raise ValueError("is no point of a layer")
    return name


Point = Annotated[str, AfterValidator(_point)]
Inside = Annotated[str, AfterValidator(inside)]
Bytes = Annotated[int, Field(ge=0, lt=2**62)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Size = Annotated[int, Field(ge=1, lt=2**31)]
Layers = Annotated[int, Field(ge=1, le=1024)]
Index = Annotated[int, Field(ge=0, le=1024)]
Dtype = Literal["float32", "float16", "bfloat16", "float64", "int64", "int32", "int8", "uint8", "int4", "uint4", "bool"]
# JSON that is shown as it is, and no deeper than this.
Plain = str | int | float | bool | None


class Part(BaseModel):
    """An object in a JSON file: no value becomes one of another type; keys that are not named here are let be."""

    model_config = ConfigDict(strict=True, protected_namespaces=())


class Row(Part):
    """One tensor of a parameter file."""

    model_config = ConfigDict(strict=True, extra="forbid")

    name: Annotated[str, Field(min_length=1, pattern=r"^[^.].*\.")]
    dtype: Dtype
    shape: Annotated[list[Size], Field(min_length=1, max_length=8)]
    offset: Bytes
    nbytes: Bytes
    sha256: str
    scheme: str
    sqnr_db: float | None = None
    signal_energy: float | None = None
    file: Inside


class File(Part):
    """A file of the artifact."""

    bytes: Bytes
    sha256: str


class Port(Part):
    """An input or output of a graph."""

    name: str
    dtype: str
    shape: list[Count | str]


class Graph(Part):
    """Inputs and outputs of a graph."""

    inputs: list[Port]
    outputs: list[Port]


class Contract(Part):
    """Sizes of the artifact, and its graphs."""

    batch: Size
    prefill: Size
    context: Size
    vocab_size: Size
    dynamic: bool
    graphs: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")], Graph]


class PartContract(Part):
    """What the graphs of a part take and give."""

    embeds: bool
    heads: bool
    graphs: dict[str, Graph]


class Model(Part):
    """The model's config."""

    model_type: str
    num_hidden_layers: Layers
    vocab_size: Size
    hidden_size: Size
    tie_word_embeddings: bool
    eos_token_ids: list[Count]


class CheckpointOfArtifact(Part):
    """What it was made from."""

    path: str
    format: str
    fingerprint: str
    fingerprint_without_times: str


class ModelKwargs(Part):
    """How the model was laid out."""

    embed_scale: Literal["exact", "bf16"]
    tp: Annotated[int, Field(ge=1, le=1024)]


class Frontend(Part):
    """Which model."""

    checkpoint: str
    model_kwargs: ModelKwargs


class Backend(Part):
    """What the artifact is for."""

    type: Literal["tvm_vacc", "onnxruntime"] = "tvm_vacc"
    dtype: Literal["fp32", "fp16", "bf16", "int8"]


class Split(Part):
    """Layers that begin a stage."""

    points: list[Index] = []


class ParitySection(Part):
    """Of the recipe."""

    text: str | None = None
    prompt_tokens: Size = 64
    decode_tokens: Count = 32


class RecipeOfArtifact(Part):
    """The recipe, resolved."""

    frontend: Frontend
    backend: Backend
    split: Split = Split()
    parity: ParitySection


class GateLine(Part):
    """One line of the gate."""

    comparison: str
    name: str
    value: Plain
    limit: Plain
    passed: bool


class Divergence(Part):
    """Where a gate failed."""

    text: str


class Gate(Part):
    """What the gate found."""

    summary: str
    passed: bool
    lines: list[GateLine]
    notes: list[str]
    divergence: Divergence | None


class Entry(Part):
    """An entry of the ledger."""

    what: str
    where: str
    why: str
    effect: dict[str, Any]


class Stage(Part):
    """What a stage of the compile took."""

    name: str
    seconds: float
    bytes: Bytes
    peak_rss_bytes: Bytes
    skipped: bool


class RescalingRecord(Part):
    """Powers of two of a float16 artifact."""

    exponents: dict[str, Annotated[int, Field(ge=-LARGEST_EXPONENT, le=LARGEST_EXPONENT)]]
    wide: list[str]
    absmax: dict[Point, float]


class Division(Part):
    """One rank of one stage."""

    folder: Annotated[str, Field(pattern=FOLDER)]
    stage: str
    layers: Annotated[list[Index], Field(min_length=2, max_length=2)]
    rank: Index
    ranks: Annotated[int, Field(ge=1, le=1024)]
    contract: PartContract


class Codes(Part):
    """How a matrix is stored."""

    model_config = ConfigDict(strict=True, extra="forbid")

    bits: Literal[4, 8] = 8
    groupsize: Size | None = None


class StorageRecord(Part):
    """How matrices are stored."""

    linears: Codes
    table: Codes | None
    kept_w8: list[str] = []


class Kernels(Part):
    """Which kernels a graph names."""

    integer: bool = False
    candidates: Count = 0
    wide: list[str] = []


class Activations(Part):
    """Which inputs of linears are rounded."""

    kept: list[str]


class Quantization(Part):
    """What the quantizer noted."""

    activations: Activations | None = None


class Sensitivity(Part):
    """What the model loses when one layer alone is quantized."""

    layers: Annotated[list[float], Field(max_length=1024)]
    table: float | None
    tokens: Count


class ManifestKeys(Part):
    """The keys that are read; a manifest holds more."""

    name: str
    scheme: str
    tool: dict[str, str]
    recipe: RecipeOfArtifact
    checkpoint: CheckpointOfArtifact
    model: Model
    contract: Contract
    parts: list[Division]
    op_census: dict[str, dict[str, Count]]
    files: dict[Inside, File]
    params: Annotated[list[Row], Field(min_length=1)]
    rescaling: RescalingRecord | None
    storage: StorageRecord | None
    parity: Gate | None
    ledger: list[Entry]
    stages: list[Stage]
    key: str | None = None
    int8_cache: bool = False
    kernels: Kernels | None = None
    quantization: Quantization | None = None
    sensitivity: Sensitivity | None = None


def manifest_problems(manifest: object) -> list[str]:
    """What is wrong with a manifest, a line for each key."""
    return problems_of(ManifestKeys, manifest)


def problems_of(kind: type[BaseModel], value: object) -> list[str]:
    """What is wrong with parsed JSON, a line for each key."""
    try:
        kind.model_validate(value)
    except ValidationError as error:
        found = []
        for one in error.errors(include_url=False, include_input=False, include_context=False)[:20]:
            key = ".".join(str(part)[:80] for part in one["loc"]) or "the file"
            found.append(f"{key}: {one['msg'].lower().removeprefix('value error, ')}")
        return found
    return []
