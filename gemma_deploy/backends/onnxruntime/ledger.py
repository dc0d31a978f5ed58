"""Where ONNX Runtime's graph may differ from the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gemma_deploy.artifact.ledger import (
    LedgerEntry,
    Words,
    context_entries,
    drafter_entries,
    encoder_entries,
    shared_entries,
)
from gemma_deploy.artifact.manifest import Manifest
from gemma_deploy.backends.onnxruntime.options import ALL

WORDS = Words(
    to_nearest="what kernels do to activations is listed below",
    linears_read="what kernels do to activations is listed below; ",
    fixed_steps=True,
)


def ledger_of(manifest: Manifest) -> list[LedgerEntry]:
    """All entries of an artifact."""
    if manifest.model.sentence is not None:
        return [*shared_entries(manifest, WORDS), *_encoder_kernels(manifest), *encoder_entries(manifest)]
    if manifest.model.drafting is not None:
        return [*drafter_entries(manifest, WORDS), *_encoder_kernels(manifest),
                *context_entries(manifest, "rotary tables")]  # fmt: skip
    last = LedgerEntry(
        "prefill returns the last position's logits only",
        "GatherND behind the last attention",
        "decode needs no other position",
    )
    return [
        *shared_entries(manifest, WORDS),
        *_kernels(manifest),
        *context_entries(manifest, "rotary tables; genai_config.json"),
        *([] if manifest.contract.logits == ALL else [last]),
    ]


def without_experts(modules: Sequence[str]) -> tuple[str, ...]:
    """Paths of linears alone."""
    return tuple(module for module in modules if ".experts." not in module)


def _encoder_kernels(manifest: Manifest) -> list[LedgerEntry]:
    """What int8 kernels round besides the weights in an encoder, or a drafter."""
    kernels = manifest.kernels
    if not kernels:
        return []
    how = (
        "14 bits with a scale for each token"
        if kernels.integer
        else (f"8 bits, a scale for each token and {kernels.block} input channels (or group of grouped weights)")
    )
    where = "MatMulIntegerToFloat" if kernels.integer else "MatMulNBits"
    why = "backend.compile.prefill " + ("fast" if kernels.integer else "lean")
    return [LedgerEntry(f"activations rounded to {how}", f"{where} of every linear", why)]


def _kernels(manifest: Manifest) -> list[LedgerEntry]:
    """What ONNX Runtime's int8 kernels round besides the weights; the effect, of all of them, is against float32."""
    kernels = manifest.kernels
    if not kernels:
        return []
    rows = manifest.parity.measures if manifest.parity else ()
    pairs = [row for row in rows if (row["reference"], row["test"]) == ("strict", "shipped")]
    found = {row["phase"]: row for row in reversed(pairs)}  # of text, which comes first, where there is any
    measures = ("case", "positions", "kl_mean", "top1", "overturned")
    effects: dict[str, dict[str, Any]] = {
        phase: {key: found[phase][key] for key in measures} if phase in found else {} for phase in ("prefill", "decode")
    }
    entries = [
        LedgerEntry(
            f"activations rounded to 8 bits, a scale for each token and {kernels.block} input channels (or group of "
            "grouped weights)",
            "MatMulNBits of the LM head" if kernels.integer else "MatMulNBits of every linear and of the LM head",
            "accuracy level 4, the only one that runs at the speed of the memory",
            effects["decode"],
        )
    ]
    if candidates := kernels.candidates:
        entries.append(
            LedgerEntry(
                f"logits of all but the {candidates} likeliest tokens are those of the high half of every code",
                "the LM head",
                "backend.compile.head screened: half as much is read; the likeliest are computed from whole codes in "
                "float32, so that greedy tokens are those of the whole table",
                effects["decode"],
            )
        )
    experts = [module for module in kernels.wide if ".experts." in module]
    if experts:
        fewer = len(experts) < 2 * manifest.model.num_hidden_layers
        but = f"; to 8 bits before the others than {', '.join(experts)}" if fewer else ""
        entries.append(
            LedgerEntry(
                f"activations rounded to 14 bits with a scale per token{but}",
                "MatMulIntegerToFloat of every expert",
                "the only product of codes on a CPU that needs no packing: an expert's matrices are read from the file",
                effects["decode"],
            )
        )
    if kernels.integer:
        finer, linears = without_experts(kernels.wide), 7 * manifest.model.num_hidden_layers
        but = f"; to 14 bits before {len(finer)} linears ({', '.join(finer)})" if finer else ""
        how = "14 bits with a scale per token" if len(finer) == linears else f"8 bits with a scale per token{but}"
        entries.append(
            LedgerEntry(
                f"activations rounded to {how}",
                "MatMulIntegerToFloat of every linear",
                "backend.compile.prefill fast: integer products of whole rows",
                effects["prefill"],
            )
        )
    return entries
