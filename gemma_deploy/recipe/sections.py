"""The schema of a recipe: one frozen class per section, one field per key.

`RecipeSections` is the whole of it; what its keys mean to the rest of the program is `spec_of` (spec.py).

A field marked `VENDOR` is interpreted by the vendor's compiler alone: it is carried into the manifest verbatim
and reported by `Recipe.vendor_keys`. What the keys mean together is in `rules.py`; what this version builds is in
`built.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from gemma_deploy import backends
from gemma_deploy.architectures import linear_kinds
from gemma_deploy.finetune.settings import FinetuneSettings
from gemma_deploy.schemes import QUANTIZE_TYPES, TABLES

if TYPE_CHECKING:
    QuantizeType: TypeAlias = str
    TableType: TypeAlias = str
    BackendType: TypeAlias = str
else:
    QuantizeType, TableType, BackendType = Literal[QUANTIZE_TYPES], Literal[tuple(TABLES)], Literal[backends.ROWS]

LARGEST_RANK = 1024  # of an adapter beside an artifact; above it, merging costs less than it saves
VENDOR = "interpreted by the vendor's compiler only; carried into the manifest"

MOST_WEIGHT = 1e9  # of an adapter

Positive = Annotated[int, Field(ge=1)]
VendorOnly = Annotated[Any, Field(description=VENDOR)]


def _known_linear(kind: str) -> str:
    if kind not in linear_kinds():
        raise PydanticCustomError("literal_error", "expected {expected}", {"expected": ", ".join(linear_kinds())})
    return kind


def _adapters(value: Any) -> Any:
    """A directory, or a list of directories or of `{path, weight}`."""
    parts = value if isinstance(value, list) else [] if value is None else [value]
    for part in parts:
        known = isinstance(value, list) and isinstance(part, dict) and part.keys() <= {"path", "weight"}
        path = part.get("path") if known else part
        weight = part.get("weight", 1) if known else 1
        if not isinstance(path, str) or not path or type(weight) not in (int, float) or not abs(weight) < MOST_WEIGHT:
            said = "a directory, or a list of directories or of {{path: DIRECTORY, weight: NUMBER}}"
            raise PydanticCustomError("adapter_type", said)
    if not parts and value is not None:
        raise PydanticCustomError("adapter_type", "at least one directory, or null")
    return value


LinearKind = Annotated[str, AfterValidator(_known_linear)]


class Section(BaseModel):
    """What all sections share: unknown keys refused, no silent conversion, no change after loading."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


class Shape(Section):
    """Shape of the graphs: `input_ids: [[P], [C]]`, prefill and context length, and the batch.

    With `dynamic` all three are free in the graphs; P and C are the largest.
    """

    input_ids: list[list[Positive]]
    batch: Positive = 1
    dynamic: bool = False


class ModelKwargs(Section):
    """How the patched model is built and laid out."""

    tp: Positive = 1
    b2s: bool = False
    model_arch: Literal["vacc"] = "vacc"
    align_qkv: bool = False
    embed_scale: Literal["exact", "bf16"] = "exact"
    split_embed: VendorOnly = None
    onnx_cache: VendorOnly = None
    from_onnx: VendorOnly = None
    build_visual: VendorOnly = None
    llm_build: VendorOnly = None
    seq_lens: VendorOnly = None
    dump_layers: VendorOnly = None
    cached_length: VendorOnly = None
    insert_slice: VendorOnly = None
    attention_split_num: VendorOnly = None
    ffn_split_num: VendorOnly = None


class CalibArgs(Section):
    """Settings of the calibrated quantizers (`percdamp` = `damp_percent`, `act_order` = `desc_act`).

    What is not given is chosen by the quantizer (quantization/solver.py). `groupsize` input channels share a scale; -1:
    one scale per row. `keep_a16` is the largest share of the linears, by multiplications, whose inputs w8a8 does not
    round. `keep_w8` are the kinds of linears that stay in 8 bits where w4a16 gives the others 4; null: k_proj and
    v_proj. `sensitivity` measures what each layer alone costs, for the report; null: where weights are calibrated.
    """

    true_sequential: bool = True
    percdamp: Annotated[float, Field(gt=0, lt=1)] | None = None
    act_order: bool | None = None
    wbits: Literal[4, 8, 16] | None = None
    blocksize: Positive = 128
    groupsize: Literal[-1, 32, 64, 128] | None = None
    sensitivity: bool | None = None
    keep_a16: Annotated[float, Field(ge=0, le=1)] | None = None
    keep_w8: list[LinearKind] | None = None
    onegroup: VendorOnly = None
    model_file_base_name: VendorOnly = None
    model_file_kv_name: VendorOnly = None


class Quantize(Section):
    """Scheme of the weights and of the KV cache; `table` is that of the token table and the LM head.

    `per_layer_table` is that of the table of per-layer vectors, where the model has one.
    """

    type: QuantizeType
    table: TableType | None = None
    per_layer_table: Literal["int8", "int4"] | None = None
    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")] = "cpu"
    calib_args: CalibArgs = CalibArgs()


class Frontend(Section):
    """Which model, and in what form.

    `adapter` is a directory that peft wrote, or a list of such, each alone or as `{path, weight}`.
    """

    checkpoint: Annotated[str, Field(min_length=1)]
    type: Literal["huggingface", "gguf"] = "huggingface"
    adapter: Annotated[str | list[Any] | None, BeforeValidator(_adapters)] = None
    shape: Shape
    model_kwargs: ModelKwargs = ModelKwargs()
    quantize: Quantize | None = None
    dtype: VendorOnly = None


class Split(Section):
    """Stages for several devices: `points: [6, 12]` begins a new one in front of layers 6 and 12."""

    points: list[Positive] = []


class Dataset(Section):
    """Text the calibrated quantizers look at: a data set or a mix, `c4:64,ceval:32,alpaca:32` (see mix.py)."""

    type: Literal["huggingface"] = "huggingface"
    name: Annotated[str, Field(min_length=1)] = "c4"
    path: Annotated[str, Field(min_length=1)] | None = None
    nsamples: Positive = 128
    seqlen: Positive = 1024
    sampler: VendorOnly = None
    process_ops: VendorOnly = None


class Graph(Section):
    """Additions to the vendor's graph."""

    extra_ops: VendorOnly = None


class Backend(Section):
    """What the artifact is for. `compile` holds the back end's own keys (`Backend.options` in backends/)."""

    type: BackendType = backends.DEFAULT
    dtype: Literal["fp32", "fp16", "bf16", "int8"]
    merge_params: bool = True
    compile: dict[str, Any] = {}
    device: VendorOnly = None
    quantize: VendorOnly = None
    merge_shapes: VendorOnly = None
    remove_params: VendorOnly = None
    dynamic_compile: VendorOnly = None


class Adapters(Section):
    """LoRA adapters that are loaded beside the artifact, and changed without reloading it: of at most this rank."""

    rank: Annotated[int, Field(ge=1, le=LARGEST_RANK)]


class Parity(Section):
    """The comparison that ends a compile."""

    text: Annotated[str, Field(min_length=1)] | None = None
    prompt_tokens: Positive = 64
    decode_tokens: Annotated[int, Field(ge=0)] = 32
    gate: bool = True


class Workspace(Section):
    """Where artifacts go, and what works on them.

    `workers`: tensors written at a time, and, where it is written down and more than one, processes that calibrate.
    `cluster`: a Ray cluster that calibrates in their place, `auto`, `HOST:PORT` or `ray://HOST:PORT`.
    """

    path: Annotated[str, Field(min_length=1)] = "./workspace"
    workers: Annotated[int, Field(ge=1, le=256)] = 2
    cluster: Annotated[str, Field(min_length=1)] | None = None
    env_recheck: VendorOnly = None
    pyenv: VendorOnly = None

    @property
    def processes(self) -> int:
        """Processes that calibrate: one unless the recipe says more (the default of `workers` is for writing)."""
        return self.workers if "workers" in self.model_fields_set else 1


class RecipeSections(Section):
    """All sections of a recipe."""

    name: Annotated[str, Field(min_length=1)]
    frontend: Frontend
    split: Split = Split()
    graph: Graph = Graph()
    dataset: Dataset = Dataset()
    backend: Backend
    adapters: Adapters | None = None
    parity: Parity = Parity()
    workspace: Workspace = Workspace()
    finetune: FinetuneSettings | None = None

    @property
    def prefill_length(self) -> int:
        """P: the length prompts are padded to."""
        return self.frontend.shape.input_ids[0][0]

    @property
    def context_length(self) -> int:
        """C: the slots of the KV cache."""
        return self.frontend.shape.input_ids[1][0]
