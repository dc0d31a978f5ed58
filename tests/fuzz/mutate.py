"""Ways to change bytes, text and JSON, drawn from a random number generator."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Sequence
from random import Random
from typing import Any

DIGITS, DEEP, DEEP_OBJECTS, CONSTANT, HUGE = "@digits@", "@deep@", "@deep objects@", "@constant@", "@huge@"
# What json.dumps cannot write, put in afterwards.
RAW = {
    DIGITS: "9" * 5000,
    DEEP: "[" * 100_000 + "]" * 100_000,
    DEEP_OBJECTS: '{"a":' * 5000 + "0" + "}" * 5000,
    CONSTANT: "NaN",
    HUGE: "-1e999",
}
NUMBERS = (0, 1, -1, 2, 255, 2**31 - 1, 2**31, 2**53, 2**63, 2**64, -(2**63), 10**299)
FRACTIONS = (0.0, -0.0, 0.5, 1e-320, 1e-45, 1e38, 1e308, -1e308, 1.0)
TEXTS = (
    "", " ", "x", "x" * 300, "../../etc/passwd", "/etc/passwd", "a\0b", "\ud83d", "\udcff", "größe", "0", "1e5",
    "null", "{{ 1 }}", "%s%n", "model", "\n", "\u202e", "~nobody", "a.b", ".", "..", "model.layers.",
    "model.layers.x.y",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, *NUMBERS, *FRACTIONS, *TEXTS, *RAW, [], {}, [[]], [None], {"": None}, {"a": 1}, [0] * 50,
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside, itself included; of long lists the first and the last."""
    found = [path]
    if isinstance(value, dict):
        for key, inner in value.items():
            found += places(inner, (*path, key))
    elif isinstance(value, list):
        for index in range(len(value)) if len(value) < 6 else (0, 1, len(value) - 1):
            found += places(value[index], (*path, index))
    return found


def place(value: Any, random: Random) -> tuple[Any, ...]:
    """One of them; every key at the top and every kind of entry has about the same chance, however many there are."""
    path: tuple[Any, ...] = ()
    while isinstance(value, dict | list) and value and (not path or random.random() < 0.8):
        key = random.choice(list(value)) if isinstance(value, dict) else random.randrange(len(value))
        path, value = (*path, key), value[key]
    return path


def json_tree(value: Any, random: Random, most: int = 3) -> Any:
    """A copy with one to `most` changes."""
    value = copy.deepcopy(value)
    for _ in range(random.randint(1, most)):
        value = _change(value, place(value, random), random)
    return value


def _change(root: Any, path: tuple[Any, ...], random: Random) -> Any:
    if not path:
        return random.choice(VALUES) if random.random() < 0.3 else root
    owner = root
    for part in path[:-1]:
        owner = owner[part]
    last = path[-1]
    match random.randrange(8):
        case 0 if isinstance(owner, dict):
            del owner[last]
        case 1 if isinstance(owner, dict):
            owner[random.choice(TEXTS)] = owner.pop(last)
        case 2 if isinstance(owner, list):
            owner[:] = random.choice(([], owner * 3, owner[::-1], [list(owner)], owner[:1]))
        case 3:
            owner[last] = nudged(owner[last], random)
        case 4:
            other = place(root, random)
            inner = root
            for part in other:
                inner = inner[part]
            owner[last] = copy.deepcopy(inner)
        case 5 if isinstance(owner, dict):
            owner[random.choice(("zzz", *TEXTS))] = copy.deepcopy(owner[last])
        case _:
            owner[last] = copy.deepcopy(random.choice(VALUES))
    return root


def nudged(value: Any, random: Random) -> Any:
    """Nearly the same value."""
    match value:
        case bool():
            return not value
        case int():
            return random.choice((value + 1, value - 1, -value, value * 2, value * 1000, float(value), str(value)))
        case float():
            return random.choice((-value, value * 1e10, 0.0, int(value) if abs(value) < 1e300 else 0, str(value)))
        case str():
            return text(value, random)
        case list() | dict():
            return random.choice(([value], list(value), None))
    return random.choice(VALUES)


def json_text(value: Any, random: Random) -> bytes:
    """A value as the bytes of a JSON file, most of the time sound ones."""
    written = json.dumps(value, ensure_ascii=random.random() < 0.9)
    for mark, raw in RAW.items():
        written = written.replace(f'"{mark}"', raw, 1)
    raw = written.encode("utf-8", "surrogatepass")
    match random.randrange(20):
        case 0:
            return raw_bytes(raw, random)
        case 1:
            return b"\xef\xbb\xbf" + raw
        case 2:
            return written.encode(random.choice(("utf-16", "latin-1", "utf-32")), "replace")
        case 3:
            return raw.replace(b'"', b'"a": 1, "', 1)
    return raw


def json_file(value: Any, random: Random) -> bytes:
    """A changed JSON file."""
    return json_text(json_tree(value, random), random)


def raw_bytes(raw: bytes, random: Random, most: int = 4, end: int | None = None) -> bytes:
    """One to `most` changes in the first `end` bytes."""
    data = bytearray(raw)
    for _ in range(random.randint(1, most)):
        stop = max(1, min(len(data), end or len(data)))
        at = random.randrange(stop)
        length = random.choice((1, 2, 4, 8, 16, 64, 1000))
        match random.randrange(9):
            case 0:
                data[at : at + 1] = bytes([(data[at] if at < len(data) else 0) ^ (1 << random.randrange(8))])
            case 1:
                data[at : at + length] = b""
            case 2:
                data[at:at] = data[at : at + length]
            case 3:
                data[at:at] = random.randbytes(length)
            case 4:
                del data[at:]
            case 5:
                data[at : at + 1] = bytes([random.choice((0, 1, 10, 34, 44, 91, 93, 123, 125, 127, 128, 255))])
            case 6:
                number = random.choice(NUMBERS[:-1]) & (2**64 - 1)
                data[at : at + 8] = struct.pack("<Q", number)
            case 7:
                data[at : at + 4] = struct.pack("<I", random.choice(NUMBERS[:-1]) & (2**32 - 1))
            case 8:
                other = random.randrange(stop)
                data[at : at + length] = data[other : other + length]
    return bytes(data)


def text(value: str, random: Random, words: Sequence[str] = TEXTS) -> str:
    """One change of a text."""
    at = random.randrange(len(value) + 1)
    length = random.choice((1, 2, 5, 20))
    match random.randrange(6):
        case 0:
            return value[:at] + value[at + length :]
        case 1:
            return value[:at] + random.choice(words) + value[at:]
        case 2:
            return value[:at] + value[at : at + length] * random.choice((2, 3, 200)) + value[at + length :]
        case 3:
            return (
                value[:at]
                + random.choice("\0\t\r\n\"'\\{}[]()%#&*!|>-?:,@`~$ü\u2028\ufeff\U0001f600")
                + value[at + 1 :]
            )
        case 4:
            return random.choice(words)
    return value[:at]


def lines(value: str, random: Random, words: Sequence[str], most: int = 3) -> str:
    """One to `most` changes of a text of lines: whole lines, what stands behind a colon, or letters."""
    for _ in range(random.randint(1, most)):
        rows = value.split("\n")
        at = random.randrange(len(rows))
        match random.randrange(7):
            case 0:
                del rows[at]
            case 1:
                rows.insert(at, random.choice(rows))
            case 2:
                rows.insert(at, random.choice(words))
            case 3 | 4 if ":" in rows[at]:
                rows[at] = f"{rows[at].split(':')[0]}: {random.choice(words)}"
            case 5:
                rows[at] = random.choice(("  ", "\t", "    ", "- ")) + rows[at]
            case _:
                rows[at] = text(rows[at], random, words)
        value = "\n".join(rows)
    return value
