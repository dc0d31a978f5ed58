"""A SentencePiece model (tokenizer.model) read without its library: pieces, scores and kinds.

The file is a protobuf message `ModelProto`; its field 1, repeated, is a piece of text (1), score (2) and type (3). See
https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import AddedToken

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
MAX_PIECES = 1 << 20
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class Piece:
    """One token: its text, its score (the log of how likely it is), and its kind."""

    text: str
    score: float = 0.0
    kind: int = NORMAL


def read_pieces(data: bytes) -> list[Piece]:
    """All pieces; the place in the list is the id.

    Raises:
        ValueError: the bytes are no such message, or hold no or too many pieces.
    """
    pieces: list[Piece] = []
    for field, kind, value in _fields(memoryview(data)):
        if field == 1 and kind == _BYTES:
            if len(pieces) == MAX_PIECES:
                raise ValueError(f"it has more than {MAX_PIECES} pieces")
            pieces.append(_piece(value))
    if not pieces:
        raise ValueError("it has no pieces")
    return pieces


def special_tokens(pieces: Sequence[Piece]) -> list[AddedToken]:
    """Control symbols, which are special, and symbols that the user defined, which are not."""
    from tokenizers import AddedToken

    return [
        AddedToken(piece.text, normalized=False, special=piece.kind == CONTROL)
        for piece in pieces
        if piece.kind in (CONTROL, USER_DEFINED)
    ]


def _piece(message: memoryview) -> Piece:
    text, score, kind = "", 0.0, NORMAL
    for field, wire, value in _fields(message):
        if field == 1 and wire == _BYTES:
            text = str(value, "utf-8")
        elif field == 2 and wire == _FIXED32:
            (score,) = struct.unpack("<f", value)
        elif field == 3 and wire == _VARINT:
            kind = int.from_bytes(value, "little")
    return Piece(text, score, kind)


def _fields(message: memoryview) -> Iterator[tuple[int, int, memoryview]]:
    """(number, wire type, value) of every field; a varint's value is its bytes, little-endian, at most 64 bits."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == _VARINT:
            number, at = _varint(message, at)
            yield key >> 3, kind, memoryview(number.to_bytes(10, "little"))
            continue
        if kind == _BYTES:
            size, at = _varint(message, at)
        elif kind in (_FIXED64, _FIXED32):
            size = 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"byte {at}: a field of wire type {kind}")
        if size > len(message) - at:
            raise ValueError(f"byte {at}: {size} more bytes are announced, {len(message) - at} are there")
        yield key >> 3, kind, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at == len(message):
            break
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError(f"byte {at}: a number is cut short or too long")
