"""Whether a model in OpenVINO's XML reads of its parameter file what the manifest says lies there."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from gemma_deploy.dtypes import OPENVINO
from gemma_deploy.params.naming import CONSTANTS
from gemma_deploy.params.table import ParamRow

CONSTANT = re.compile(r'<layer id="(\d+)" name="([^"]*)" type="Const"[^>]*><data ([^>]*)/>')
ATTRIBUTE = re.compile(r'(\w+)="([^"]*)"')
LAYER = "<layer "


def network_problems(rows: Sequence[ParamRow], file: Path, shown: str) -> list[str]:
    """What does not agree, as sentences.

    Args:
        rows: of the parameter file; shown: the file's name in them.
    """
    text = file.read_text(encoding="utf-8", errors="replace")
    if LAYER not in text:
        return [f"{shown}: no layers in it"]
    by_place = {(row.offset, row.nbytes): row for row in rows}
    small = next((row for row in rows if row.name == CONSTANTS), None)
    problems = []
    for number, name, given in CONSTANT.findall(text):
        said = dict(ATTRIBUTE.findall(given))
        place = _number(said.get("offset")), _number(said.get("size"))
        row, dtype = by_place.get(place), OPENVINO.get(said.get("element_type", ""))
        if small is not None and small.offset <= place[0] and sum(place) <= small.offset + small.nbytes:
            continue
        if row is None:
            problems.append(f"{shown}: {name or f'constant {number}'} reads bytes {place} that are no tensor's")
        elif (row.name, row.dtype) != (name, dtype):
            problems.append(f"{shown}: {name} is {dtype} and reads {row.name}, {row.dtype}")
    return problems


def _number(written: str | None) -> int:
    """-1 for what is none."""
    return int(written) if written is not None and written.isascii() and written.isdigit() and len(written) < 20 else -1
