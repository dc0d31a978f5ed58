"""GGUF files of generations whose layers differ, as llama.cpp's converter (conversion/gemma.py) writes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from gemma_deploy.checkpoint import Checkpoint

SLIDING, FULL = "sliding_attention", "full_attention"
# To which the converter adds `.weight`.
NO_WEIGHT = ("layer_scalar", "experts.gate_up_proj", "experts.down_proj", "altup.correct_output_scale")
BESIDE = {"router.scale": "ffn_gate_inp.scale", "router.per_expert_scale": "ffn_down_exps.scale"}
STACKS = {"altup_projections": "altup_proj.weight", "altup_unembed_projections": "altup_unembd_proj.weight"}
SMALL = ("altup", "laurel")  # which llama.cpp does not quantize


def metadata_of(raw: Mapping[str, Any], layer_types: list[str]) -> dict[str, Any]:
    """Key without the architecture's name -> value, of a Gemma 4.

    Args:
        raw: config.json; layer_types: the kinds of its layers, where it leaves them out.
    """
    layers, shared = raw["num_hidden_layers"], raw.get("num_kv_shared_layers", 0)
    width, sliding = raw["intermediate_size"], [kind == SLIDING for kind in layer_types]
    wide, full_heads = raw.get("use_double_wide_mlp", False), raw.get("num_global_key_value_heads")
    heads: Any = raw["num_key_value_heads"]
    if full_heads is not None:
        heads = [raw["num_key_value_heads"] if one else full_heads for one in sliding]
    ropes = raw.get("rope_parameters") or {
        SLIDING: {"rope_theta": 1e4},
        FULL: {"rope_theta": 1e6, "partial_rotary_factor": 0.25},
    }
    found = {
        "block_count": layers,
        "context_length": raw["max_position_embeddings"],
        "embedding_length": raw["hidden_size"],
        "feed_forward_length": [width * (2 if i >= layers - shared else 1) for i in range(layers)] if wide else width,
        "attention.head_count": raw["num_attention_heads"],
        "attention.head_count_kv": heads,
        "attention.layer_norm_rms_epsilon": raw["rms_norm_eps"],
        "attention.sliding_window": raw["sliding_window"],
        "attention.sliding_window_pattern": sliding,
        "attention.shared_kv_layers": shared,
        "attention.key_length": raw["global_head_dim"],
        "attention.value_length": raw["global_head_dim"],
        "attention.key_length_swa": raw["head_dim"],
        "attention.value_length_swa": raw["head_dim"],
        "embedding_length_per_layer_input": raw["hidden_size_per_layer_input"],
        "rope.dimension_count": raw["global_head_dim"],
        "rope.dimension_count_swa": raw["head_dim"],
        "rope.freq_base": ropes[FULL]["rope_theta"],
        "rope.freq_base_swa": ropes[SLIDING]["rope_theta"],
        "final_logit_softcapping": raw.get("final_logit_softcapping"),
    }
    if raw.get("enable_moe_block"):
        found |= {"expert_count": raw["num_experts"], "expert_used_count": raw["top_k_experts"]}
        found["expert_feed_forward_length"] = raw["moe_intermediate_size"]
    return {key: value for key, value in found.items() if value is not None}


def frequencies_of(raw: Mapping[str, Any]) -> np.ndarray:
    """`rope_freqs.weight`: 1 for pairs of channels that turn, 1e30 for those that do not."""
    full = (raw.get("rope_parameters") or {}).get(FULL, {"partial_rotary_factor": 0.25})
    turned = int(raw["global_head_dim"] * full["partial_rotary_factor"] / 2)
    return np.array([1.0] * turned + [1e30] * (raw["global_head_dim"] // 2 - turned), np.float32)


def tensors_of(checkpoint: Checkpoint, architecture: str) -> dict[str, np.ndarray]:
    """Every tensor under the name that gguf-py's own table gives it, float32."""
    kind = next(one for one, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(kind, checkpoint.config.num_hidden_layers)
    found = {}
    stacks = {llama: [] for llama in STACKS.values()}
    for name, info in checkpoint.tensors.items():
        values = checkpoint.rows(name, 0, info.shape[0])
        if "experts." in name:
            values = values.reshape(checkpoint.config.raw["num_experts"], -1, info.shape[1])
        if (stack := name.split(".")[1]) in STACKS:
            stacks[STACKS[stack]].append(values)
            continue
        beside = next((llama for ours, llama in BESIDE.items() if name.endswith(ours)), None)
        said = f"{name}.weight" if name.endswith(NO_WEIGHT) else name
        llama = f"blk.{name.split('.')[2]}.{beside}" if beside else table.get_name(said, try_suffixes=(".weight",))
        found[llama] = values
    assert None not in found
    return found | {llama: np.stack(each) for llama, each in stacks.items() if each}


def write(
    path: Path,
    architecture: str,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    kind: gguf.GGMLQuantizationType | None = None,
) -> Path:
    """A .gguf file; metadata of the value None are left out.

    Args:
        kind: of matrices; vectors are float32.
    """
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        if value is not None:
            writer.add_key_value(f"{architecture}.{key}", value, gguf.GGUFValueType.get_type(value))
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
    for name, value in tensors.items():
        if kind is not None and value.ndim > 1 and not any(part in name for part in SMALL):
            writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_gemma4(path: Path, directory: Path, *, kind: gguf.GGMLQuantizationType | None = None, **changes: Any) -> Path:
    """The GGUF file of a checkpoint's directory.

    Args:
        changes: metadata in the place of the converter's, dots in their keys as two underscores; None leaves one out.
    """
    checkpoint = Checkpoint.open(directory)
    raw, kinds = checkpoint.config_dict(), [*checkpoint.config.layer_types]
    metadata = metadata_of(raw, kinds) | {key.replace("__", "."): value for key, value in changes.items()}
    tensors = {"rope_freqs.weight": frequencies_of(raw), **tensors_of(checkpoint, "gemma4")}
    return write(path, "gemma4", metadata, tensors, kind=kind)


def write_gemma3n(
    path: Path, directory: Path, *, kind: gguf.GGMLQuantizationType | None = None, **changes: Any
) -> Path:
    """The GGUF file of a Gemma 3n, as `write_gemma4` makes that of a Gemma 4.

    The converter fills the table of vectors with zeros up to the vocabulary, and has the share of gates that are zero
    as a multiple of their standard deviation.
    """
    checkpoint = Checkpoint.open(directory)
    raw, normal = checkpoint.config_dict(), torch.distributions.normal.Normal(0, 1)
    ropes = {kind: rope.theta for kind, rope in checkpoint.config.rope.items()}
    metadata = {
        "block_count": raw["num_hidden_layers"],
        "context_length": raw["max_position_embeddings"],
        "embedding_length": raw["hidden_size"],
        "feed_forward_length": raw["intermediate_size"],
        "attention.head_count": raw["num_attention_heads"],
        "attention.head_count_kv": raw["num_key_value_heads"],
        "attention.key_length": raw["head_dim"],
        "attention.value_length": raw["head_dim"],
        "attention.layer_norm_rms_epsilon": raw["rms_norm_eps"],
        "attention.sliding_window": raw["sliding_window"],
        "attention.sliding_window_pattern": [one == SLIDING for one in checkpoint.config.layer_types],
        "attention.shared_kv_layers": raw["num_kv_shared_layers"],
        "rope.freq_base": ropes[FULL],
        "rope.freq_base_swa": ropes[SLIDING],
        "altup.num_inputs": raw["altup_num_inputs"],
        "altup.active_idx": raw.get("altup_active_idx", 0),
        "embedding_length_per_layer_input": raw["hidden_size_per_layer_input"],
        "activation_sparsity_scale": [
            normal.icdf(torch.tensor(share, dtype=torch.float32)).item() for share in raw["activation_sparsity_pattern"]
        ],
        "final_logit_softcapping": raw.get("final_logit_softcapping"),
    } | {key.replace("__", "."): value for key, value in changes.items()}
    tensors = tensors_of(checkpoint, "gemma3n")
    table = tensors["per_layer_token_embd.weight"]
    missing = raw["vocab_size"] - len(table)
    tensors["per_layer_token_embd.weight"] = np.concatenate([table, np.zeros((missing, table.shape[1]), np.float32)])
    return write(path, "gemma3n", metadata, tensors, kind=kind)
