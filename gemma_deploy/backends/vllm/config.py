"""`quantization_config` of config.json, as compressed-tensors and vLLM read it (compressed-tensors 0.20)."""

from __future__ import annotations

from typing import Any

from gemma_deploy.backends.spec import BuildSpec
from gemma_deploy.checkpoint import ModelConfig
from gemma_deploy.checkpoint.quantized.settings import COMPRESSED, COMPRESSED_STATUS, KEY
from gemma_deploy.names import HEAD
from gemma_deploy.schemes import Codes

PACKED, INTEGERS = "pack-quantized", "int-quantized"
# The dtype that activations have unless told otherwise: that of Gemma's checkpoints.
DTYPE = "bfloat16"


def config_keys(spec: BuildSpec, config: ModelConfig) -> dict[str, Any]:
    """What config.json says beside what the checkpoint's does."""
    dtype = "float32" if spec.scheme.weights == "fp32" else DTYPE
    keys: dict[str, Any] = {"architectures": [config.architecture.causal_class], "torch_dtype": dtype, "dtype": dtype}
    if not spec.scheme.codes:
        return keys
    storage, rounds = spec.storage(config.hidden_size), spec.scheme.rounds_activations
    groups = {"group_0": _group(["Linear"], storage.linears, rounds=rounds)}
    if storage.kept_w8:  # the first that matches a name decides, and names match before classes
        kept = [f"re:.*{kind}$" for kind in storage.kept_w8]
        groups = {"group_0": _group(kept, storage.linear(storage.kept_w8[0]), rounds=False),
                  "group_1": groups["group_0"]}  # fmt: skip
    return keys | {
        KEY: {
            "quant_method": COMPRESSED,
            "format": INTEGERS if rounds else PACKED,
            "quantization_status": COMPRESSED_STATUS,
            "config_groups": groups,
            "ignore": [HEAD],
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }
    }


def _group(targets: list[str], codes: Codes, *, rounds: bool) -> dict[str, Any]:
    weights = {
        "num_bits": codes.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if codes.groupsize is None else "group",
        "group_size": codes.groupsize,
        "dynamic": False,
        "observer": "minmax",
    }
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    return {"targets": targets, "weights": weights, "input_activations": inputs if rounds else None}
