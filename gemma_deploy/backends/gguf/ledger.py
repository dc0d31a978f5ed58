"""Where a file for llama.cpp may differ from the reference."""

from __future__ import annotations

from gemma_deploy.artifact.ledger import LedgerEntry, Words, context_entries, shared_entries
from gemma_deploy.artifact.manifest import Manifest
from gemma_deploy.backends.gguf.gates import STRICT
from gemma_deploy.backends.gguf.source import LLAMA
from gemma_deploy.schemes import Scheme

WORDS = Words(
    to_nearest="llama.cpp rounds activations itself",
    linears_read="llama.cpp rounds activations itself; ",
    float16_activations=False,
)
# What inputs of products become on a CPU (`vec_dot_type` in ggml-cpu.c), by what the matrix is.
INPUTS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def ledger_of(manifest: Manifest) -> list[LedgerEntry]:
    """All entries of an artifact."""
    rows = manifest.parity.measures if manifest.parity else ()
    pairs = [row for row in rows if (row["reference"], row["test"]) == (STRICT, LLAMA)]
    effect = {key: pairs[0][key] for key in ("case", "positions", "kl_mean", "top1")} if pairs else {}
    codes = "8 bits with a scale for 32 of them" if Scheme(manifest.scheme).codes else INPUTS[manifest.scheme]
    entry = LedgerEntry(
        f"inputs of matrices in {codes}, keys and values in float16",
        "all linears and the LM head",
        "what llama.cpp computes in on a CPU, unless it is told another cache (-ctk, -ctv)",
        effect,
    )
    return [*shared_entries(manifest, WORDS), entry, *context_entries(manifest, "-c of llama-server")]
