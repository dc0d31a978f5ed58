"""How an artifact keeps its numbers: `Scheme`, the table of quantizers, and the form in which codes are stored.

`Scheme.parse` is the one place that reads a quantize type; everybody else asks the scheme. A new quantizer is a solver
in a file of its own and a row in `QUANTIZERS`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, cast

from gemma_deploy.architectures import cached_kinds
from gemma_deploy.bounds import Size
from gemma_deploy.names import (
    PER_LAYER_PROJECTION,
    PER_LAYER_TABLE,
    PLE_PROJECTION,
    STREAM_PROJECTION,
    STREAM_UNEMBED,
    TOKEN_PROJECTION,
)

Bits = Literal[4, 8]
Naming = Literal["own", "compressed-tensors", "gguf", "openvino"]
ScaleDtype = Literal["float32", "float16", "bfloat16"]
SMALLEST_BLOCK = 16  # of MatMulNBits
# What stays in 8 bits where the other linears have 4: few rows, which every query head reads. Real 270M, all linears in
# groups of 32 to nearest, 8 windows of WikiText-2: perplexity +57.5 %; without v_proj +33.8 %, without k_proj +53.5 %,
# each 2.9 % of the linears; without down_proj, 23.5 % of them, +37.5 %.
KEPT_W8: tuple[str, ...] = cached_kinds()
# Narrow, and what they give goes into the stream. A tiny random E2B, KL: w4a16_gptq 0.0158, w4a16_rtn 0.0270; with
# these in 4 bits too 0.0216 and 0.0332. No weights of a trained one were at hand.
KEPT_PER_LAYER = ("per_layer_input_gate", "per_layer_projection")
# These have 8 bits and a scale for each row, whatever the others have: matrices of no layer, and kinds of low rank.
WHOLE_ROWS = (PER_LAYER_PROJECTION, PLE_PROJECTION, STREAM_PROJECTION, STREAM_UNEMBED)
LOW_RANK = ("linear_left", "linear_right")


def is_kept(module: str, kinds: Collection[str]) -> bool:
    """Whether a linear, by its path or kind, is of those kinds."""
    return module.rpartition(".")[2] in kinds


@dataclass(frozen=True)
class Codes:
    """Symmetric integer codes.

    Args:
        bits: of a code.
        groupsize: input channels that share a scale; None for one scale per row.
        scales: the type that every scale is a number of, and has in the file.
    """

    bits: Bits = 8
    groupsize: Size | None = None
    scales: ScaleDtype = "float32"

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Scales of a matrix [rows, columns], or of several: [..., rows], or [..., rows, groups]."""
        return shape[:-1] if self.groupsize is None else (*shape[:-1], shape[-1] // self.groupsize)

    def __str__(self) -> str:
        return f"int{self.bits} per row" + (f" and group of {self.groupsize}" if self.groupsize else "")


@dataclass(frozen=True)
class Storage:
    """What the matrices of an int8 artifact are stored as.

    Args:
        linears: those of the decoder layers.
        table: the token table and the LM head; None for float16.
        kept_w8: kinds of linears that have 8 bits whatever the others have, with the same groups.
        per_layer: the table of per-layer vectors; None where there is none.
    """

    linears: Codes = Codes()
    table: Codes | None = Codes()
    kept_w8: tuple[str, ...] = ()
    per_layer: Codes | None = None

    def linear(self, module: str) -> Codes:
        """Codes of one linear, by its path or kind."""
        if is_kept(module, LOW_RANK):
            return Codes()
        return replace(self.linears, bits=8) if is_kept(module, self.kept_w8) else self.linears

    def of(self, module: str) -> Codes | None:
        """Codes of a linear, a table or the LM head, by its path; None for float16."""
        if module == PER_LAYER_TABLE:
            return self.per_layer
        if module == TOKEN_PROJECTION:  # 0.15 % of EmbeddingGemma 2, and everything passes through it
            return None
        if module.startswith(WHOLE_ROWS):
            return Codes()
        return self.linear(module) if ".layers." in module else self.table

    @property
    def linears_text(self) -> str:
        """How linears are stored, for people."""
        if not self.kept_w8:
            return f"linears {self.linears}"
        return f"linears {self.linears}, {' and '.join(self.kept_w8)} {replace(self.linears, bits=8)}"

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        values = asdict(self, dict_factory=_without_default_scales) | {"kept_w8": list(self.kept_w8)}
        return values if self.per_layer else {key: value for key, value in values.items() if key != "per_layer"}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Storage:
        """The inverse of `to_json`."""
        table = None if values["table"] is None else Codes(**values["table"])
        vectors = Codes(**values["per_layer"]) if values.get("per_layer") else None
        return cls(Codes(**values["linears"]), table, tuple(values.get("kept_w8", ())), vectors)


def _without_default_scales(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: value for key, value in pairs if (key, value) != ("scales", "float32")}


@dataclass(frozen=True)
class CodeForm:
    """How codes lie in the parameter file.

    Args:
        unsigned: with a zero point in the middle of their range, as ONNX Runtime's kernels want them.
        transposed: those of linears [in, out] instead of [out, in], and signed: the right operand of an integer
        product.
        panels: matrices of floats as well, and their scales, lie in panels of 16 rows (params/panels.py).
        planes: those of the LM head lie in two planes, their high and their low halves.
        experts_transposed: those of experts [experts, in, out], and their scales [experts, groups, out]; of 8 bits
            signed, of 4 as `unsigned` says, pairs along the outputs.
        cache_scales: codes of an int8 cache have steps that are fixed beforehand, one for each channel; else channels
            are divided by factors, and steps are made with the codes.
        floats: what matrices are that are no codes where others are.
        rotary: the tables of cosines and sines are in the file.
        naming: what tensors are called in the file (params/naming.py), and of gguf what lies around them: codes in
            blocks behind their scales (params/blocks.py), gains of norms as what they multiply by.
    """

    unsigned: bool = False
    transposed: bool = False
    panels: bool = False
    planes: bool = False
    experts_transposed: bool = False
    cache_scales: bool = False
    floats: Literal["float16", "bfloat16"] = "float16"
    rotary: bool = True
    naming: Naming = "own"

    @property
    def blocks(self) -> bool:
        """Whether codes lie in blocks, each behind its scale."""
        return self.naming == "gguf"


# Names in recipes (`frontend.quantize.table`).
TABLES: Mapping[str, Codes | None] = {
    "int8": Codes(),
    "int8_g128": Codes(8, 128),
    "int8_g64": Codes(8, 64),
    "int8_g32": Codes(8, 32),
    "fp16": None,
}
# Names in recipes (`frontend.quantize.per_layer_table`): bits, and columns that share a scale, at most.
PER_LAYER_TABLES: Mapping[str, tuple[Bits, int]] = {"int8": (8, 128), "int4": (4, 32)}


@dataclass(frozen=True)
class Quantizer:
    """How codes are chosen, and how much of the model may be lost by it.

    Args:
        bits: of a code.
        calibrated: weights are chosen by what the model gives on calibration text; else rounded to nearest as they are.
        compensate: rounding moves errors onto later columns (GPTQ).
        groupsize: see `Codes`, unless the recipe says another.
        activations: the inputs of linears are rounded as well, to 8 bits with a scale per token.
        kl_limit: largest mean KL to float32 that the gate lets pass, nats a token.
        perplexity_limit: largest relative change of the perplexity.
        kernels_kl_limit: as `kl_limit`, with kernels that round activations besides.
    """

    bits: Bits
    calibrated: bool
    compensate: bool
    groupsize: int | None
    kl_limit: float
    perplexity_limit: float
    kernels_kl_limit: float
    activations: bool = False


# Limits: docs/proof-and-ledger.md says what the real 270M loses. Those of 4 bits are about twice that: w4a16_rtn with
# its linears rounded (none taken over) and table int8_g64 has KL 0.33, perplexity +24 %, and KL 0.57 with kernels.
QUANTIZERS: Mapping[str, Quantizer] = {
    "w8a16": Quantizer(8, False, False, None, 0.01, 0.005, 0.02),
    "w8a16_gptq": Quantizer(8, True, True, None, 0.005, 0.005, 0.015),
    "w8a8": Quantizer(8, True, True, None, 0.016, 0.016, 0.02, activations=True),
    "w4a16_rtn": Quantizer(4, False, False, 32, 0.7, 0.5, 1.0),
    "w4a16": Quantizer(4, True, False, 32, 0.5, 0.5, 0.6),
    "w4a16_gptq": Quantizer(4, True, True, 32, 0.3, 0.3, 0.35),
}
FLOATS = ("fp32", "fp16", "bf16")
KV8, FLOAT_KV8 = "+kv8", "w16kv8"
QUANTIZE_TYPES = (*QUANTIZERS, FLOAT_KV8, *(f"{weights}{KV8}" for weights in QUANTIZERS))
# What parameters and graphs look like; `w8a16_folded` has factors of columns folded into norms and rows.
Form = Literal["fp32", "bf16", "fp16", "w8a16", "w8a16_folded"]


@dataclass(frozen=True)
class Scheme:
    """How an artifact keeps weights and the KV cache.

    Args:
        weights: fp32, fp16, bf16, or a row of `QUANTIZERS`.
        int8_cache: keys and values are kept as 8-bit codes.
    """

    weights: str
    int8_cache: bool = False

    def __post_init__(self) -> None:
        if self.weights not in FLOATS and self.weights not in QUANTIZERS:
            raise ValueError(f"no such scheme: {self.weights!r}")

    @classmethod
    def parse(cls, dtype: str, quantize_type: str | None) -> Scheme:
        """What `backend.dtype` and `frontend.quantize.type` of a recipe say together.

        int8 alone means w8a16. The 16 bits of w16kv8 are those of the dtype; of int8, which then speaks of the cache
        alone, float16.
        """
        if quantize_type is None:
            return cls("w8a16" if dtype == "int8" else dtype)
        if quantize_type == FLOAT_KV8:
            return cls("fp16" if dtype == "int8" else dtype, int8_cache=True)
        return cls(quantize_type.removesuffix(KV8), int8_cache=quantize_type.endswith(KV8))

    def __str__(self) -> str:
        """As a recipe writes it: `w8a16_gptq+kv8`, `w16kv8`, `fp32`."""
        if not self.int8_cache:
            return self.weights
        return f"{self.weights}{KV8}" if self.codes else FLOAT_KV8

    @property
    def quantizer(self) -> Quantizer | None:
        """How codes are chosen; None where matrices are floats."""
        return QUANTIZERS.get(self.weights)

    @property
    def codes(self) -> bool:
        """Whether matrices are stored as integer codes with scales."""
        return self.weights in QUANTIZERS

    @property
    def calibrated(self) -> bool:
        """Whether the weights are chosen by looking at calibration text."""
        return self.quantizer is not None and self.quantizer.calibrated

    @property
    def calibrates(self) -> bool:
        """Whether calibration text decides anything that is stored: weights, or factors of an int8 cache."""
        return self.calibrated or self.int8_cache

    @property
    def rounds_activations(self) -> bool:
        """Whether the inputs of linears are rounded in the graph."""
        return self.quantizer is not None and self.quantizer.activations

    @property
    def form(self) -> Form:
        """What parameters and graphs look like."""
        if not self.codes:
            return cast(Form, self.weights)
        return "w8a16_folded" if self.calibrated else "w8a16"


def storage_of(
    scheme: str,
    hidden_size: int,
    groupsize: int | None = None,
    *,
    table: str | None = None,
    kept_w8: Sequence[str] | None = None,
) -> Storage:
    """What the matrices of a scheme are stored as.

    Args:
        hidden_size: columns of the table.
        groupsize: the recipe's; -1 for one scale per row, None for the scheme's own.
        table: the recipe's, one of `TABLES`; None for int8 per row (to nearest) or, in calibrated schemes, the largest
            groups up to 128 that divide it.
        kept_w8: the recipe's; None for `KEPT_W8` where linears have 4 bits.
    """
    quantizer = QUANTIZERS.get(scheme)
    if quantizer is None or not (quantizer.calibrated or quantizer.bits == 4):
        return Storage(Codes(), TABLES[table or "int8"])
    size = quantizer.groupsize if groupsize is None or quantizer.activations else groupsize
    kept = () if quantizer.bits == 8 else KEPT_W8 if kept_w8 is None else tuple(kept_w8)
    codes = Codes(quantizer.bits, None if size == -1 else size)
    return Storage(codes, TABLES[table or (dividing_table(hidden_size) if quantizer.calibrated else "int8")], kept)


def dividing_group(size: int, most: int = 128) -> int:
    """The largest power of two up to `most` that divides a vector: columns that share a scale."""
    return math.gcd(size, most)


def dividing_table(hidden_size: int) -> str:
    """Of `TABLES`, the form with the largest groups that divide the table's columns."""
    return next((f"int8_g{size}" for size in (128, 64, 32) if hidden_size % size == 0), "int8")


def block_problems(linears: Mapping[str, int]) -> list[str]:
    """Matrices that ONNX Runtime's block kernel would have to pad, as sentences about the model.

    Args:
        linears: input channels of each kind of linear.
    """
    wrong = [f"{name} ({columns})" for name, columns in linears.items() if columns % SMALLEST_BLOCK]
    if not wrong:
        return []
    return [
        f"backend.type: onnxruntime wants multiples of {SMALLEST_BLOCK} input channels in int8, got "
        + ", ".join(wrong)
        + ": set backend.dtype: fp32"
    ]


def group_problems(storage: Storage, linears: Mapping[str, int], hidden_size: int) -> list[str]:
    """Groups that do not divide a matrix, as sentences about recipe keys.

    Args:
        linears: input channels of each kind of linear, those of one rank where it is divided by columns.
    """
    problems = []
    size = storage.linears.groupsize
    in_groups = {name: columns for name, columns in linears.items() if not set(name.split(", ")) <= {*LOW_RANK}}
    wrong = [f"{name} ({columns})" for name, columns in in_groups.items() if size and columns % size]
    if wrong:
        problems.append(
            f"frontend.quantize.calib_args.groupsize: {size} does not divide the input channels of " + ", ".join(wrong)
        )
    size = storage.table.groupsize if storage.table else None
    if size and hidden_size % size:
        problems.append(f"frontend.quantize.table: groups of {size} do not divide the hidden_size {hidden_size}")
    return problems
