"""Alpaca: a JSON list of {instruction, input, output} (alpaca_data_cleaned.json).

A row is Alpaca's own prompt and the answer, or, for a model with a chat template, a user's and the model's turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gemma_deploy.calibration.sources.reading import (
    AGAIN,
    Row,
    Turns,
    explained,
    json_type,
    parse_json,
    string_fields,
    wrong,
)
from gemma_deploy.errors import CalibrationError
from gemma_deploy.reading import FileKind, read_bytes

LARGEST_BYTES = 96 << 20  # the whole file is in memory at once; alpaca_data_cleaned.json has 44 MB
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


def rows(path: Path) -> Iterator[Row]:
    """Yield every entry.

    Raises:
        CalibrationError: naming the entries (counted from 0) that are wrong.
    """
    with explained(path, EXPECTED):
        raw = read_bytes(path, FileKind(CalibrationError, EXPECTED, AGAIN, limit_bytes=LARGEST_BYTES))
    entries = parse_json(raw, path, None, expected=EXPECTED)
    del raw
    if not isinstance(entries, list):
        raise wrong(f"is {json_type(entries)}, not a list", path, expected=EXPECTED)
    problems = [(index, problem) for index, entry in enumerate(entries) if (problem := string_fields(entry, KEYS))]
    if problems:
        index, problem = problems[0]
        more = f"; {len(problems) - 1} more entries are wrong" if len(problems) > 1 else ""
        raise wrong(problem + more, path, f"entry {index}", expected=EXPECTED)
    yield from entries


def text(row: Row) -> str:
    """Prompt and answer, as Alpaca was trained on."""
    return (WITH_INPUT if row["input"].strip() else WITHOUT_INPUT).format_map(row)


def turns(row: Row) -> Turns:
    """The task, with its input under it, and the answer."""
    task = f"{row['instruction']}\n\n{row['input']}" if row["input"].strip() else row["instruction"]
    return [{"role": "user", "content": task}, {"role": "assistant", "content": row["output"]}]
