"""Alpaca: a JSON list of {instruction, input, output} (alpaca_data_cleaned.json), rendered with Alpaca's own prompt."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gemma_deploy.calibration.sources.reading import explained, json_type, parse_json, string_fields, wrong

KEYS = ("instruction", "input", "output")
EXPECTED = 'a JSON list of {"instruction": "...", "input": "...", "output": "..."}'
# https://github.com/tatsu-lab/stanford_alpaca#data-release
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n{output}"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n{output}"
)


def texts(path: Path) -> Iterator[str]:
    """Yield every entry as prompt and answer.

    Raises:
        CalibrationError: naming the entries (counted from 0) that are wrong.
    """
    with explained(path, EXPECTED):
        raw = path.read_bytes()
    entries = parse_json(raw, path, None, expected=EXPECTED)
    if not isinstance(entries, list):
        raise wrong(f"is {json_type(entries)}, not a list", path, expected=EXPECTED)
    problems = [(index, problem) for index, entry in enumerate(entries) if (problem := string_fields(entry, KEYS))]
    if problems:
        index, problem = problems[0]
        more = f"; {len(problems) - 1} more entries are wrong" if len(problems) > 1 else ""
        raise wrong(problem + more, path, f"entry {index}", expected=EXPECTED)
    for entry in entries:
        yield (WITH_INPUT if entry["input"].strip() else WITHOUT_INPUT).format_map(entry)
