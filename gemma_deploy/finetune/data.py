"""Files of examples: JSONL or a JSON list, read whole, checked line by line before anything is computed.

| format | an example | the answer |
| --- | --- | --- |
| text | {"text": "..."}, or any field that is named | no part of it |
| messages | {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}]} | the assistant's turns |
| alpaca | {"instruction": "...", "input": "...", "output": "..."} | output |
| prompt | {"prompt": "...", "completion": "..."} | completion |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_deploy import reading
from gemma_deploy.calibration.sources import alpaca
from gemma_deploy.calibration.sources.reading import json_type, string_fields
from gemma_deploy.errors import UsageError
from gemma_deploy.reading import FileKind, NotJsonError

LARGEST_BYTES = 512 << 20  # text and token ids of it are in memory together
LONGEST_LINE_BYTES = 16 << 20
SHOWN = 8  # offenders that are listed
ROLES = ("system", "user", "assistant")
EXPECTED = (
    'lines such as {"text": "..."}, {"messages": [...]}, {"prompt": "...", "completion": "..."}, or a JSON list of '
    '{"instruction": "...", "input": "...", "output": "..."}'
)
FILE = FileKind(UsageError, EXPECTED, "check the file (finetune.data, --data)", limit_bytes=LARGEST_BYTES)
MESSAGES, PROMPT, COMPLETION, TEXT = "messages", "prompt", "completion", "text"


@dataclass(frozen=True)
class Example:
    """One example; `text`, `messages`, or `prompt` and `answer` are set.

    Args:
        where: "line 3" or "entry 3", for messages.
        text: to be learned as a whole.
        messages: a conversation, each with role and content.
        prompt, answer: what is given, and what is to be learned.
    """

    where: str
    text: str | None = None
    messages: tuple[Mapping[str, str], ...] | None = None
    prompt: str | None = None
    answer: str | None = None


def read_examples(path: str | Path, *, format: str = "auto", field: str | None = None) -> list[Example]:
    """Every example of a file.

    Args:
        path: the file, UTF-8.
        format: "text", "messages", "alpaca" or "prompt"; "auto" tells by the keys of the first example.
        field: the key that holds the text, where the format is "text".

    Raises:
        UsageError: it cannot be read, is empty, is not JSON, or examples lack what the format calls for: all of them
            are counted, the first ones named by line.
    """
    rows = list(_rows(Path(path)))
    if not rows:
        raise FILE.wrong("holds no example", path)
    kind = _format_of(rows[0], format, field, path)
    examples, problems = [], []
    for where, row in rows:
        problem, example = _example(where, row, kind, field or TEXT)
        if problem:
            problems.append(f"{where}: {problem}")
        elif example is not None:
            examples.append(example)
    if problems:
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise UsageError(
            f"{len(problems)} of {len(rows)} examples are not of the format `{kind}`",
            where=str(path),
            problems=problems[:SHOWN] + more,
            expected=EXPECTED,
            next_step="correct these lines, or say which key holds the text with --field (finetune.field)",
        )
    return examples


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, parsed value) of every example."""
    data = reading.read_bytes(path, FILE)
    if not data.strip():
        raise FILE.wrong("the file is empty", path)
    if data.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[":
        for number, row in enumerate(_parsed(data, path, ""), 1):
            yield f"entry {number}", row
        return
    lines = data.split(b"\n")
    del data
    for number, line in enumerate(lines, 1):
        if len(line) > LONGEST_LINE_BYTES:
            raise FILE.wrong(f"line {number} is longer than {LONGEST_LINE_BYTES >> 20} MiB", path)
        if line.strip():
            yield f"line {number}", _parsed(line, path, f"line {number} ")


def _parsed(data: bytes, path: Path, at: str) -> Any:
    try:
        return reading.with_whole_characters(reading.parse_json(data))
    except UnicodeDecodeError as error:
        raise FILE.wrong(f"{at}is not UTF-8 text (byte {error.start})", path) from error
    except NotJsonError as error:
        place = f" (character {error.column})" if at and error.line else ""
        raise FILE.wrong(f"{at}is not JSON: {error.what + place if at else error}", path) from error


def _format_of(first: tuple[str, Any], format: str, field: str | None, path: str | Path) -> str:
    """The format that is asked for, or the one whose keys the first example has."""
    if field is not None and format not in ("auto", TEXT):
        raise UsageError(
            f"the format `{format}` has no field to name",
            where="finetune.field (--field)",
            next_step="leave one of them out",
        )
    if format != "auto":
        return format
    if field is not None:
        return TEXT
    keys = set(first[1]) if isinstance(first[1], dict) else set()
    for kind, needed in {
        MESSAGES: {MESSAGES},
        PROMPT: {PROMPT, COMPLETION},
        "alpaca": {"instruction", "output"},
        TEXT: {TEXT},
    }.items():
        if needed <= keys:
            return kind
    said = f"its keys are {', '.join(map(repr, sorted(keys)[:SHOWN]))}" if keys else f"it is {json_type(first[1])}"
    raise UsageError(
        f"{first[0]} is an example of no known format: {said}",
        where=str(path),
        expected=EXPECTED,
        next_step="name the key that holds the text with --field (finetune.field), such as --field quote",
    )


def _example(where: str, row: Any, kind: str, field: str) -> tuple[str | None, Example | None]:
    """What is wrong with a row, or the example it is."""
    if kind == TEXT:
        problem = string_fields(row, (field,)) or (None if row[field].strip() else f"{field!r} is empty")
        return problem, None if problem else Example(where, text=row[field])
    if kind == "alpaca":
        row = {"input": "", **row} if isinstance(row, dict) else row
        problem = string_fields(row, alpaca.KEYS) or (None if row["output"].strip() else "'output' is empty")
        if problem:
            return problem, None
        prompt = alpaca.text({**row, "output": ""})
        return None, Example(where, messages=tuple(alpaca.turns(row)), prompt=prompt, answer=row["output"])
    if not isinstance(row, dict):
        return f"is {json_type(row)}, not an object", None
    if kind == PROMPT and isinstance(row.get(PROMPT), list):
        both = [row.get(PROMPT), row.get(COMPLETION)]
        if not all(isinstance(part, list) for part in both):
            return "'prompt' is a list of messages, and 'completion' is not", None
        row = {MESSAGES: [*both[0], *both[1]]}  # type: ignore[misc]
        kind = MESSAGES
    if kind == MESSAGES:
        problem = _wrong_messages(row.get(MESSAGES), row)
        if problem:
            return problem, None
        turns = tuple({"role": one["role"], "content": one["content"]} for one in row[MESSAGES])
        return None, Example(where, messages=turns)
    problem = string_fields(row, (PROMPT, COMPLETION))
    problem = problem or (None if row[COMPLETION].strip() else "'completion' is empty")
    return problem, None if problem else Example(where, prompt=row[PROMPT], answer=row[COMPLETION])


def _wrong_messages(messages: Any, row: Mapping[str, Any]) -> str | None:
    if messages is None:
        return f"has no 'messages' (its keys: {', '.join(map(str, list(row)[:SHOWN])) or 'none'})"
    if not isinstance(messages, list) or not messages:
        return f"'messages' is {json_type(messages) if not isinstance(messages, list) else 'an empty list'}"
    for number, one in enumerate(messages, 1):
        problem = string_fields(one, ("role", "content"))
        if problem:
            return f"message {number} {problem}"
        if one["role"] not in ROLES:
            return f"message {number} has the role {one['role']!r}, expected {', '.join(ROLES)}"
    return None if _answers(messages) else "no message is the assistant's: there is nothing to learn"


def _answers(messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Which messages are answers."""
    return [number for number, one in enumerate(messages) if one["role"] == "assistant"]
