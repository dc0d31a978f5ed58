"""Where an artifact of `backend.type: native` may differ from the reference."""

from __future__ import annotations

from typing import Any

from gemma_deploy.artifact.ledger import LedgerEntry, Words, context_entries, shared_entries
from gemma_deploy.artifact.manifest import Manifest
from gemma_deploy.backends.native.plan import INPUT_GROUP
from gemma_deploy.schemes import Scheme

WORDS = Words(
    to_nearest="what kernels do to activations is listed below",
    linears_read="what kernels do to activations is listed below; ",
    float16_activations=False,
)


def ledger_of(manifest: Manifest) -> list[LedgerEntry]:
    """All entries of an artifact."""
    rows = manifest.parity.measures if manifest.parity else ()
    pairs = [row for row in rows if (row["reference"], row["test"]) == ("strict", "shipped")]
    measures = ("case", "positions", "kl_mean", "top1", "overturned")
    effect = {key: pairs[0][key] for key in measures} if pairs else {}
    entries = [_codes(effect) if manifest.int8_cache else _floats(effect)]
    if Scheme(manifest.scheme).codes:
        entries.append(_rounded(manifest, effect))
    if (candidates := manifest.contract.candidates) is not None:
        entries.append(
            LedgerEntry(
                f"logits of all but the {candidates} likeliest tokens are those of the high half of every code, less "
                "half the variance that this predicts",
                "the LM head",
                "backend.compile.head screened: half as much is read; the likeliest, and every token that may be the "
                "likeliest, are computed from whole codes, so that greedy tokens are those of the whole table",
                effect,
            )
        )
    return [*shared_entries(manifest, WORDS), *entries, *context_entries(manifest, "model.plan")]


def _rounded(manifest: Manifest, effect: dict[str, Any]) -> LedgerEntry:
    finer = "activations rounded to 15 bits, a scale for each token and 2048 input channels"
    why = "products of integers; 15 bits round 256 times finer than the 8 of other runtimes"
    if manifest.activations is None:
        return LedgerEntry(finer, "every product with codes", why, effect)
    kept = manifest.activations.kept
    return LedgerEntry(
        f"activations rounded to 8 bits, a scale for each token and {INPUT_GROUP} input channels; but before the LM "
        f"head and {len(kept)} linears ({', '.join(kept) or 'none'}) to 15 bits, a scale for 2048",
        "every product with codes",
        "frontend.quantize.type w8a8: half the integer products; what loses most has more bits",
        effect,
    )


def _floats(effect: dict[str, Any]) -> LedgerEntry:
    return LedgerEntry(
        "keys and values rounded to bfloat16", "the caches", "half the memory, and half the time to read it", effect
    )


def _codes(effect: dict[str, Any]) -> LedgerEntry:
    return LedgerEntry(
        "queries, and weights of positions, rounded to 15 bits, a scale for each head and page of the cache",
        "attention",
        "products of integers with the codes of keys and values; scales are float32 here. In ONNX Runtime, keys and "
        "values are bfloat16, and attention computes in float32",
        effect,
    )
