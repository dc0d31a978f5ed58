"""Tiny random checkpoints on which every Gemma fact bites: small window, odd depth, heads != KV heads, random norms.

For the project's tests and for users who want to try a recipe without weights. Not used by the compiler.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from gemma_deploy.names import CONFIG

_COMMON: dict[str, Any] = {
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
    "head_dim": 32, "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 512,
}  # fmt: skip
TINY_CONFIGS: dict[str, dict[str, Any]] = {
    "gemma": {
        **_COMMON, "model_type": "gemma", "architectures": ["GemmaForCausalLM"], "hidden_act": "gelu",
        "hidden_activation": None, "num_hidden_layers": 3, "num_key_value_heads": 1, "max_position_embeddings": 512,
        "rope_theta": 10000.0,
    },
    "gemma2": {
        **_COMMON, "model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"],
        "hidden_activation": "gelu_pytorch_tanh", "num_hidden_layers": 5, "num_key_value_heads": 2,
        "max_position_embeddings": 512, "rope_theta": 10000.0, "query_pre_attn_scalar": 24, "sliding_window": 8,
        "attn_logit_softcapping": 1.5, "final_logit_softcapping": 3.0,
    },
    "vaultgemma": {
        **_COMMON, "model_type": "vaultgemma", "architectures": ["VaultGemmaForCausalLM"],
        "hidden_activation": "gelu_pytorch_tanh", "num_hidden_layers": 5, "num_key_value_heads": 2,
        "max_position_embeddings": 512, "rope_theta": 10000.0, "query_pre_attn_scalar": 24, "sliding_window": 8,
        "attn_logit_softcapping": 1.5, "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {
        **_COMMON, "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"],
        "hidden_activation": "gelu_pytorch_tanh", "num_hidden_layers": 7, "num_key_value_heads": 2,
        "max_position_embeddings": 512, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0,
        "query_pre_attn_scalar": 24, "sliding_window": 8, "sliding_window_pattern": 6,
    },
}  # fmt: skip


def write_tiny_checkpoint(path: Path, model_type: str, *, seed: int = 0, dtype: str = "BF16", **changes: Any) -> Path:
    """Write config.json and model.safetensors of a tiny random model, and return the directory.

    Args:
        dtype: "BF16" or "F32", of the weights on disk.
        changes: config keys to set.
    """
    from gemma_deploy.checkpoint.config import ModelConfig
    from gemma_deploy.checkpoint.expected import expected_tensors

    raw = {**TINY_CONFIGS[model_type], **changes}
    path.mkdir(parents=True, exist_ok=True)
    (path / CONFIG).write_text(json.dumps(raw, indent=1))
    rng = np.random.default_rng(seed)
    shapes = expected_tensors(ModelConfig.from_dict(raw, CONFIG))
    header, offset, blobs = {}, 0, []
    for name, shape in shapes.items():
        # Wide enough that attention, caps and the window matter; norms random so that (1 + w) does.
        std = 0.3 if "norm" in name else 0.12
        blob = _encode(rng.standard_normal(shape, np.float32) * std, dtype)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + len(blob)]}
        offset += len(blob)
        blobs.append(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))
    return path


def _encode(values: np.ndarray, dtype: str) -> bytes:
    if dtype == "F32":
        return values.astype("<f4").tobytes()
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()  # round half to even
