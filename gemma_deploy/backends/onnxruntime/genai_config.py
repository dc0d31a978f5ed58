"""genai_config.json: what onnxruntime-genai needs to know of the graph, so that it runs the artifact as it is."""

from __future__ import annotations

from typing import Any

from gemma_deploy.backends.onnxruntime.options import GRAPH
from gemma_deploy.backends.onnxruntime.window import windowed_layers
from gemma_deploy.checkpoint.config import ModelConfig

CONFIG_FILE = "genai_config.json"


def genai_config(
    config: ModelConfig,
    context_length: int,
    chunk_size: int | None = None,
    gpu: bool = False,
    windowed: bool = False,
) -> dict[str, Any]:
    """The file's content.

    Args:
        context_length: positions that the rotary tables cover.
        chunk_size: tokens of a prompt that run together; None for all. gpu: ask for the CUDA provider.
        windowed: caches of layers with a sliding window hold that alone; the operator moves what is in them.
    """
    window = {
        "window_size": config.sliding_window,
        "slide_key_value_cache": False,
        "slide_inputs": False,
        "layers": list(windowed_layers(config)),
    }
    sliding = {"sliding_window": window} if windowed else {}
    return {
        "model": {
            "bos_token_id": config.bos_token_id,
            "context_length": context_length,
            "decoder": {
                "session_options": {
                    "log_id": "onnxruntime-genai",
                    "intra_op_num_threads": 0,  # one per core; without it genai 0.18 took one of two
                    "provider_options": [{"cuda": {}}] if gpu else [],
                },
                "filename": GRAPH,
                "head_size": config.head_dim,
                "hidden_size": config.hidden_size,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "num_attention_heads": config.num_attention_heads,
                "num_hidden_layers": config.num_hidden_layers,
                "num_key_value_heads": config.num_key_value_heads,
            }
            | sliding,
            "eos_token_id": list(config.eos_token_ids),
            "pad_token_id": 0 if config.pad_token_id is None else config.pad_token_id,
            "type": config.model_type,
            "vocab_size": config.vocab_size,
        },
        "search": {
            "do_sample": False,
            "early_stopping": True,
            "max_length": context_length,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": True,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 50,
            "top_p": 1.0,
        }
        | ({} if chunk_size is None else {"chunk_size": chunk_size}),
    }
