"""The gates of a model for OpenVINO."""

from __future__ import annotations

from gemma_deploy.backends.openvino.source import SHIPPED, STRICT
from gemma_deploy.parity.gates import GATES, Gate, near
from gemma_deploy.schemes import QUANTIZERS

SHIPPED_KL = 1e-3


def openvino_gates(scheme: str) -> tuple[Gate, ...]:
    """The model in float32 on the weights that it holds, as any artifact; then what a user runs."""
    quantizer, reference = QUANTIZERS.get(scheme), "hf bf16" if scheme == "bf16" else "hf"
    limit = SHIPPED_KL + (quantizer.kl_limit if quantizer else 0)
    return (*GATES[scheme], *near((reference, SHIPPED), limit), *near((STRICT, SHIPPED), SHIPPED_KL))
