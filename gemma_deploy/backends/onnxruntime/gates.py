"""The gates of ONNX Runtime's graph."""

from __future__ import annotations

from gemma_deploy.parity.gates import ADAPTER_LIMIT, BFLOAT16_KL, FOLDED_LIMIT, GATES, PEFT, Gate, near, relative
from gemma_deploy.schemes import QUANTIZERS

# Logits by which a token may lead in float32 products and yet lose to the kernels: microsoft/onnxruntime#29849 saw the
# wrong token where activations are massive. Real 270M, 1,024 positions of WikiText-2: 27 tokens differ, and no lead is
# above 0.34; 2,048 with w8a8's integer products: 0.64, and 2.05 before all of down_proj had more than 8 bits.
MOST_OVERTURNED = 2.0
# What a screened head (head.py) may lose besides: 0.0149 on 2,044 positions of WikiText-2, real 270M.
SCREEN_LIMIT = 0.025

# What an int8 cache with fixed steps may add to the mean KL: 0.0037 on 2,044 positions of WikiText-2, real 270M. One
# position may give 0.008 of the mean of 1,022: with steps 1.15 times as large it was 0.0116 +- 0.0079, 1.3 times 0.0029
CACHE_LIMIT = 0.015


def dynamic_gates(scheme: str, screened: bool = False, *, int8_cache: bool = False) -> tuple[Gate, ...]:
    """The gates of an artifact for ONNX Runtime.

    Its graph is proven twice: with float32 products on the weights it holds, as any other artifact, and with the
    kernels it ships, whose 8-bit activations move codes (see `gates_of`), by how near it comes to the model.

    Args:
        screened: whether only the likeliest tokens' logits are those of whole codes.
        int8_cache: the graph that ships rounds keys and values; exact arithmetic leaves that out.
    """
    more = SCREEN_LIMIT * screened + CACHE_LIMIT * int8_cache
    gates = GATES[scheme]
    if scheme == "bf16":
        return gates
    quantizer = QUANTIZERS.get(scheme)
    if quantizer is None:
        return (*gates, *relative(1e-5, ("hf", "shipped")))
    return (
        *gates,
        Gate(("hf", "shipped"), "bad_test", 0),
        Gate(("hf", "shipped"), "kl_mean", quantizer.kernels_kl_limit + more, ("text",)),
        Gate(("strict", "shipped"), "overturned", MOST_OVERTURNED, ("text",)),
    )


def adapter_gates(scheme: str, screened: bool = False, *, int8_cache: bool = False) -> tuple[Gate, ...]:
    """The gates of an artifact with an adapter beside its weights; the reference is PEFT's model, nothing merged.

    With float32 products the artifact repeats PEFT on the weights it holds; how near it comes to PEFT on the
    checkpoint has the limits of its scheme, as without an adapter.

    Args:
        screened, int8_cache: see `dynamic_gates`.
    """
    more = SCREEN_LIMIT * screened + CACHE_LIMIT * int8_cache
    if scheme == "fp32":
        return relative(ADAPTER_LIMIT, (PEFT, "strict"), (PEFT, "shipped"))
    quantizer = QUANTIZERS.get(scheme)
    same = f"{PEFT} {scheme}", "strict"
    if quantizer is None:
        return (*relative(ADAPTER_LIMIT, same), *near((PEFT, "strict"), BFLOAT16_KL))
    return (
        *relative(FOLDED_LIMIT if quantizer.calibrated else ADAPTER_LIMIT, same),
        *near((PEFT, "strict"), quantizer.kl_limit),
        *near((PEFT, "shipped"), quantizer.kernels_kl_limit + more),
        Gate(("strict", "shipped"), "overturned", MOST_OVERTURNED, ("text",)),
    )
