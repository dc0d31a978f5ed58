"""Tiny checkpoints for these tests, written byte by byte so that any part can be made wrong."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

from gemma_deploy.checkpoint import ModelConfig, expected_tensors

DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


def config(model_type: str = "gemma", **changes: Any) -> dict[str, Any]:
    """A config.json as Google publishes them, at a size that costs nothing; `None` as a value means null."""
    raw: dict[str, Any] = {
        "model_type": model_type,
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 64,
        "rope_theta": 10000.0,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
    }
    if model_type != "gemma":
        raw |= {"sliding_window": 4, "query_pre_attn_scalar": 8}
    if model_type == "gemma3_text":
        raw |= {"rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "sliding_window_pattern": 2}
    return raw | changes


def weights(raw: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 tensors of every expected name."""
    rng = np.random.default_rng(seed)
    shapes = expected_tensors(ModelConfig.from_dict(raw, "config.json"))
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Round to nearest even; uint16."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def encode(tensors: dict[str, np.ndarray], dtype: str = "F32") -> tuple[dict[str, Any], bytes]:
    """Header dictionary and data bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, value in tensors.items():
        stored = to_bf16(value) if dtype == "BF16" else value.astype(DTYPES[dtype])
        header[name] = {
            "dtype": dtype,
            "shape": list(value.shape),
            "data_offsets": [len(data), len(data) + stored.nbytes],
        }
        data += stored.tobytes()
    return header, data


def write_safetensors(path: Path, header: dict[str, Any] | bytes, data: bytes) -> None:
    """Length, header, data: nothing is checked."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def write_checkpoint(
    directory: Path,
    raw: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    *,
    dtype: str = "F32",
    shards: int = 1,
) -> dict[str, np.ndarray]:
    """A whole checkpoint directory; returns its tensors."""
    raw = config() if raw is None else raw
    tensors = weights(raw) if tensors is None else tensors
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(raw))
    names = list(tensors)
    if shards == 1:
        write_safetensors(directory / "model.safetensors", *encode(tensors, dtype))
        return tensors
    weight_map = {}
    for index in range(shards):
        file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[index::shards]}
        write_safetensors(directory / file, *encode(part, dtype))
        weight_map |= dict.fromkeys(part, file)
    write_index(directory, weight_map)
    return tensors


def write_index(directory: Path, weight_map: dict[str, str]) -> None:
    """model.safetensors.index.json."""
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
