"""The gates of an artifact of `backend.type: native`."""

from __future__ import annotations

from dataclasses import replace

from gemma_deploy.parity.gates import ADAPTER_LIMIT, BFLOAT16_KL, FOLDED_LIMIT, GATES, PEFT, Gate, near, relative
from gemma_deploy.schemes import QUANTIZERS

# What the kernels round: activations to 15 bits, keys and values to bfloat16. Real 270M, 64 positions behind its
# window: 2.8e-5 with float32 weights, nearly all of it the cache.
KERNELS_KL = 5e-4
MOST_OVERTURNED = 0.5
# What an int8 cache may add. Real 270M, 616 positions, factors from eight windows of C4: 5.3e-4.
CACHE_KL = 0.002
# What activations of 8 bits may add where calibration made most inputs fit for them (w8a8). Real 270M, 2,048 positions:
# 5.7e-4 in groups of 128, 1.7e-3 with one scale for a token.
ROUNDED_KL = 0.002
# What a screened head may add. Real 270M, 2,560 positions of WikiText-2: 3.8e-4 with 8,192 rows read whole; 128 others,
# of which one has activations 15 times as large as usual: 8.3e-4.
SCREEN_KL = 0.002
# Float32 products of calibrated codes of 4 bits: on random tokens such a model enlarges what float32 rounds. Real 270M,
# 732 random tokens, last hidden states against transformers in float64: 3.9e-6 here, 6.1e-6 transformers in float32;
# logits of these two are 2.0e-5 apart, on text 2.2e-6.
FOUR_BITS_LIMIT = 4e-5


def native_gates(scheme: str, int8_cache: bool = False, *, screened: bool = False) -> tuple[Gate, ...]:
    """The plan with float32 products on the weights that it holds, as any artifact; then what the kernels round.

    Args:
        screened: whether logits of all but the likeliest tokens are those of the high half of every code.
    """
    quantizer, reference = QUANTIZERS.get(scheme), "hf bf16" if scheme == "bf16" else "hf"
    kernels = KERNELS_KL + CACHE_KL * int8_cache + SCREEN_KL * screened
    if quantizer is not None and quantizer.activations:
        kernels += ROUNDED_KL
    limit = kernels + (quantizer.kl_limit if quantizer else 0)
    shared = GATES[scheme]
    if quantizer is not None and quantizer.bits == 4 and quantizer.calibrated:
        own = (f"patched {scheme}", "strict")
        shared = tuple(replace(gate, limit=FOUR_BITS_LIMIT) if gate.pair == own else gate for gate in shared)
    return (
        *shared,
        Gate((reference, "shipped"), "bad_test", 0),
        Gate((reference, "shipped"), "kl_mean", limit, ("text",), pooled=True),
        Gate(("strict", "shipped"), "kl_mean", kernels, ("text",), pooled=True),
        Gate(("strict", "shipped"), "overturned", MOST_OVERTURNED, ("text",)),
    )


def native_adapter_gates(scheme: str, int8_cache: bool = False, *, screened: bool = False) -> tuple[Gate, ...]:
    """The gates of an artifact with an adapter beside its weights; the reference is PEFT's model, nothing merged.

    With float32 products the artifact repeats PEFT on the weights it holds; how near it comes to PEFT on the
    checkpoint has the limits of its scheme, as without an adapter.

    Args:
        screened: see `native_gates`.
    """
    quantizer, kernels = QUANTIZERS.get(scheme), KERNELS_KL + CACHE_KL * int8_cache + SCREEN_KL * screened
    own = (PEFT if scheme == "fp32" else f"{PEFT} {scheme}", "strict")
    folded = quantizer is not None and quantizer.calibrated
    limit = kernels + (quantizer.kl_limit if quantizer else BFLOAT16_KL if scheme == "bf16" else 0)
    return (
        *relative(FOLDED_LIMIT if folded else ADAPTER_LIMIT, own),
        *near((PEFT, "shipped"), limit),
        Gate(("strict", "shipped"), "kl_mean", kernels, ("text",), pooled=True),
        Gate(("strict", "shipped"), "overturned", MOST_OVERTURNED, ("text",)),
    )
