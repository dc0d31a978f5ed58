"""Adapters as peft writes them, made byte by byte so that any part can be made wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gemma_deploy.checkpoint import ModelConfig
from tests.checkpoint.make import config, encode, write_safetensors

PREFIX = "base_model.model."
Q = f"{PREFIX}model.layers.0.self_attn.q_proj"
DOWN = f"{PREFIX}model.layers.2.mlp.down_proj"
TABLE, HEAD = f"{PREFIX}model.embed_tokens", f"{PREFIX}lm_head"


def model(**changes: Any) -> ModelConfig:
    """A Gemma of 40 tokens, 16 channels, 32 query channels and 24 in the MLP."""
    return ModelConfig.from_dict(config(**changes), "config.json")


def settings(**changes: Any) -> dict[str, Any]:
    """An adapter_config.json as peft 0.21 writes it; `changes` are its fields."""
    return {
        "alora_invocation_tokens": None,
        "alpha_pattern": {},
        "arrow_config": None,
        "auto_mapping": None,
        "base_model_name_or_path": "google/gemma-2b",
        "bias": "none",
        "corda_config": None,
        "ensure_weight_tying": False,
        "eva_config": None,
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "kasa_config": None,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": 8,
        "lora_bias": False,
        "lora_dropout": 0.05,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "peft_type": "LORA",
        "peft_version": "0.21.2",
        "qalora_group_size": 16,
        "r": 4,
        "rank_pattern": {},
        "revision": None,
        "target_modules": ["q_proj", "down_proj"],
        "target_parameters": None,
        "task_type": "CAUSAL_LM",
        "trainable_token_indices": None,
        "use_bdlora": None,
        "use_dora": False,
        "use_qalora": False,
        "use_rslora": False,
        **changes,
    }


def pair(module: str, shape: tuple[int, int], r: int = 4, seed: int = 0) -> dict[str, np.ndarray]:
    """lora_A and lora_B of a linear [out, in]."""
    rng = np.random.default_rng(seed)
    return {
        f"{module}.lora_A.weight": rng.standard_normal((r, shape[1]), np.float32),
        f"{module}.lora_B.weight": rng.standard_normal((shape[0], r), np.float32),
    }


def factors() -> dict[str, np.ndarray]:
    """Of two linears of `model()`."""
    return pair(Q, (32, 16)) | pair(DOWN, (16, 24), seed=1)


def write_adapter(
    directory: Path,
    tensors: Mapping[str, np.ndarray] | None = None,
    *,
    dtype: str = "F32",
    config_bytes: bytes | None = None,
    **changes: Any,
) -> Path:
    """A whole adapter directory; `changes` are fields of its config."""
    directory.mkdir(parents=True, exist_ok=True)
    raw = json.dumps(settings(**changes)).encode() if config_bytes is None else config_bytes
    (directory / "adapter_config.json").write_bytes(raw)
    chosen = dict(factors() if tensors is None else tensors)
    write_safetensors(directory / "adapter_model.safetensors", *encode(chosen, dtype))
    return directory
