"""Where the static pair may differ from the reference."""

from __future__ import annotations

from typing import Any

from gemma_deploy.artifact.ledger import (
    LedgerEntry,
    Words,
    context_entries,
    encoder_entries,
    measured_effect,
    shared_entries,
)
from gemma_deploy.artifact.manifest import Manifest


def ledger_of(manifest: Manifest) -> list[LedgerEntry]:
    """All entries of an artifact."""
    effect = measured_effect(manifest) if manifest.scheme == "fp32" else {}
    to_nearest = "a 16-bit target rounds activations as well, which this graph does not"
    shared = shared_entries(manifest, Words(to_nearest, _linears_read(manifest)))
    if manifest.model.sentence is not None:
        return [*shared, *encoder_entries(manifest)]
    return [
        *shared,
        *context_entries(manifest, "iter1: cache slots; rotary tables"),
        LedgerEntry(
            "prefill returns the last position's logits only",
            "iter0: strided slice before the LM head",
            "config.insert_slice; decode needs no other position",
        ),
        *_sharing(manifest),
        LedgerEntry(
            "the new token's score and value are added after the cached ones",
            "iter1: attention of every layer",
            "the cache is read where it lies instead of being copied per token; changes the order of additions only",
            effect,
        ),
        *_division(manifest, effect),
    ]


def _sharing(manifest: Manifest) -> list[LedgerEntry]:
    """What layers without caches of their own compute of a prompt."""
    layers = [layer for layer, (heads, _) in enumerate(manifest.contract.geometry or ()) if not heads]
    if not layers:
        return []
    return [
        LedgerEntry(
            "layers that share keys and values compute the last position of a prompt alone",
            f"iter0: layers {layers[0]} to {layers[-1]}, behind a strided slice",
            "nobody reads what they give of other positions: they have no caches, and the logits are the last one's",
        )
    ]


def _linears_read(manifest: Manifest) -> str:
    rounding = manifest.activations
    if rounding is None:
        return "activations and "
    kept = rounding.kept
    but = f", but not those of {len(kept)} linears that would lose most ({', '.join(kept)})" if kept else ""
    return f"their inputs are rounded to 8 bits with a scale per token{but}; other activations and "


def _division(manifest: Manifest, effect: dict[str, Any]) -> list[LedgerEntry]:
    """What ranks and stages change: the order of sums, and where things lie."""
    parts, heads = manifest.parts, manifest.model.num_key_value_heads
    ranks = parts[0].ranks if parts else 1
    entries = []
    if ranks > 1:
        total = parts[0].contract.kv_heads * ranks
        entries.append(
            LedgerEntry(
                f"o_proj and down_proj are summed over {ranks} ranks, in float32",
                "self_attn.o_proj, mlp.down_proj of every layer",
                "model_kwargs.tp; changes the order of additions only",
                effect,
            )
        )
        if any(".experts." in row.name for row in manifest.params):
            entries.append(
                LedgerEntry(
                    f"experts are divided among {ranks} ranks, and what they make is summed",
                    "experts of every layer",
                    "model_kwargs.tp; a rank has some of them whole, and an expert of another one adds nothing there",
                    effect,
                )
            )
        if total != heads:
            entries.append(
                LedgerEntry(
                    f"{heads} key/value heads are stored as {total}",
                    "k_proj, v_proj and the cache of every layer",
                    "model_kwargs.tp; a head that several ranks read is repeated in each, its values do not change",
                )
            )
    stages = list(dict.fromkeys(part.stage for part in parts))
    if len(stages) > 1:
        entries.append(
            LedgerEntry(
                f"cut into {len(stages)} stages in front of layers "
                + ", ".join(str(first) for first in sorted({part.layers[0] for part in parts}) if first),
                ", ".join(stages),
                "split.points; hidden states pass unrounded, a tied table lies in the first and the last stage",
            )
        )
    return entries
