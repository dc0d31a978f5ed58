"""The gates of a model for OpenVINO."""

from __future__ import annotations

from gemma_deploy.backends.openvino.source import SHIPPED, STRICT
from gemma_deploy.parity.gates import GATES, Gate, near
from gemma_deploy.schemes import QUANTIZERS

# What OpenVINO adds to the numbers of the model. Real 270M, w8a16, 636 positions, its window is 512:
BFLOAT16_KL = 0.002  # activations in bfloat16, where the processor has instructions for it: 5.2e-4; in float32 4e-9
CACHE_KL = 2e-4  # a cache of 8-bit codes: 3.7e-5
ROUNDED_KL = 0.01  # inputs of products rounded to 8 bits, a scale for 32 of them: 2.5e-3


def openvino_gates(scheme: str, cache_dtype: str, *, rounded: bool) -> tuple[Gate, ...]:
    """The model in float32 on the weights that it holds, as any artifact; then what a user runs.

    Args:
        cache_dtype: of keys and values; rounded: inputs of products with codes are rounded to 8 bits.
    """
    quantizer, reference = QUANTIZERS.get(scheme), "hf bf16" if scheme == "bf16" else "hf"
    adds = BFLOAT16_KL + CACHE_KL * (cache_dtype == "uint8") + ROUNDED_KL * (rounded and quantizer is not None)
    limit = adds + (quantizer.kl_limit if quantizer else 0)
    return (*GATES[scheme], *near((reference, SHIPPED), limit), *near((STRICT, SHIPPED), adds))
