"""The header of a .gguf file: its bytes, and metadata of other types than they should be."""

import struct
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from tests.checkpoint.make import weights
from tests.checkpoint.test_gguf import raw_config, write_gguf
from tests.fuzz import mutate
from tests.fuzz.harness import Surface, run

KINDS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MORE = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id", "split.count", "general.alignment")


@dataclass
class State:
    folder: Path
    files: list[bytes]
    spans: list[dict[str, tuple[int, int]]]


def prepare(inputs: Any, folder: Path) -> State:
    files, spans = [], []
    for model_type in ("gemma", "gemma2", "gemma3_text"):
        raw = raw_config(model_type)
        metadata = [(key, 1) for key in MORE[:2]]
        write_gguf(folder / "sound.gguf", raw, weights(raw), metadata=metadata)
        files.append((folder / "sound.gguf").read_bytes())
        spans.append(values_of(files[-1]))
    return State(folder, files, spans)


def values_of(raw: bytes) -> dict[str, tuple[int, int]]:
    """Key of the metadata -> first byte of its value's type, and the byte behind the value."""
    (count,) = struct.unpack_from("<Q", raw, 16)
    found, at = {}, 24
    for _ in range(count):
        (length,) = struct.unpack_from("<Q", raw, at)
        key = raw[at + 8 : at + 8 + length].decode()
        start = at + 8 + length
        (kind,) = struct.unpack_from("<I", raw, start)
        at = behind(raw, kind, start + 4)
        found[key] = (start, at)
    return found


def behind(raw: bytes, kind: int, at: int) -> int:
    if kind in KINDS:
        return at + struct.calcsize("<" + KINDS[kind])
    if kind == STRING:
        return at + 8 + int(struct.unpack_from("<Q", raw, at)[0])
    inner, count = struct.unpack_from("<IQ", raw, at)
    at += 12
    for _ in range(count):
        at = behind(raw, inner, at)
    return at


def packed(random: Random) -> bytes:
    """A value of any type."""
    kind = random.choice((*KINDS, STRING, STRING, ARRAY, ARRAY, 13, 2**31))
    head = struct.pack("<I", kind)
    if kind == STRING:
        word = random.choice(mutate.TEXTS).encode("utf-8", "surrogatepass")
        return head + struct.pack("<Q", len(word)) + word
    if kind == ARRAY:
        inner, count = random.choice((4, 5, 6, 7, 8, 9)), random.choice((0, 1, 7, 5000, 2**40))
        items = b"" if count > 5000 else struct.pack("<Q", 0) * count if inner >= 8 else b"\1\0\0\0" * count
        return head + struct.pack("<IQ", inner, count) + items
    if KINDS.get(kind) in ("f", "d"):
        value = random.choice((0.0, -1.0, 1e30, float("inf"), float("nan")))
        return head + struct.pack("<" + KINDS[kind], value)
    size = struct.calcsize("<" + KINDS.get(kind, "I"))
    number = random.choice(mutate.NUMBERS[:-1]) & (2 ** (8 * size) - 1)
    return head + number.to_bytes(size, "little")


def attempt(state: State, random: Random) -> None:
    which = random.randrange(len(state.files))
    raw, spans = state.files[which], state.spans[which]
    header = max(stop for _, stop in spans.values()) + 4096
    if random.random() < 0.6:
        chosen = random.sample(list(spans.values()), random.choice((1, 1, 2)))
        for start, stop in sorted(chosen, reverse=True):
            raw = raw[:start] + packed(random) + raw[stop:]
    else:
        raw = mutate.raw_bytes(raw, random, end=header)
    file = state.folder / "model.gguf"
    file.write_bytes(raw)
    run("inspect", file, *random.choice(((), ("--params",))))


SURFACE = Surface("gguf_file", prepare, attempt)
