"""What the parameter file holds for a model and a scheme: names, shapes, dtypes, and where each value comes from.

Pure data, made from the config alone; the graphs name the same initializers. embed_scale is no parameter: it is a
constant inside the graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from gemma_deploy.checkpoint import ModelConfig, Rope, expected_tensors

Scheme = Literal["fp32", "fp16", "bf16", "w8a16"]
Dtype = Literal["float32", "float16", "bfloat16", "int8"]
Kind = Literal["cast", "int8_per_channel", "scale", "constant"]

ITEM_BYTES: dict[Dtype, int] = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
# Norm weights are float32 everywhere: the norm computes in float32.
MATRIX_DTYPE: dict[Scheme, Dtype] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "w8a16": "int8"}
ROTARY_DTYPE: dict[Scheme, Dtype] = {"fp32": "float32", "fp16": "float16", "bf16": "float32", "w8a16": "float32"}


@dataclass(frozen=True)
class ParamSpec:
    """One tensor to write. `source` is the checkpoint's tensor; constants have a `rope` instead."""

    name: str
    shape: tuple[int, ...]
    dtype: Dtype
    kind: Kind
    source: str | None = None
    rope: Rope | None = None

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def build_plan(config: ModelConfig, scheme: Scheme, context_length: int) -> tuple[ParamSpec, ...]:
    """Every parameter of the model in model order, then the rotary tables.

    Args:
        config: the model; a tied table appears once, under model.embed_tokens.
        scheme: w8a16 stores each matrix as int8 `X.weight` and float32 `X.scale`.
        context_length: positions the rotary half tables [context_length, head_dim / 2] cover.
    """
    specs: list[ParamSpec] = []
    for name, shape in expected_tensors(config).items():
        if len(shape) == 1:
            specs.append(ParamSpec(name, shape, "float32", "cast", name))
        elif scheme == "w8a16":
            scale = name.removesuffix("weight") + "scale"
            specs.append(ParamSpec(name, shape, "int8", "int8_per_channel", name))
            specs.append(ParamSpec(scale, shape[:1], "float32", "scale", name))
        else:
            specs.append(ParamSpec(name, shape, MATRIX_DTYPE[scheme], "cast", name))
    half = (context_length, config.head_dim // 2)
    for layer_type, rope in config.rope.items():
        for table in ("cos", "sin"):
            name = f"model.rotary_emb.{layer_type}.{table}"
            specs.append(ParamSpec(name, half, ROTARY_DTYPE[scheme], "constant", rope=rope))
    return tuple(specs)
