"""Where a model for OpenVINO may differ from the reference."""

from __future__ import annotations

from gemma_deploy.artifact.ledger import LedgerEntry, Words, context_entries, shared_entries
from gemma_deploy.artifact.manifest import Manifest
from gemma_deploy.backends.openvino.source import SHIPPED, STRICT

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
    entry = LedgerEntry("what runtime options say", "x", "y", effect)
    return [*shared_entries(manifest, WORDS), entry, *context_entries(manifest, "openvino_model.xml")]
