"""On which text a calibration ran, in one sentence, from its record (`calibration.pipeline.dataset_record`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OWN_TEXT = "for a model that you ship, set dataset.path to text like the one it will see"


def calibration_sentence(record: Mapping[str, Any]) -> str:
    """`64 windows of 512 tokens: 48 of c4 (bundled sample), 16 of alpaca (mine.json)`, with advice about samples."""
    sources, windows = record["sources"], record["windows"]
    parts = [f"{one['windows']} of {one['name']} ({_place(one)})" for one in sources]
    said = f"{windows['nsamples']} windows of {windows['seqlen']} tokens: {', '.join(parts)}"
    return f"{said}; {OWN_TEXT}" if any(one.get("bundled") for one in sources) else said


def _place(source: Mapping[str, Any]) -> str:
    if source.get("bundled"):
        return "bundled sample"
    if "hub" in source:
        return f"hub {source['hub']} at {str(source.get('revision', 'no revision'))[:12]}"
    return str(source.get("file", "a file that is not named"))
