"""The ledger: every place where an artifact may differ from the reference, with the measured effect.

An unlisted difference is a bug: the gate compares against the reference with exactly these exceptions.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from gemma_deploy.backends import backend_of
from gemma_deploy.quantization.rescaling import MLP, Rescaling
from gemma_deploy.schemes import QUANTIZERS, Storage


@dataclass(frozen=True)
class LedgerEntry:
    """One allowed difference. `effect` holds measured figures, empty where parity did not run."""

    what: str
    where: str
    why: str
    effect: dict[str, Any] = field(default_factory=dict)


def ledger_for(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Entries of an artifact, from its manifest (with the parity result when there is one)."""
    scheme, model, contract = manifest["scheme"], manifest["model"], manifest["contract"]
    effect = _effect(manifest.get("parity"))
    entries = [_storage(manifest, scheme, effect), *_rescaling(Rescaling.of_manifest(manifest))]
    if manifest.get("int8_cache"):
        entries.append(_cache(contract, effect))
    scale = manifest["recipe"]["frontend"]["model_kwargs"]["embed_scale"]
    entries.append(
        LedgerEntry(
            f"embedding scale sqrt({model['hidden_size']}), rounding `{scale}`",
            "model.embed_tokens",
            "exact: as transformers computes in the run dtype; bf16: as the model was trained; so does the reference",
        )
    )
    whole = backend_of(manifest) == "onnxruntime"
    if whole:
        entries += _kernels(manifest)
    if contract["context"] < model["max_position_embeddings"]:
        entries.append(
            LedgerEntry(
                f"context limited to {contract['context']} of {model['max_position_embeddings']} positions",
                "rotary tables; genai_config.json" if whole else "iter1: cache slots; rotary tables",
                "length of the recipe; a longer text is refused by the runtime, never cut",
            )
        )
    entries.append(
        LedgerEntry(
            "prefill returns the last position's logits only",
            "GatherND behind the last attention" if whole else "iter0: strided slice before the LM head",
            "decode needs no other position" if whole else "config.insert_slice; decode needs no other position",
        )
    )
    if whole:
        return [asdict(entry) for entry in entries]
    entries.append(
        LedgerEntry(
            "the new token's score and value are added after the cached ones",
            "iter1: attention of every layer",
            "the cache is read where it lies instead of being copied per token; changes the order of additions only",
            effect if scheme == "fp32" else {},
        )
    )
    entries += _division(manifest, effect if scheme == "fp32" else {})
    return [asdict(entry) for entry in entries]


def _kernels(manifest: dict[str, Any]) -> list[LedgerEntry]:
    """What ONNX Runtime's int8 kernels round besides the weights; the effect, of all of them, is against float32."""
    kernels = manifest.get("kernels")
    if not kernels:
        return []
    rows = (manifest.get("parity") or {}).get("measures", ())
    pairs = [row for row in rows if (row["reference"], row["test"]) == ("strict", "shipped")]
    found = {row["phase"]: row for row in reversed(pairs)}  # of text, which comes first, where there is any
    measures = ("case", "positions", "kl_mean", "top1", "overturned")
    effects: dict[str, dict[str, Any]] = {
        phase: {key: found[phase][key] for key in measures} if phase in found else {} for phase in ("prefill", "decode")
    }
    entries = [
        LedgerEntry(
            f"activations rounded to 8 bits, a scale for each token and {kernels['block']} input channels (or group of "
            "grouped weights)",
            "MatMulNBits of the LM head" if kernels["integer"] else "MatMulNBits of every linear and of the LM head",
            "accuracy level 4, the only one that runs at the speed of the memory",
            effects["decode"],
        )
    ]
    if candidates := kernels.get("candidates"):
        entries.append(
            LedgerEntry(
                f"logits of all but the {candidates} likeliest tokens are those of the high half of every code",
                "the LM head",
                "backend.compile.head screened: half as much is read; the likeliest are computed from whole codes in "
                "float32, so that greedy tokens are those of the whole table",
                effects["decode"],
            )
        )
    if kernels["integer"]:
        wide, linears = kernels["wide"], 7 * manifest["model"]["num_hidden_layers"]
        but = f"; to 14 bits before {len(wide)} linears ({', '.join(wide)})" if wide else ""
        how = "14 bits with a scale per token" if len(wide) == linears else f"8 bits with a scale per token{but}"
        entries.append(
            LedgerEntry(
                f"activations rounded to {how}",
                "MatMulIntegerToFloat of every linear",
                "backend.compile.prefill fast: integer products of whole rows",
                effects["prefill"],
            )
        )
    return entries


def _division(manifest: dict[str, Any], effect: dict[str, Any]) -> list[LedgerEntry]:
    """What ranks and stages change: the order of sums, and where things lie."""
    parts, model = manifest["parts"], manifest["model"]
    ranks = parts[0]["ranks"] if parts else 1
    entries = []
    if ranks > 1:
        total = parts[0]["contract"]["kv_heads"] * ranks
        entries.append(
            LedgerEntry(
                f"o_proj and down_proj are summed over {ranks} ranks, in float32",
                "self_attn.o_proj, mlp.down_proj of every layer",
                "model_kwargs.tp; changes the order of additions only",
                effect,
            )
        )
        if total != model["num_key_value_heads"]:
            entries.append(
                LedgerEntry(
                    f"{model['num_key_value_heads']} key/value heads are stored as {total}",
                    "k_proj, v_proj and the cache of every layer",
                    "model_kwargs.tp; a head that several ranks read is repeated in each, its values do not change",
                )
            )
    stages = list(dict.fromkeys(part["stage"] for part in parts))
    if len(stages) > 1:
        entries.append(
            LedgerEntry(
                f"cut into {len(stages)} stages in front of layers "
                + ", ".join(str(first) for first in sorted({part["layers"][0] for part in parts}) if first),
                ", ".join(stages),
                "split.points; hidden states pass unrounded, a tied table lies in the first and the last stage",
            )
        )
    return entries


def _storage(manifest: dict[str, Any], scheme: str, effect: dict[str, Any]) -> LedgerEntry:
    matrices = "weight matrices and token table"
    if scheme in QUANTIZERS:
        return _quantized(manifest, scheme, effect)
    if scheme == "w8a16":
        storage = Storage.from_json(manifest["storage"])
        rows = [row for row in manifest["params"] if row.get("sqnr_db") is not None]
        worst = min(rows, key=lambda row: row["sqnr_db"]) if rows else None
        if worst:
            effect = {**effect, "lowest_sqnr_db": worst["sqnr_db"], "lowest_sqnr_tensor": worst["name"]}
        return LedgerEntry(
            f"{storage.linears_text}, {_table(storage)}, symmetric, to nearest; activations and norms float32",
            f"the seven linears of every layer, the token table ({len(rows)} tensors)",
            "backend.dtype int8 (w8a16); a 16-bit target rounds activations as well, which this graph does not"
            if backend_of(manifest) == "tvm_vacc"
            else "backend.dtype int8 (w8a16); what kernels do to activations is listed below",
            effect,
        )
    texts = {
        "fp32": ("no rounding", "float32 weights and activations"),
        "bf16": (f"{matrices} rounded to bfloat16; arithmetic, norms and cache float32", "backend.dtype bf16"),
        "fp16": (
            f"{matrices}, activations and cache float16; norms, rotary, scores, softmax and LM head float32",
            "backend.dtype fp16; rounding scores and logits would cost more than all the rest",
        ),
    }
    what, why = texts[scheme]
    return LedgerEntry(what, "whole model", why, effect)


def _quantized(manifest: dict[str, Any], scheme: str, effect: dict[str, Any]) -> LedgerEntry:
    """A calibrated scheme; the effect says how much less is lost than by rounding to nearest."""
    layers = (manifest.get("quantization") or {}).get("layers", ())
    tensors = [found for layer in layers for found in layer["tensors"].values()]
    loss, nearest = (
        sum(found[key] / found["signal"] for found in tensors if found["signal"]) for key in ("loss", "rtn_loss")
    )
    if nearest:
        effect = {**effect, "loss_to_round_to_nearest": round(loss / nearest, 4)}
    quantizer = QUANTIZERS[scheme]
    rows = [row for row in manifest["params"] if row.get("sqnr_db") is not None and ".layers." in row["name"]]
    worst = min(rows, key=lambda row: row["sqnr_db"], default=None)
    if worst:
        effect |= {"lowest_output_sqnr_db": worst["sqnr_db"], "lowest_output_sqnr_tensor": worst["name"]}
    if quantizer.activations:
        noisy = [found["activation_noise"] for found in tensors if "activation_noise" in found]
        if noisy:
            effect |= {"activation_noise_db": round(10 * math.log10(sum(noisy) / len(noisy)), 2)}
    storage = Storage.from_json(manifest["storage"])
    how = "rounded with error compensation on" if quantizer.compensate else "rounded to nearest, scaled for"
    return LedgerEntry(
        f"{storage.linears_text}, symmetric, {how} calibration text; columns rescaled, their factors folded into "
        f"norm gains, value rows and up rows; {_table(storage)}, rounded to nearest",
        f"the seven linears and two norms of every layer ({len(tensors)} matrices), the token table",
        f"frontend.quantize.type {scheme}; {_inputs(manifest)}norms are float32",
        effect,
    )


def _inputs(manifest: dict[str, Any]) -> str:
    """What the linears read."""
    rounding = (manifest.get("quantization") or {}).get("activations")
    if backend_of(manifest) == "onnxruntime":
        return "what kernels do to activations is listed below; "
    if rounding is None:
        return "activations and "
    kept = rounding["kept"]
    but = f", but not those of {len(kept)} linears that would lose most ({', '.join(kept)})" if kept else ""
    return f"their inputs are rounded to 8 bits with a scale per token{but}; other activations and "


def _cache(contract: dict[str, Any], effect: dict[str, Any]) -> LedgerEntry:
    heads, dim = contract["kv_heads"], contract["head_dim"]
    return LedgerEntry(
        "keys and values are kept as int8, with a float16 scale for each head and token",
        f"past_key_values and present of every layer: {2 * heads * (dim + 2)} bytes a token and layer, "
        f"float16 takes {4 * heads * dim}",
        "frontend.quantize.type +kv8; channels are divided by factors from calibration text before they are rounded, "
        "and attention reads the new token through its codes as well",
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
    if MLP in rescaling.wide:
        why = "what GELU reads does not fit float16, and no power of two could be undone after it; weights stay float16"
        entries.append(LedgerEntry("computed in float32", "gate, up and their product, every layer", why))
    return entries


def _effect(parity: dict[str, Any] | None) -> dict[str, Any]:
    """The figures of the parity result that belong into the ledger."""
    return dict(parity.get("effect", {})) if parity else {}
