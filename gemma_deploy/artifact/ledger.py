"""The ledger: every place where an artifact may differ from the reference, with the measured effect.

An unlisted difference is a bug: the gate compares against the reference with exactly these exceptions. The entries here
are those of every artifact; a back end puts its own behind them (`Backend.ledger`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gemma_deploy.architectures.drafting import CENTROIDS, POST_PROJECTION, PRE_PROJECTION
from gemma_deploy.artifact.manifest import ContractRecord, LedgerEntry, Manifest
from gemma_deploy.names import EMBEDDING, TOKEN_PROJECTION
from gemma_deploy.params.table import ParamRow, lowest_sqnr
from gemma_deploy.quantization.rescaling import OF_EXPERTS, OF_STREAMS, Rescaling
from gemma_deploy.schemes import QUANTIZERS, Scheme, Storage


@dataclass(frozen=True)
class Words:
    """What a back end says of activations, in the entry about weights.

    Args:
        to_nearest: behind "backend.dtype int8 (w8a16); ".
        linears_read: of calibrated weights, in front of "norms are float32".
        fixed_steps: codes of an int8 cache have a step for each channel, and no scale of their own.
        float16_activations: an artifact of float16 weights computes with activations and a cache of float16.
    """

    to_nearest: str
    linears_read: str
    fixed_steps: bool = False
    float16_activations: bool = True


def shared_entries(manifest: Manifest, words: Words) -> list[LedgerEntry]:
    """Weights, rescaling, cache and embedding scale: the entries of every artifact, in order."""
    effect = measured_effect(manifest)
    entries = [_storage(manifest, words, effect), *_unreached(manifest), *_arrived(manifest)]
    entries += _rescaling(manifest.rescaling or Rescaling())
    if manifest.int8_cache:
        entries.append((_fixed_cache if words.fixed_steps else _cache)(manifest.contract, effect))
    scale, hidden = manifest.embed_scale, manifest.model.hidden_size
    entries.append(
        LedgerEntry(
            f"embedding scale sqrt({hidden}), rounding `{scale}`",
            EMBEDDING,
            "exact: as transformers computes in the run dtype; bf16: as the model was trained; so does the reference",
        )
    )
    return entries


def encoder_entries(manifest: Manifest) -> list[LedgerEntry]:
    """What stands behind an encoder, and what it does not have."""
    head = manifest.model.sentence
    if head is None:
        return []
    rows = {row.name: row.dtype for row in manifest.params}
    stored = ", ".join(dict.fromkeys(rows[name] for name in head.tensors())) or "none"
    longest, projection = manifest.contract.context, rows.get(f"{TOKEN_PROJECTION}.weight")
    first = "" if projection is None else f"projection of each token ({projection}), "
    return [
        LedgerEntry(
            f"{first}mean, dense layers ({stored}) and length in float32",
            "behind the last norm",
            "everything passes through them; vectors of length 1, as sentence-transformers makes them",
            measured_effect(manifest),
        ),
        LedgerEntry(
            f"texts of at most {longest} tokens",
            "rotary tables" if manifest.contract.dynamic else "every input",
            "length of the recipe; a longer text is cut at its end as sentence-transformers does, and that is told",
        ),
    ]


def drafter_entries(manifest: Manifest, words: Words) -> list[LedgerEntry]:
    """Of a drafter: it embeds no token, and is joined to its model by matrices that are no codes."""
    entries = [one for one in shared_entries(manifest, words) if one.where != EMBEDDING]
    rows = {row.name: row.dtype for row in manifest.params}
    if (stored := rows[PRE_PROJECTION]) != "float32":
        entries.append(
            LedgerEntry(
                f"what joins it to its model is {stored}, computed in float32",
                f"{PRE_PROJECTION}, {POST_PROJECTION}" + (f", {CENTROIDS}" if CENTROIDS in rows else ""),
                "everything passes through it; what a drafter guesses changes no text",
            )
        )
    return entries


def context_entries(manifest: Manifest, where: str) -> list[LedgerEntry]:
    """That the context is shorter than the model's, where it is."""
    context, most = manifest.contract.context, manifest.model.max_position_embeddings
    if context >= most:
        return []
    why = "length of the recipe; a longer text is refused by the runtime, never cut"
    return [LedgerEntry(f"context limited to {context} of {most} positions", where, why)]


def _and_experts(rows: Sequence[ParamRow]) -> str:
    """What else layers have that is codes; routers are what it is not."""
    return " and its experts (routers float32)" if any(".experts." in row.name for row in rows) else ""


def _storage(manifest: Manifest, words: Words, effect: dict[str, Any]) -> LedgerEntry:
    scheme = manifest.scheme
    matrices = "weight matrices and token table"
    if Scheme(scheme).calibrated:
        return _quantized(manifest, words, effect)
    if Scheme(scheme).codes:
        storage = manifest.storage or Storage()
        rows = [row for row in manifest.params if row.sqnr_db is not None]
        worst = lowest_sqnr(rows)
        if worst:
            effect = {**effect, "lowest_sqnr_db": worst.sqnr_db, "lowest_sqnr_tensor": worst.name}
        return LedgerEntry(
            f"{storage.linears_text}, {_table(storage)}, symmetric, to nearest; activations and norms float32",
            f"{len(rows)} matrices that did not arrive in this form"
            if takes_over(manifest)
            else f"the seven linears of every layer{_and_experts(rows)}, the token table ({len(rows)} tensors)",
            f"{'backend.dtype int8' if scheme == 'w8a16' else 'frontend.quantize.type'} ({scheme}); {words.to_nearest}",
            effect,
        )
    texts = {
        "fp32": ("no rounding", "float32 weights and activations"),
        "bf16": (f"{matrices} rounded to bfloat16; arithmetic, norms and cache float32", "backend.dtype bf16"),
        "fp16": (
            f"{matrices}, activations and cache float16; norms, rotary, scores, softmax, GELU and LM head float32",
            "backend.dtype fp16; rounding scores and logits would cost more than all the rest; the casts around "
            "softmax and GELU are in the graph, so that every runtime computes them so",
        ),
    }
    what, why = texts[scheme]
    if scheme == "fp16" and not words.float16_activations:
        what, why = f"{matrices} rounded to float16; arithmetic and norms float32", "backend.dtype fp16"
    return LedgerEntry(what, "whole model", why, effect)


def takes_over(manifest: Manifest) -> bool:
    """Whether codes of the checkpoint are in an artifact as they were."""
    return any(row.taken_over for row in manifest.checkpoint.arrived)


def _arrived(manifest: Manifest) -> list[LedgerEntry]:
    """Of a checkpoint that has codes: what was taken over, and what was dequantized."""
    entries = []
    for row in manifest.checkpoint.arrived:
        where = f"{row.matrices} matrices that arrived as {row.form}"
        if row.taken_over:
            entries.append(
                LedgerEntry(
                    "taken over: codes and scales are the checkpoint's, bit for bit", where, "nothing is rounded"
                )
            )
        else:
            entries.append(
                LedgerEntry("dequantized once, in float32, and treated as floats from there on", where, row.why or "")
            )
    return entries


def _quantized(manifest: Manifest, words: Words, effect: dict[str, Any]) -> LedgerEntry:
    """A calibrated scheme; the effect says how much less is lost than by rounding to nearest."""
    scheme = manifest.scheme
    layers = manifest.quantization.layers if manifest.quantization else ()
    tensors = [found for layer in layers for found in layer["tensors"].values()]
    loss, nearest = (
        sum(found[key] / found["signal"] for found in tensors if found["signal"]) for key in ("loss", "rtn_loss")
    )
    if nearest:
        effect = {**effect, "loss_to_round_to_nearest": round(loss / nearest, 4)}
    quantizer = QUANTIZERS[scheme]
    worst = lowest_sqnr([row for row in manifest.params if ".layers." in row.name])
    if worst:
        effect |= {"lowest_output_sqnr_db": worst.sqnr_db, "lowest_output_sqnr_tensor": worst.name}
    if quantizer.activations:
        noisy = [found["activation_noise"] for found in tensors if "activation_noise" in found]
        if noisy:
            effect |= {"activation_noise_db": round(10 * math.log10(sum(noisy) / len(noisy)), 2)}
    storage = manifest.storage or Storage()
    how = "rounded with error compensation on" if quantizer.compensate else "rounded to nearest, scaled for"
    return LedgerEntry(
        f"{storage.linears_text}, symmetric, {how} calibration text; columns rescaled, their factors folded into "
        f"norm gains, value rows and up rows; {_table(storage)}, rounded to nearest",
        f"the seven linears and two norms of every layer{_and_experts(manifest.params)} ({len(tensors)} matrices), "
        "the token table",
        f"frontend.quantize.type {scheme}; {words.linears_read}norms are float32",
        effect,
    )


def _unreached(manifest: Manifest) -> list[LedgerEntry]:
    """Experts that no token of the calibration text came to."""
    found = {}
    for layer in manifest.quantization.layers if manifest.quantization else ():
        if numbers := layer.get("experts", {}).get("unreached"):
            found[layer["layer"]] = numbers
    if not found:
        return []
    where = "; ".join(f"{layer}.experts: {', '.join(map(str, numbers))}" for layer, numbers in found.items())
    what = f"{sum(map(len, found.values()))} experts are rounded to nearest"
    return [LedgerEntry(what, where, "no token of the calibration text came to them; calibrate on more of it")]


def _cache(contract: ContractRecord, effect: dict[str, Any]) -> LedgerEntry:
    alike = dict.fromkeys(one for one in contract.geometry or ((contract.kv_heads, contract.head_dim),) if one[0])
    each = [f"{2 * heads * (dim + 2)} bytes a token and layer, float16 takes {4 * heads * dim}" for heads, dim in alike]
    return LedgerEntry(
        "keys and values are kept as int8, with a float16 scale for each head and token",
        f"past_key_values and present of every layer: {'; or '.join(each)}",
        "frontend.quantize.type +kv8; channels are divided by factors from calibration text before they are rounded, "
        "and attention reads the new token through its codes as well",
        effect,
    )


def _fixed_cache(contract: ContractRecord, effect: dict[str, Any]) -> LedgerEntry:
    alike = dict.fromkeys(one for one in contract.geometry or ((contract.kv_heads, contract.head_dim),) if one[0])
    each = [f"{2 * heads * dim} bytes a token and layer, float32 takes {8 * heads * dim}" for heads, dim in alike]
    return LedgerEntry(
        "keys and values are kept as int8, with one step for each channel",
        f"past_key_values and present of every layer: {'; or '.join(each)}",
        "frontend.quantize.type +kv8; a step is the channel's largest magnitude on calibration text by 127, what is "
        "larger becomes the last code, and attention reads the new token through its codes as well",
        effect,
    )


def _table(storage: Storage) -> str:
    return f"token table {storage.table or 'float16'}"


def _rescaling(rescaling: Rescaling) -> list[LedgerEntry]:
    """What keeps float16 from overflowing; the effect counts tensors and names the largest exponent."""
    entries = []
    scaled = {point: e for point, e in rescaling.exponents.items() if e}
    if scaled:
        most = max(scaled, key=lambda point: scaled[point])
        entries.append(
            LedgerEntry(
                "activations stored divided by powers of two, undone by the next norm, linear or scale factor",
                f"residual stream by 2**{rescaling.residual}; keys and values of the cache too; see `rescaling`",
                "float16 ends at 65504 and these would come within 8x of it; powers of two cost no bit, eps goes along",
                {"tensors": len(scaled), "largest_exponent": scaled[most], "largest_exponent_tensor": most},
            )
        )
    wide = [branch for branch in rescaling.wide if branch not in (OF_EXPERTS, OF_STREAMS)]
    if OF_STREAMS in rescaling.wide:
        where = "what mixes streams, projections of streams and their sizes, mean and deviation of sparse gates"
        why = "sums of squares do not fit float16, and coefficients are small; projections' weights stay float16"
        entries.append(LedgerEntry("computed in float32", where, why))
    if OF_EXPERTS in rescaling.wide:
        why = "a rounded router chooses other experts; weights of experts stay float16"
        entries.append(LedgerEntry("computed in float32", "routers and experts, every layer", why))
    if wide:
        why = "what GELU reads does not fit float16, and no power of two could be undone after it; weights stay float16"
        inside = {
            "mlp": "gate, up and their product",
            "per_layer_input": "gate of the vectors, and its product with them",
        }
        where = "; ".join(inside.get(branch, branch) for branch in wide)
        entries.append(LedgerEntry("computed in float32", f"{where}, every layer", why))
    return entries


def measured_effect(manifest: Manifest) -> dict[str, Any]:
    """The figures of the gate's result that belong into the ledger."""
    return dict(manifest.parity.effect) if manifest.parity else {}
