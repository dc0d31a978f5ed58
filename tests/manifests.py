"""Manifests of no artifact: every key there, those that matter to a test given."""

from typing import Any

from gemma_deploy.artifact.manifest import FORMAT_VERSION, Manifest

ROW = {
    "name": "model.norm.weight",
    "dtype": "float32",
    "shape": [64],
    "offset": 4096,
    "nbytes": 256,
    "sha256": "",
    "scheme": "cast",
    "file": "params.safetensors",
}
PLAIN: dict[str, Any] = {
    "format_version": FORMAT_VERSION,
    "name": "x",
    "key": "0" * 64,
    "tool": {},
    "recipe": {
        "frontend": {"checkpoint": "demo", "model_kwargs": {"embed_scale": "exact", "tp": 1}},
        "backend": {"type": "tvm_vacc", "dtype": "fp32"},
        "parity": {"text": None, "prompt_tokens": 64, "decode_tokens": 32},
    },
    "carried_for_the_vendor": [],
    "checkpoint": {"path": "demo", "format": "safetensors", "fingerprint": "", "fingerprint_without_times": ""},
    "model": {
        "model_type": "gemma",
        "num_hidden_layers": 2,
        "num_key_value_heads": 1,
        "vocab_size": 512,
        "hidden_size": 64,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "eos_token_ids": [1],
    },
    "scheme": "fp32",
    "int8_cache": False,
    "storage": None,
    "contract": {
        "batch": 1,
        "prefill": 16,
        "context": 32,
        "vocab_size": 512,
        "kv_heads": 1,
        "head_dim": 32,
        "dynamic": False,
        "graphs": {},
    },
    "parts": [],
    "op_census": {},
    "calibration": None,
    "quantization": None,
    "params": [ROW],
    "rescaling": None,
    "kernels": None,
    "parity": None,
    "stages": [],
    "ledger": [],
    "files": {},
}


def plain_manifest(**changes: Any) -> dict[str, Any]:
    """As JSON; a dictionary among `changes` changes single keys of the one that is there."""
    return _merged(PLAIN, changes)


def manifest(**changes: Any) -> Manifest:
    """See `plain_manifest`."""
    return Manifest.of(plain_manifest(**changes))


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    found = dict(base)
    for key, value in changes.items():
        inner = found.get(key)
        found[key] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return found
