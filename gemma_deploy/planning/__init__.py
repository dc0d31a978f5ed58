"""What fits where: devices, what a model takes on them, how fast it may be, and the recipe to start with."""

from __future__ import annotations

# Precisions that are planned: name -> (backend.dtype, frontend.quantize.type).
PRECISIONS: dict[str, tuple[str, str | None]] = {
    "fp32": ("fp32", None),
    "bf16": ("bf16", None),
    "fp16": ("fp16", None),
    "w8a16": ("int8", "w8a16"),
    "w8a16_gptq": ("int8", "w8a16_gptq"),
    "w8a16_gptq+kv8": ("int8", "w8a16_gptq+kv8"),
    "w8a8": ("int8", "w8a8"),
    "w4a16_gptq": ("int8", "w4a16_gptq"),
}
