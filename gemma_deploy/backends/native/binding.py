"""What the C ABI of src/capi.cpp takes and gives, for ctypes."""

from __future__ import annotations

import ctypes


class Piece(ctypes.Structure):
    """GemmaPiece of capi.cpp."""

    _fields_ = (
        ("sequence", ctypes.c_int32),
        ("count", ctypes.c_int32),
        ("wanted", ctypes.c_int32),
        ("unused", ctypes.c_int32),
        ("tokens", ctypes.c_void_p),
    )


class Ranks(ctypes.Structure):
    """Ranks of src/ranking.h."""

    _fields_ = (
        ("top", ctypes.c_int32),
        ("ids", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
        ("log_sums", ctypes.c_void_p),
        ("asked", ctypes.c_void_p),
        ("asked_logits", ctypes.c_void_p),
    )


pointer, text, size, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int
SIGNATURES: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "gemma_levels": (text, ()),
    "gemma_plan": (ctypes.c_int64, (text, text, size, text, size)),
    "gemma_open": (
        pointer, (text, size, text, text, number, ctypes.c_uint64, text, number, text, size),
    ),
    "gemma_close": (None, (pointer,)),
    "gemma_error": (text, (pointer,)),
    "gemma_level": (text, (pointer,)),
    "gemma_stride": (ctypes.c_uint64, (pointer,)),
    "gemma_hidden": (number, (pointer,)),
    "gemma_vocabulary": (number, (pointer,)),
    "gemma_context": (number, (pointer,)),
    "gemma_cache_used": (ctypes.c_uint64, (pointer,)),
    "gemma_sequence_new": (number, (pointer, number)),
    "gemma_sequence_free": (number, (pointer, number)),
    "gemma_adapter_load": (number, (pointer, text, size, pointer, ctypes.c_uint64)),
    "gemma_adapter_free": (number, (pointer, number)),
    "gemma_sequence_adapt": (number, (pointer, number, number)),
    "gemma_sequence_rewind": (number, (pointer, number, number)),
    "gemma_step": (number, (pointer, pointer, number, pointer, pointer, number)),
    "gemma_step_ranked": (number, (pointer, pointer, number, pointer, number)),
    "gemma_threads": (number, (pointer, pointer)),
    "gemma_screened": (number, (pointer, pointer)),
    "gemma_head": (number, (pointer, pointer, number, pointer)),
    "gemma_rank": (number, (pointer, pointer, number, pointer)),
}  # fmt: skip
