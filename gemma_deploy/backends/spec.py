"""What is to be built, whatever file asked for it: numbers and choices that hold for any checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict

from gemma_deploy.architectures import PerLayerTable
from gemma_deploy.schemes import (
    KEPT_PER_LAYER,
    PER_LAYER_TABLES,
    Codes,
    ScaleDtype,
    Scheme,
    Storage,
    dividing_group,
    dividing_table,
    storage_of,
)


class Options(BaseModel):
    """Keys of `backend.compile` that a back end reads: it declares them in a class of its own, typos are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


# Keys of `backend.compile` in the vendor's own recipes (Vastai/VastModelZOO): carried into the manifest by every back
# end, so that such a recipe can be compiled for another one.
VENDOR_KEYS = frozenset({
    "attention_split_num", "cluster_mode", "data_transport_mode", "data_type", "enable_float_to_half",
    "enable_graph_partition", "ffn_split_num", "gather_data_vccl_dsp_enable", "mem_inplace", "nearest_interpol_on_dsp",
    "opt_level", "output_ddr", "output_layout", "overflow_adaptive", "quantize_dsp_ops", "requant_suppress",
    "skip_conv_layers", "skip_matmul_layers", "split_convergence_points", "stream_mode", "switch_lhs_rhs",
})  # fmt: skip
AnyOptions = TypeVar("AnyOptions", bound=Options)


def read_options(kind: type[AnyOptions], given: Mapping[str, Any]) -> AnyOptions:
    """The options in `backend.compile`, without the vendor's keys.

    Raises:
        ValidationError: a key that is not known, or a value of another kind.
    """
    return kind.model_validate({key: value for key, value in given.items() if key not in VENDOR_KEYS})


@dataclass(frozen=True)
class CodeDefaults:
    """What a back end wants of codes where a recipe says nothing, and of their scales in any case.

    Args:
        table: form of token table and LM head, one of `schemes.TABLES`; None for the scheme's.
        table_in_groups: the scheme's has groups of columns where it would have a scale for each row.
        keep_w8: kinds of linears that keep 8 bits where the others have 4; None for the scheme's.
        scales: the type that every scale is a number of.
        groupsize: input channels that share a scale, in every matrix of codes; None for the scheme's.
    """

    table: str | None = None
    table_in_groups: bool = False
    keep_w8: tuple[str, ...] | None = None
    scales: ScaleDtype = "float32"
    groupsize: int | None = None

    def applied(self, codes: Codes) -> Codes:
        """Codes as they have to be here."""
        return replace(codes, scales=self.scales, groupsize=self.groupsize or codes.groupsize)


@dataclass(frozen=True)
class BuildSpec:
    """One artifact to be made.

    Args:
        backend: `backend.type` of a recipe; options: what its own section says.
        scheme: how weights and cache are kept.
        prefill: P, tokens that prompts are padded to; context: C, slots of the KV cache; batch: B, sequences together.
        dynamic: batch and lengths are free in the graphs.
        split_points: layers that begin a new stage; ranks: of every stage, tensor-parallel.
        align_qkv: KV heads may be repeated where `ranks` does not divide them.
        b2s: the batch-to-sequence layout was asked for.
        embed_scale: `exact` or `bf16`, rounding of the embedding scale.
        groupsize: input channels that share a scale; -1 for one per row, None for the scheme's own.
        table: form of token table and LM head, one of `schemes.TABLES`; None for the default.
        per_layer_table: form of the table of per-layer vectors, one of `schemes.PER_LAYER_TABLES`; None for int8.
        keep_w8: kinds of linears that keep 8 bits where the others have 4; None for the default.
        code_defaults: what the back end wants of codes.
        adapter_rank: the largest rank of a LoRA adapter that is loaded beside the artifact; None: it takes none.
        own_storage: what matrices are stored as, where it follows a checkpoint's own codes.
    """

    backend: str
    options: Options
    scheme: Scheme
    prefill: int
    context: int
    batch: int = 1
    dynamic: bool = False
    split_points: tuple[int, ...] = ()
    ranks: int = 1
    align_qkv: bool = False
    b2s: bool = False
    embed_scale: str = "exact"
    groupsize: int | None = None
    table: str | None = None
    per_layer_table: str | None = None
    keep_w8: tuple[str, ...] | None = None
    code_defaults: CodeDefaults = CodeDefaults()
    adapter_rank: int | None = None
    own_storage: Storage | None = None

    def storage(self, hidden_size: int, per_layer: PerLayerTable | None = None) -> Storage:
        """What matrices are stored as in a model of this width; of codes only.

        Args:
            per_layer: the vectors that layers add; groups of columns of their table do not reach into the next one.
        """
        if not self.scheme.codes:
            return Storage()
        wanted, table = self.code_defaults, self.table or self.code_defaults.table
        if table is None and wanted.table_in_groups:
            table = dividing_table(hidden_size)
        kept_w8 = wanted.keep_w8 if self.keep_w8 is None else self.keep_w8
        made = self.own_storage or storage_of(
            self.scheme.weights, hidden_size, self.groupsize, table=table, kept_w8=kept_w8
        )
        made = replace(made, linears=wanted.applied(made.linears))
        if made.table is not None:
            made = replace(made, table=wanted.applied(made.table))
        if per_layer is None:
            return made
        kept = () if made.linears.bits == 8 else KEPT_PER_LAYER
        bits, group = PER_LAYER_TABLES[self.per_layer_table or "int8"]
        vectors = Codes(bits, dividing_group(per_layer.size, group)) if per_layer.rows else None
        return replace(made, kept_w8=(*made.kept_w8, *kept), per_layer=vectors)

    @property
    def whole_rows(self) -> bool:
        """Whether codes of linears have 8 bits and one scale per row, as integer products want them."""
        if not self.scheme.codes:
            return False
        linears = self.storage(0).linears
        return linears.bits == 8 and linears.groupsize is None


def embedding_scale(hidden_size: int, rounding: str) -> float:
    """sqrt(hidden_size) in float32, by way of bfloat16 where `rounding` (`BuildSpec.embed_scale`) is "bf16"."""
    root = np.float32(math.sqrt(hidden_size))
    if rounding == "bf16":
        import ml_dtypes

        root = np.float32(root.astype(ml_dtypes.bfloat16))
    return float(root)
