"""Where a checkpoint for vLLM may differ from the reference."""

from __future__ import annotations

from gemma_deploy.artifact.ledger import LedgerEntry, Words, context_entries, shared_entries
from gemma_deploy.artifact.manifest import Manifest
from gemma_deploy.backends.vllm.source import SHIPPED, STRICT, dtype_of
from gemma_deploy.schemes import Scheme

WORDS = Words(
    to_nearest="activations have the dtype that vLLM is told",
    linears_read="activations have the dtype that vLLM is told; ",
    float16_activations=False,
)


def ledger_of(manifest: Manifest) -> list[LedgerEntry]:
    """All entries of an artifact."""
    rows = manifest.parity.measures if manifest.parity else ()
    pairs = [row for row in rows if (row["reference"], row["test"]) == (STRICT, SHIPPED)]
    effect = {key: pairs[0][key] for key in ("case", "positions", "kl_mean", "top1")} if pairs else {}
    dtype = dtype_of(manifest.scheme)
    entries = [
        LedgerEntry(
            f"activations, keys and values in {dtype}",
            "everywhere but in norms and softmax",
            "what vLLM computes in: `dtype` of config.json, unless it is told another",
            effect,
        )
    ]
    if Scheme(manifest.scheme).rounds_activations:
        entries.append(
            LedgerEntry(
                "activations rounded to 8 bits, a scale for each token",
                "inputs of all linears but the LM head",
                "frontend.quantize.type w8a8: products of integers; compressed-tensors rounds the inputs of every "
                "linear, so none is left out",
                effect,
            )
        )
    return [*shared_entries(manifest, WORDS), *entries, *context_entries(manifest, "--max-model-len of vllm serve")]
