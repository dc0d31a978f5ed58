"""Which tensors a checkpoint must hold, and their shapes, in model order."""

from __future__ import annotations

from gemma_deploy.checkpoint.config import LM_HEAD, TABLE, ModelConfig

NORM = "model.norm.weight"


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face names and shapes ([out, in] for linears) in model order; no lm_head.weight when it is tied."""
    table = (config.vocab_size, config.hidden_size)
    tensors: dict[str, tuple[int, ...]] = {TABLE: table}
    for layer in config.layers:
        tensors |= {f"{layer.prefix}{name}.weight": shape for name, shape in layer.tensors().items()}
    tensors[NORM] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        tensors[LM_HEAD] = table
    return tensors
