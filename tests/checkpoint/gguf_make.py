"""GGUF files of generations whose layers differ, as llama.cpp's converter (conversion/gemma.py) writes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from gemma_deploy.checkpoint import Checkpoint

SLIDING, FULL = "sliding_attention", "full_attention"
NO_WEIGHT = ("layer_scalar",)  # to which the converter adds `.weight`


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
    for name, info in checkpoint.tensors.items():
        said = f"{name}.weight" if name.endswith(NO_WEIGHT) else name
        found[table.get_name(said, try_suffixes=(".weight",))] = checkpoint.rows(name, 0, info.shape[0])
    assert None not in found
    return found


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
        if kind is not None and value.ndim > 1:
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
