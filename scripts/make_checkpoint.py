"""Write a checkpoint of a published shape: random weights, or nothing but holes (`--zeros`), block by block.

usage: make_checkpoint.py SHAPE OUT [--layers N] [--seed S] [--zeros] [--tokenizer DIR]

For compiles where sizes and memory matter, not what the model says. Weights are bfloat16, normal(0, 0.02) with norms
around the weight that changes nothing; `--zeros` makes sparse files. In either case a gigabyte of memory is plenty.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np

from gemma_deploy.architectures import FULL, SLIDING
from gemma_deploy.architectures.embedding_gemma2 import TEXT_DEFAULTS
from gemma_deploy.checkpoint import ModelConfig, expected_tensors
from gemma_deploy.names import CONFIG, GENERATION_CONFIG
from gemma_deploy.testing import write_pooling

BLOCK, SHARD_BYTES = 1 << 22, 4 << 30  # numbers drawn at a time; bytes of a file
_ALL: dict[str, Any] = {
    "vocab_size": 262144, "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6,
    "final_logit_softcapping": 30.0, "head_dim": 256, "global_head_dim": 512, "attention_k_eq_v": True,
    "bos_token_id": 2, "eos_token_id": [1, 106], "pad_token_id": 0, "tie_word_embeddings": True,
    "max_position_embeddings": 262144, "sliding_window": 1024, "torch_dtype": "bfloat16",
    "use_bidirectional_attention": "vision",
}  # fmt: skip
_SHARED = {
    **_ALL, "model_type": "gemma4_text", "attention_k_eq_v": False, "max_position_embeddings": 131072,
    "sliding_window": 512, "num_attention_heads": 8, "hidden_size_per_layer_input": 256,
    "vocab_size_per_layer_input": 262144,
}  # fmt: skip
_STREAMS = {
    **_ALL, "model_type": "gemma3n_text", "vocab_size": 262400, "vocab_size_per_layer_input": 262144,
    "max_position_embeddings": 32768, "sliding_window": 512, "hidden_size": 2048, "num_attention_heads": 8,
    "num_key_value_heads": 2, "hidden_size_per_layer_input": 256, "laurel_rank": 64, "altup_num_inputs": 4,
    "rope_theta": 1e6, "rope_local_base_freq": 1e4,
}  # fmt: skip
for _key in ("global_head_dim", "attention_k_eq_v", "use_bidirectional_attention"):
    del _STREAMS[_key]
SHAPES: dict[str, dict[str, Any]] = {
    "gemma-3n-e2b": {
        **_STREAMS, "num_hidden_layers": 30, "num_kv_shared_layers": 10, "intermediate_size": [8192] * 30,
        "activation_sparsity_pattern": [0.95] * 10 + [0.0] * 20,
    },
    "gemma-3n-e4b": {
        **_STREAMS, "num_hidden_layers": 35, "num_kv_shared_layers": 15, "intermediate_size": [16384] * 35,
        "activation_sparsity_pattern": [0.95] * 10 + [0.0] * 25,
    },
    "gemma-4-e2b": {
        **_SHARED, "hidden_size": 1536, "num_hidden_layers": 35, "num_key_value_heads": 1, "intermediate_size": 6144,
        "num_kv_shared_layers": 20, "use_double_wide_mlp": True,
        "layer_types": [FULL if layer % 5 == 4 else SLIDING for layer in range(35)],
    },
    "gemma-4-e4b": {
        **_SHARED, "hidden_size": 2560, "num_hidden_layers": 42, "num_key_value_heads": 2, "intermediate_size": 10240,
        "num_kv_shared_layers": 18,
    },
    "gemma-4-12b": {
        **_ALL, "model_type": "gemma4_unified_text", "hidden_size": 3840, "num_hidden_layers": 48,
        "num_attention_heads": 16, "num_key_value_heads": 8, "num_global_key_value_heads": 1,
        "intermediate_size": 15360,
    },
    "gemma-4-26b-a4b": {
        **_ALL, "model_type": "gemma4_text", "hidden_size": 2816, "num_hidden_layers": 30, "num_attention_heads": 16,
        "num_key_value_heads": 8, "num_global_key_value_heads": 2, "intermediate_size": 2112,
        "hidden_size_per_layer_input": 0, "enable_moe_block": True, "num_experts": 128, "top_k_experts": 8,
        "moe_intermediate_size": 704,
    },
    "embedding-gemma-2": {
        "model_type": "embedding_gemma2", "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
        "text_config": {**TEXT_DEFAULTS, "num_global_key_value_heads": 1, "global_head_dim": 512},
    },
    # The width of the MLP has not been seen published; it is that of Gemma 3 27B, whose hidden size is the same.
    "gemma-4-31b": {
        **_ALL, "model_type": "gemma4_text", "hidden_size": 5376, "num_hidden_layers": 60, "num_attention_heads": 32,
        "num_key_value_heads": 16, "num_global_key_value_heads": 4, "intermediate_size": 21504,
        "hidden_size_per_layer_input": 0,
    },
}  # fmt: skip


def write_checkpoint(
    out: Path, raw: dict[str, Any], *, seed: int = 0, zeros: bool = False, tokenizer: Path | None = None
) -> Path:
    """Write config.json, generation_config.json and the shards, and return the directory.

    Args:
        raw: config.json; tokenizer: a directory whose tokenizer files are copied.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / CONFIG).write_text(json.dumps(raw, indent=1))
    stops = {key: raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (out / GENERATION_CONFIG).write_text(json.dumps(stops))
    for file in () if tokenizer is None else sorted(tokenizer.glob("*token*")):
        shutil.copyfile(file, out / file.name)
    config = ModelConfig.from_dict(raw, CONFIG)
    if config.architecture.encoder:
        write_pooling(out, config.token_size)
    shapes, unit, places = expected_tensors(config), 1 - config.architecture.norm_offset, dict[str, str]()
    # As published: a model without a head, inside one that reads images.
    stored = {
        name: f"language_model.{name.removeprefix('model.')}" if "text_config" in raw else name for name in shapes
    }
    rng, shards = np.random.default_rng(seed), _sharded(shapes)
    for number, names in enumerate(shards, 1):
        shard = f"model-{number:05}-of-{len(shards):05}.safetensors"
        places |= dict.fromkeys((stored[name] for name in names), shard)
        header, at = {}, 0
        for name in names:
            size = 2 * math.prod(shapes[name])
            header[stored[name]] = {"dtype": "BF16", "shape": list(shapes[name]), "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(header).encode()
        with (out / shard).open("wb") as target:
            target.write(struct.pack("<Q", len(text)) + text)
            if zeros:
                target.truncate(8 + len(text) + at)
                continue
            for name in names:
                mean, std = (unit, 0.1) if len(shapes[name]) == 1 else (0.0, 0.02)
                # Where scores are not scaled the norm of queries does it: with 1 for its weights softmax picks one
                # token of hundreds, and float32 of one program is 1e-3 from that of another after six layers.
                share = shapes[name][0] ** -0.5 if unit and name.endswith("q_norm.weight") else 1.0
                for start in range(0, count := math.prod(shapes[name]), BLOCK):
                    values = rng.standard_normal(min(BLOCK, count - start), np.float32) * (std * share) + mean * share
                    target.write(((values.view(np.uint32) + 0x8000) >> 16).astype("<u2").data)
    index = {"metadata": {}, "weight_map": places}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    return out


def _sharded(shapes: dict[str, tuple[int, ...]]) -> list[list[str]]:
    """Names of the tensors of each file, in model order."""
    shards: list[list[str]] = [[]]
    held = 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        if shards[-1] and held + size > SHARD_BYTES:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards


def main() -> None:
    """Read the command line and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--zeros", action="store_true")
    parser.add_argument("--tokenizer", type=Path)
    args = parser.parse_args()
    raw = SHAPES[args.shape]
    if args.layers:
        own = {"num_hidden_layers": args.layers}
        raw = raw | ({"text_config": raw["text_config"] | own} if "text_config" in raw else own)
    write_checkpoint(args.out, raw, seed=args.seed, zeros=args.zeros, tokenizer=args.tokenizer)


if __name__ == "__main__":
    main()
