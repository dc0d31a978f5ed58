"""Which tensors a Gemma checkpoint must hold, and their shapes: one table for all three generations."""

from __future__ import annotations

from gemma_deploy.checkpoint.config import ModelConfig

TWO_NORMS = ("input_layernorm", "post_attention_layernorm")
FOUR_NORMS = (*TWO_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
NORMS = {"gemma": TWO_NORMS, "gemma2": FOUR_NORMS, "gemma3_text": FOUR_NORMS}
HEAD_NORMS = {"gemma": (), "gemma2": (), "gemma3_text": ("self_attn.q_norm", "self_attn.k_norm")}


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face names and shapes ([out, in] for linears) in model order; no lm_head.weight when it is tied."""
    hidden, inter = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inter, hidden),
        "mlp.up_proj": (inter, hidden),
        "mlp.down_proj": (hidden, inter),
    }
    layer |= {name: (config.head_dim,) for name in HEAD_NORMS[config.model_type]}
    layer |= {name: (hidden,) for name in NORMS[config.model_type]}
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for index in range(config.num_hidden_layers):
        tensors |= {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
    tensors["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        tensors["lm_head.weight"] = (config.vocab_size, hidden)
    return tensors
