"""The gates of a file for llama.cpp."""

from __future__ import annotations

from gemma_deploy.backends.gguf.source import LLAMA
from gemma_deploy.parity.gates import GATES, Gate, near
from gemma_deploy.schemes import QUANTIZERS

STRICT = "strict"
# What llama.cpp's arithmetic may add to the numbers of the file. It rounds the inputs of codes to 8 bits, a scale for
# 32 of them: real 270M, behind its window: w8a16 0.0025, w8a16_gptq 0.0014; fp32 0.0000012. bf16 0.00006, without a
# look behind the window. fp16: 0.0000002 of the bundled model, whose bf16 has 0.000009.
ADDS = {"fp32": 1e-4, "fp16": 1e-3, "bf16": 1e-3}
OF_CODES = 0.01


def gguf_gates(scheme: str) -> tuple[Gate, ...]:
    """The file as this program reads it, exact; then llama.cpp, near the reference and near the file."""
    quantizer, reference = QUANTIZERS.get(scheme), "hf bf16" if scheme == "bf16" else "hf"
    adds = ADDS.get(scheme, OF_CODES)
    limit = quantizer.kernels_kl_limit if quantizer else adds
    return (*GATES[scheme], *near((reference, LLAMA), limit), *near((STRICT, LLAMA), adds))
