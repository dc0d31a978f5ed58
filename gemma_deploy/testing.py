"""Tiny random checkpoints on which every Gemma fact bites: small window, odd depth, heads != KV heads, random norms.

For the project's tests and for users who want to try a recipe without weights. Not used by the compiler.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemma_deploy.names import CONFIG

WEIGHTS = "model.safetensors"

_COMMON: dict[str, Any] = {
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
    "head_dim": 32, "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 512,
}  # fmt: skip
# Of Gemma 3n it is 0.95, of 16,384 gates. Of 160 that leaves 8, and a token whose few gates pass by little has an MLP
# of next to nothing, which the norm behind it makes large again, with the roundings of what was subtracted: float32 was
# off by 8.1e-6 of float64 in the worst of eight random models (without such gates 2.2e-6, with these 2.0e-6).
SPARSE_GATES = [0.8, 0.5, 0.0, 0.0, 0.7, 0.0, 0.0]
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
    "gemma4_text": {
        **_COMMON, "model_type": "gemma4_text", "architectures": ["Gemma4ForCausalLM"],
        "hidden_activation": "gelu_pytorch_tanh", "num_hidden_layers": 7, "num_key_value_heads": 2,
        "max_position_embeddings": 512, "sliding_window": 8, "final_logit_softcapping": 3.0,
        "global_head_dim": 64, "num_global_key_value_heads": 1, "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0,
    },
    "gemma3n_text": {
        **_COMMON, "model_type": "gemma3n_text", "architectures": ["Gemma3nForCausalLM"],
        "hidden_activation": "gelu_pytorch_tanh", "num_hidden_layers": 7, "num_key_value_heads": 2,
        "max_position_embeddings": 512, "sliding_window": 8, "final_logit_softcapping": 3.0,
        "intermediate_size": [160, 160, 96, 160, 160, 96, 160], "laurel_rank": 16, "altup_num_inputs": 4,
        "activation_sparsity_pattern": SPARSE_GATES, "num_kv_shared_layers": 3,
        "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 480, "layer_types": [
        "sliding_attention", "full_attention", "sliding_attention", "full_attention", "sliding_attention",
        "sliding_attention", "full_attention"],
    },
}  # fmt: skip
# Vectors for each layer, layers at the end that share keys and values, of both kinds, MLPs of two widths.
TINY_PER_LAYER = {
    "num_hidden_layers": 7, "layer_types": ["sliding_attention", "full_attention", "sliding_attention",
    "full_attention", "sliding_attention", "sliding_attention", "full_attention"], "num_kv_shared_layers": 3,
    "use_double_wide_mlp": True, "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 512,
    "attention_k_eq_v": False,
}  # fmt: skip
# Experts beside the MLP of every layer, of which a token runs through three.
ROUTER_SPREAD = 10.0
TINY_EXPERTS = {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 3, "moe_intermediate_size": 96}
TINY_CONFIGS["gemma4_unified_text"] = TINY_CONFIGS["gemma4_text"] | {
    "model_type": "gemma4_unified_text", "architectures": ["Gemma4UnifiedForCausalLM"],
    "use_bidirectional_attention": "vision",
}  # fmt: skip


def write_tiny_checkpoint(path: Path, model_type: str, *, seed: int = 0, dtype: str = "BF16", **changes: Any) -> Path:
    """Write config.json and model.safetensors of a tiny random model, and return the directory.

    Args:
        dtype: "BF16" or "F32", of the weights on disk.
        changes: config keys to set.
    """
    from gemma_deploy.architectures import architecture_of
    from gemma_deploy.checkpoint.config import ModelConfig
    from gemma_deploy.checkpoint.expected import expected_tensors

    raw = {**TINY_CONFIGS.get(model_type, {}), **changes, "model_type": model_type}
    unit = 1 - architecture_of(model_type).norm_offset  # the weight of a norm that changes nothing
    path.mkdir(parents=True, exist_ok=True)
    (path / CONFIG).write_text(json.dumps(raw, indent=1))
    rng = np.random.default_rng(seed)
    shapes = expected_tensors(ModelConfig.from_dict(raw, CONFIG))
    tensors = {}
    for name, shape in shapes.items():
        # Wide enough that attention, caps and the window matter; norms random so that (1 + w) does.
        mean, std = (unit, 0.3) if "norm" in name or len(shape) == 1 else (0, 0.12)
        # Scores have the scale of other generations where the norm of queries carries it.
        size = 0.2 if unit and "q_norm" in name else 1.0
        # What mixes streams divides by the hidden size.
        size *= raw["hidden_size"] / 2 if "modality_router" in name else 1.0
        # Scores of experts differ by about 1, as trained ones do: chosen and left ones are no near ties.
        size *= ROUTER_SPREAD if "router.proj" in name else 1.0
        values = (rng.standard_normal(shape, np.float32) * std + mean) * size
        tensors[name] = (dtype, shape, _encode(values, dtype))
    _write_safetensors(path / WEIGHTS, tensors)
    return path


Encoded = tuple[str, tuple[int, ...], bytes]  # dtype, shape, bytes


def _write_safetensors(path: Path, tensors: Mapping[str, Encoded]) -> None:
    header, offset = {}, 0
    for name, (dtype, shape, blob) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(blob)]}
        offset += len(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blob for _, _, blob in tensors.values()))


def _stored(path: Path) -> dict[str, Encoded]:
    """What `_write_safetensors` wrote."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    found = {}
    for name, entry in json.loads(data[8:start]).items():
        first, last = entry["data_offsets"]
        found[name] = (entry["dtype"], tuple(entry["shape"]), data[start + first : start + last])
    return found


def _write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1))


def _encode(values: np.ndarray, dtype: str) -> bytes:
    if dtype == "F32":
        return values.astype("<f4").tobytes()
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()  # round half to even


# An encoder with every trait: window shorter than a text, odd depth, heads != KV heads, dense layers wider and back.
TINY_ENCODER: dict[str, Any] = {
    **TINY_CONFIGS["gemma3_text"], "architectures": ["Gemma3TextModel"], "use_bidirectional_attention": True,
}  # fmt: skip
# EmbeddingGemma 2: besides, layers of two sizes, a vector of each token for each of them, a projection of each token.
TINY_ENCODER2: dict[str, Any] = {
    **_COMMON, "model_type": "embedding_gemma2_text", "architectures": ["EmbeddingGemma2TextModel"],
    "hidden_activation": "gelu_pytorch_tanh", "num_hidden_layers": 7, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "sliding_window": 5, "sliding_window_pattern": 3, "global_head_dim": 64,
    "num_global_key_value_heads": 1, "hidden_size_per_layer_input": 96, "embedding_dim": 160,
}  # fmt: skip
TINY_PROMPTS = {"query": "task: search result | query: ", "document": "title: none | text: "}


def write_tiny_encoder(
    path: Path, *, seed: int = 0, dtype: str = "BF16", dense: Sequence[int] = (192, 64), **changes: Any
) -> Path:
    """Write a tiny random EmbeddingGemma in the folders of sentence-transformers, and return the directory.

    Args:
        dtype: "BF16" or "F32", of the weights on disk.
        dense: channels that each dense layer gives.
        changes: config keys to set.
    """
    raw = {**TINY_ENCODER, **changes}
    changes = {key: value for key, value in raw.items() if key != "model_type"}
    write_tiny_checkpoint(path, raw["model_type"], seed=seed, dtype=dtype, **changes)
    stored = _stored(path / WEIGHTS)  # named as a stack without a head is saved
    _write_safetensors(path / WEIGHTS, {name.removeprefix("model."): values for name, values in stored.items()})
    return _behind(path, raw["hidden_size"], dense, dtype=dtype, seed=seed + 1)


def write_tiny_encoder2(
    path: Path, *, seed: int = 0, dtype: str = "BF16", dense: Sequence[int] = (), **changes: Any
) -> Path:
    """Write a tiny random EmbeddingGemma 2, its text model as published: beside others, and without dense layers.

    Args:
        dtype: "BF16" or "F32", of the weights on disk; dense: as of `write_tiny_encoder`.
        changes: keys of the text_config to set.
    """
    raw = {key: value for key, value in {**TINY_ENCODER2, **changes}.items() if key != "model_type"}
    write_tiny_checkpoint(path, TINY_ENCODER2["model_type"], seed=seed, dtype=dtype, **raw)
    around = {"model_type": "embedding_gemma2", "architectures": ["EmbeddingGemma2Model"], "vision_config": None}
    _write(path / CONFIG, {**around, "audio_config": None, "text_config": {**TINY_ENCODER2, **changes}})
    stored = {f"language_model.{name.removeprefix('model.')}": one for name, one in _stored(path / WEIGHTS).items()}
    shape = (2, 3)
    stored["embed_vision.embedding_projection.weight"] = (dtype, shape, _encode(np.ones(shape, np.float32), dtype))
    _write_safetensors(path / WEIGHTS, stored)
    return _behind(path, raw["embedding_dim"], dense, dtype=dtype, seed=seed + 1)


def _behind(path: Path, width: int, dense: Sequence[int], *, dtype: str, seed: int) -> Path:
    """Write what stands behind an encoder that gives `width` channels of each token."""
    rng = np.random.default_rng(seed)
    write_pooling(path, width, len(dense))
    for number, size in enumerate(dense, 2):
        folder = path / f"{number}_Dense"
        config = {"in_features": width, "out_features": size, "bias": False}
        _write(folder / CONFIG, {**config, "activation_function": "torch.nn.modules.linear.Identity"})
        weight = rng.standard_normal((size, width), np.float32) / np.float32(width**0.5)
        _write_safetensors(folder / WEIGHTS, {"linear.weight": (dtype, weight.shape, _encode(weight, dtype))})
        width = size
    prompts = {"prompts": TINY_PROMPTS, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    _write(path / "config_sentence_transformers.json", prompts)
    _write(path / "sentence_bert_config.json", {"max_seq_length": 256, "do_lower_case": False})
    return path


def write_pooling(path: Path, width: int, dense: int = 0) -> None:
    """Write modules.json and the pooling's folder: mean, some dense layers, length 1.

    Args:
        width: channels that are pooled; dense: how many dense layers follow, whose folders are not written.
    """
    modules = [("Transformer", ""), ("Pooling", "1_Pooling")]
    modules += [("Dense", f"{number}_Dense") for number in range(2, 2 + dense)]
    modules.append(("Normalize", f"{2 + dense}_Normalize"))
    library = "sentence_transformers.models"
    listed = [
        {"idx": i, "name": str(i), "path": one, "type": f"{library}.{kind}"} for i, (kind, one) in enumerate(modules)
    ]
    _write(path / "modules.json", listed)
    pooling = {"word_embedding_dimension": width, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    _write(path / "1_Pooling" / CONFIG, {**pooling, "include_prompt": True})


def write_tiny_assistant(
    path: Path, target: Mapping[str, Any], *, seed: int = 0, dtype: str = "BF16", ordered: bool = False, **changes: Any
) -> Path:
    """Write a tiny random drafter of a Gemma 4, and return the directory.

    Args:
        target: config.json of the model that it guesses for.
        dtype: "BF16" or "F32", of the weights on disk.
        ordered: guesses look at a few groups of tokens alone.
        changes: keys of the text_config to set.
    """
    from gemma_deploy.architectures.drafting import TOKEN_ORDERING
    from gemma_deploy.checkpoint.config import ModelConfig
    from gemma_deploy.checkpoint.expected import expected_tensors

    kinds = ["sliding_attention", "full_attention"] * 2
    own: dict[str, Any] = {
        "num_hidden_layers": len(kinds), "layer_types": kinds, "num_kv_shared_layers": len(kinds), "hidden_size": 96,
        "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "use_double_wide_mlp": False,
        "enable_moe_block": False,
    }  # fmt: skip
    text = {key: value for key, value in target.items() if key not in ("architectures", "torch_dtype")}
    unified = "unified" in target["model_type"]
    raw = {
        "model_type": "gemma4_unified_assistant" if unified else "gemma4_assistant",
        "architectures": ["Gemma4UnifiedAssistantForCausalLM" if unified else "Gemma4AssistantForCausalLM"],
        "backbone_hidden_size": target["hidden_size"], "use_ordered_embeddings": ordered, "num_centroids": 32,
        "centroid_intermediate_top_k": 5, "text_config": {**text, **own, **changes}, "tie_word_embeddings": True,
    }  # fmt: skip
    _write(path / CONFIG, raw)
    rng, tensors = np.random.default_rng(seed), {}
    for name, shape in expected_tensors(ModelConfig.from_dict(raw, CONFIG)).items():
        if name == TOKEN_ORDERING:
            tensors[name] = ("I64", shape, rng.permutation(shape[0]).astype("<i8").tobytes())
            continue
        mean, std = (1.0, 0.3) if "norm" in name or len(shape) == 1 else (0.0, 0.12)
        values = (rng.standard_normal(shape, np.float32) * std + mean) * (0.2 if "q_norm" in name else 1.0)
        tensors[name] = (dtype, shape, _encode(values, dtype))
    _write_safetensors(path / WEIGHTS, tensors)
    return path
