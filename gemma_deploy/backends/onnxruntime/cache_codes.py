"""Caches of 8-bit codes: `+kv8` in ONNX Runtime.

GroupQueryAttention rounds keys and values where it writes them, and reads codes alone, those of new tokens too (ONNX
Runtime 1.32, CPU). A channel's step is fixed: the largest magnitude that calibration saw, by 127. What goes beyond
is the last code. Keys are rounded normed and turned. cache_proof.py proves it.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

ATTENTION = "GroupQueryAttention"
PARTS = ("key", "value")
PAST, PRESENT = "past_key_values", "present"
SCALES = (12, 13)  # inputs of the operator, of keys and values
KINDS = ("k_quant_type", "v_quant_type", "kv_cache_bit_width")


def int8_attributes() -> dict[str, Any]:
    """What GroupQueryAttention is told of its caches."""
    return dict(zip(KINDS, ("PER_CHANNEL", "PER_CHANNEL", 8), strict=True))


def holds_codes(model: ir.Model) -> bool:
    """Whether caches of a graph hold codes."""
    return any(value.dtype == ir.DataType.INT8 for value in model.graph.inputs if is_cache(value))


def float_caches(model: ir.Model) -> None:
    """Let caches of codes hold the keys and values themselves. In place; nothing where they do."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        if is_cache(value) and value.dtype == ir.DataType.INT8:
            value.type = ir.TensorType(ir.DataType.FLOAT)
    for node in model.graph:
        if node.op_type == ATTENTION and KINDS[0] in node.attributes:
            for name in KINDS:
                del node.attributes[name]
            for index in SCALES:
                node.replace_input_with(index, None)


def is_cache(value: ir.Value) -> bool:
    """Whether a value is a cache that goes in or comes out."""
    return str(value.name).startswith((f"{PAST}.", f"{PRESENT}."))
