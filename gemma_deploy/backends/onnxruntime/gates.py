"""The gates of ONNX Runtime's graph."""

from __future__ import annotations

from gemma_deploy.parity.gates import GATES, Gate, relative
from gemma_deploy.schemes import QUANTIZERS

# Logits by which a token may lead in float32 products and yet lose to the kernels: microsoft/onnxruntime#29849 saw the
# wrong token where activations are massive. Real 270M, 1,024 positions of WikiText-2: 27 tokens differ, and no lead is
# above 0.34; 2,048 with w8a8's integer products: 0.64, and 2.05 before all of down_proj had more than 8 bits.
MOST_OVERTURNED = 2.0
# What a screened head (head.py) may lose besides: 0.0149 on 2,044 positions of WikiText-2, real 270M.
SCREEN_LIMIT = 0.025


def dynamic_gates(scheme: str, screened: bool = False) -> tuple[Gate, ...]:
    """The gates of an artifact for ONNX Runtime.

    Its graph is proven twice: with float32 products on the weights it holds, as any other artifact, and with the
    kernels it ships, whose 8-bit activations move codes (see `gates_of`), by how near it comes to the model.

    Args:
        screened: whether only the likeliest tokens' logits are those of whole codes.
    """
    gates = GATES[scheme]
    if scheme == "bf16":
        return gates
    quantizer = QUANTIZERS.get(scheme)
    if quantizer is None:
        return (*gates, *relative(1e-5, ("hf", "shipped")))
    return (
        *gates,
        Gate(("hf", "shipped"), "bad_test", 0),
        Gate(("hf", "shipped"), "kl_mean", quantizer.kernels_kl_limit + SCREEN_LIMIT * screened, ("text",)),
        Gate(("strict", "shipped"), "overturned", MOST_OVERTURNED, ("text",)),
    )
