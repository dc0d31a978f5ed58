"""Where a model for OpenVINO may differ from the reference."""

from __future__ import annotations

from gemma_deploy.artifact.ledger import LedgerEntry, Words, context_entries, shared_entries
from gemma_deploy.artifact.manifest import Manifest
from gemma_deploy.backends.openvino.source import SHIPPED, STRICT
from gemma_deploy.names import OPENVINO_MODEL
from gemma_deploy.schemes import Scheme

WORDS = Words(
    to_nearest="what OpenVINO does to activations is listed below",
    linears_read="what OpenVINO does to activations is listed below; ",
    float16_activations=False,
)


def ledger_of(manifest: Manifest) -> list[LedgerEntry]:
    """All entries of an artifact."""
    rows = manifest.parity.measures if manifest.parity else ()
    pairs = [row for row in rows if (row["reference"], row["test"]) == (STRICT, SHIPPED)]
    effect = {key: pairs[0][key] for key in ("case", "positions", "kl_mean", "top1")} if pairs else {}
    contract = manifest.contract
    entries = [
        LedgerEntry(
            "activations in bfloat16 where the processor has instructions for it, keys and values in "
            f"{contract.cache_dtype}",
            "everywhere but in norms, rotary embedding and softmax",
            "what OpenVINO computes in unless INFERENCE_PRECISION_HINT and KV_CACHE_PRECISION say otherwise; the "
            "first cannot be said in the model",
            effect,
        )
    ]
    if contract.input_group and Scheme(manifest.scheme).codes:
        entries.append(
            LedgerEntry(
                f"activations rounded to 8 bits, a scale for each token and {contract.input_group} input channels",
                "every product with codes",
                "backend.compile.round_inputs: products of integers",
                effect,
            )
        )
    return [*shared_entries(manifest, WORDS), *entries, *context_entries(manifest, OPENVINO_MODEL)]
