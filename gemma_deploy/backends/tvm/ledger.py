"""Where a compiled pair may differ from the reference."""

from __future__ import annotations

from gemma_deploy.artifact.ledger import LedgerEntry
from gemma_deploy.artifact.manifest import Manifest
from gemma_deploy.backends.tvm_vacc import ledger as static


def ledger_of(manifest: Manifest) -> list[LedgerEntry]:
    """The static pair's entries, and what its functions compute otherwise."""
    return [
        *static.ledger_of(manifest),
        LedgerEntry(
            "exp and tanh are polynomials, and sums of 64 parts",
            "softmax, GELU and caps; every product",
            "so that both run as vectors (fast_exp and fast_tanh of TVM); a few units in the last place of float32",
        ),
    ]
