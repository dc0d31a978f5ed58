"""manifest.json: what an artifact is. Built once by a compile, read back whole or refused.

Every key is typed and bounded here, so that nothing below asks whether a key is there. `Manifest.of` takes plain JSON
values and refuses what is missing, unknown, of another type or out of bounds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_serializer,
    field_validator,
    model_serializer,
)
from pydantic_core import to_jsonable_python

from gemma_deploy.architectures import Drafting
from gemma_deploy.artifact.calibrated import CalibrationRecord
from gemma_deploy.bounds import Bytes, Count, Index, Inside, Layers, Plain, Size
from gemma_deploy.chat import known_format
from gemma_deploy.checkpoint.sentence import SentenceHead
from gemma_deploy.dtypes import DtypeName
from gemma_deploy.estimates import StageTiming
from gemma_deploy.graph.contract import AdapterSlots, Port
from gemma_deploy.params.table import ParamRow, ParamTable
from gemma_deploy.partition.parts import FOLDER
from gemma_deploy.quantization.rescaling import Rescaling
from gemma_deploy.schemes import Naming, Scheme, Storage

FORMAT_VERSION = 2  # 2: parts, and the file of every row
Ranks = Annotated[int, Field(ge=1, le=1024)]
Graph = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]


class Record(BaseModel):
    """Plain values that do not change."""

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        protected_namespaces=(),
        allow_inf_nan=False,
        ignored_types=(cached_property,),
    )


class Open(Record):
    """A record of which the keys that are read here are typed, and others are kept."""

    model_config = ConfigDict(extra="allow")


class FileFacts(Record):
    """A file: its size, and sha256 or, of a parameter file, "rows:" and the digest of its rows."""

    bytes: Bytes
    sha256: str


class AdapterRecord(Record):
    """An adapter that was added to the weights: its directory's name, what its products were multiplied by."""

    path: str
    weight: Plain
    fingerprint: str


class ArrivedRecord(Record):
    """Matrices that the checkpoint has in one quantized form, and whether they were taken over; why not, if not."""

    form: str
    matrices: Count
    taken_over: bool
    why: str | None


class CheckpointRecord(Record):
    """Where the weights came from: the directory's or file's name, and what it held, adapters included."""

    path: str
    format: str
    fingerprint: str
    fingerprint_without_times: str
    adapters: tuple[AdapterRecord, ...] = ()
    arrived: tuple[ArrivedRecord, ...] = ()

    @model_serializer(mode="wrap")
    def _without_floats(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in plain(self).items() if key != "arrived" or value}


class ModelKwargs(Open):
    """`frontend.model_kwargs`."""

    embed_scale: Literal["exact", "bf16"]
    tp: Ranks


class FrontendRecord(Open):
    """`frontend`."""

    checkpoint: str
    adapter: str | list[Any] | None = None
    model_kwargs: ModelKwargs


class BackendRecord(Open):
    """`backend`: a name in `backends.ROWS`."""

    type: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")] = "tvm_vacc"
    dtype: Literal["fp32", "fp16", "bf16", "int8"]


class ProofRecord(Open):
    """`parity`."""

    text: str | None = None
    prompt_tokens: Size = 64
    decode_tokens: Count = 32


class SplitRecord(Open):
    """`split`: layers that begin a stage."""

    points: tuple[Index, ...] = ()


class RecipeRecord(Open):
    """The recipe with all defaults."""

    frontend: FrontendRecord
    backend: BackendRecord
    parity: ProofRecord
    split: SplitRecord = SplitRecord()


class ModelRecord(Open):
    """The model's config as it was understood; `sentence` of an encoder, `drafting` of a drafter."""

    model_type: str
    num_hidden_layers: Layers
    num_key_value_heads: Size
    vocab_size: Size
    hidden_size: Size
    max_position_embeddings: Size
    tie_word_embeddings: bool
    eos_token_ids: tuple[Count, ...]
    sentence: SentenceHead | None = None
    drafting: Drafting | None = None

    @model_serializer(mode="wrap")
    def _without_what_has_no_value(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        none = ("sentence", "drafting")
        return {key: value for key, value in plain(self).items() if key not in none or value is not None}


class GraphRecord(Record):
    """What a graph takes and gives."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


class ContractRecord(Open):
    """Sizes of the graphs, see `graph.contract.GraphContract`; a back end adds its own.

    Args:
        logits: of ONNX Runtime's graph: of the `last` token or of `all`.
        not_for: what a caller may try that is refused or goes wrong, as sentences; None of graphs that say nothing.
        adapters: what it takes of a LoRA adapter at run time; None: nothing.
        geometry: KV heads and head_dim of each layer of the model, 0 where it has no cache; None where all are alike.
        panels: whether matrices lie in panels in the parameter file (params/panels.py); None: no.
        candidates: of a head whose codes lie in two planes, how many rows are read whole for a token; None: all.
        naming: what tensors are called in the parameter file (params/naming.py); None: as here.
        cache_dtype: of keys and values.
        input_group: inputs of products with codes that share a scale where they are rounded; None: they are not.
        triple, cpu: LLVM's words for what a library was compiled for; None: there is none.
    """

    batch: Size
    prefill: Size
    context: Size
    vocab_size: Size
    kv_heads: Size
    head_dim: Size
    dynamic: bool
    logits: str | None = None
    not_for: tuple[str, ...] | None = None
    adapters: AdapterSlots | None = None
    geometry: tuple[tuple[Count, Count], ...] | None = None
    panels: bool | None = None
    candidates: Size | None = None
    naming: Naming | None = None
    cache_dtype: DtypeName = "float32"
    input_group: Size | None = None
    triple: str | None = None
    cpu: str | None = None
    graphs: dict[Graph, GraphRecord]

    @model_serializer(mode="wrap")
    def _without_what_has_no_value(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in plain(self).items() if value is not None}


class PartRecord(Record):
    """One rank of one stage: its folder and its layers [start, stop)."""

    folder: Annotated[str, Field(pattern=FOLDER)]
    stage: str
    layers: tuple[Index, Index]
    rank: Index
    ranks: Ranks
    contract: ContractRecord


class Activations(Record):
    """Inputs of linears are rounded to `bits` inside the graphs, but those of `kept`."""

    bits: Count = 8
    kept: tuple[str, ...]


class QuantizationRecord(Record):
    """What a calibrated quantizer was told and what came of each layer."""

    settings: dict[str, Any] = {}
    layers: tuple[dict[str, Any], ...] = ()
    table: dict[str, Any] = {}
    activations: Activations | None = None


class KernelsRecord(Open):
    """Which kernels a graph names, as in backends/onnxruntime/options.py; `wide` are the linears `in_14_bits` there."""

    block: Size = 128
    integer: bool = False
    candidates: Count = 0
    wide: tuple[str, ...] = ()


class LineRecord(Open):
    """One line of the gate: what was compared, the value, its limit, and whether it holds."""

    comparison: str
    name: str
    value: Plain
    limit: Plain
    passed: bool


class DivergenceRecord(Open):
    """The first module at which two models differ by more than the tolerance."""

    text: str


class GateRecord(Open):
    """The gate's result."""

    passed: bool
    summary: str
    lines: tuple[LineRecord, ...]
    notes: tuple[str, ...] = ()
    effect: dict[str, Any] = {}
    divergence: DivergenceRecord | None = None
    measures: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class LedgerEntry:
    """One allowed difference. `effect` holds measured figures, empty where the gate did not run."""

    what: str
    where: str
    why: str
    effect: dict[str, Any] = field(default_factory=dict)


class SensitivityRecord(Open):
    """What each layer alone costs, and the token table: mean KL in nats a token."""

    layers: Annotated[tuple[float, ...], Field(max_length=1024)]
    table: float | None
    tokens: Count


class Manifest(Record):
    """An artifact.

    Args:
        key: of everything it holds but what is measured about it; keys: of each stage (stages/keys.py), of those that
            measure only where they ran.
        carried_for_the_vendor: recipe keys that are not interpreted.
        chat_format: a name in `chat.FORMATS`; None: the model has no chat template, or an earlier version made it.
        storage: what matrices are stored as, None where they are not codes.
        parts: of a divided artifact; () otherwise.
        op_census: graph -> operator -> number of nodes.
        calibration: the text that was looked at.
        kernels: what the back end chose, None where the choice is not its own.
        parity: the gate's result; None: nothing was proven.
        files: every file but this one.
    """

    format_version: int
    name: str
    key: str
    tool: dict[str, str]
    recipe: RecipeRecord
    carried_for_the_vendor: tuple[str, ...] = ()
    checkpoint: CheckpointRecord
    model: ModelRecord
    chat_format: Annotated[str, AfterValidator(known_format)] | None = None
    scheme: str
    int8_cache: bool = False
    storage: Storage | None
    contract: ContractRecord
    parts: tuple[PartRecord, ...]
    op_census: dict[str, dict[str, Count]]
    calibration: CalibrationRecord | None = None
    quantization: QuantizationRecord | None = None
    params: Annotated[tuple[ParamRow, ...], Field(min_length=1)]
    rescaling: Rescaling | None
    kernels: KernelsRecord | None = None
    sensitivity: SensitivityRecord | None = None
    parity: GateRecord | None
    stages: tuple[StageTiming, ...]
    ledger: tuple[LedgerEntry, ...]
    files: dict[Inside, FileFacts]
    keys: dict[str, str] = {}

    @field_serializer("storage")
    def _without_usual_scales(self, storage: Storage | None) -> dict[str, Any] | None:
        return None if storage is None else storage.to_json()

    @field_validator("scheme")
    @classmethod
    def _known_scheme(cls, scheme: str) -> str:
        return Scheme(scheme).weights

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Manifest:
        """From plain JSON values.

        Raises:
            ValidationError: naming every key that is missing, unknown or of another type.
        """
        return cls.model_validate_json(json.dumps(values))

    def to_json(self) -> dict[str, Any]:
        """The manifest as it is written into manifest.json: dicts, lists, strings, numbers."""
        return self.model_dump(mode="json")

    def but(self, **changes: Any) -> Manifest:
        """The same with other values, each as JSON or of its field's type."""
        return self.of(self.to_json() | {key: to_jsonable_python(value) for key, value in changes.items()})

    def measured(self, stage: str, key: str, **results: Any) -> Manifest:
        """The same with what a stage measured, and its key."""
        return self.but(keys=self.keys | {stage: key}, **results)

    @property
    def naming(self) -> Naming:
        """What tensors are called in the parameter file."""
        return self.contract.naming or "own"

    @cached_property
    def table(self) -> ParamTable:
        """Of all parameter files."""
        return ParamTable(self.params)

    @cached_property
    def folders(self) -> tuple[str, ...]:
        """Where graphs lie: those of the parts, or the artifact's own, ""."""
        return tuple(part.folder for part in self.parts) or ("",)

    @property
    def embed_scale(self) -> str:
        """Rounding of the embedding scale: `exact` or `bf16`."""
        return self.recipe.frontend.model_kwargs.embed_scale

    @property
    def activations(self) -> Activations | None:
        """Of w8a8: which inputs of linears are rounded inside the graphs."""
        return None if self.quantization is None else self.quantization.activations

    @property
    def whole_scheme(self) -> Scheme:
        """How weights and cache are kept."""
        return Scheme(self.scheme, self.int8_cache)
