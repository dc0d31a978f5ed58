"""Adapters that PEFT itself writes, for tests: every trained value is another one than at the beginning."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def base_model(checkpoint: Path, **changes: Any) -> Any:
    """The stock class with eager attention in float32, for evaluation."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        checkpoint, attn_implementation="eager", dtype=torch.float32, **changes
    ).eval()


def write_adapter(checkpoint: Path, out: Path, *, seed: int = 0, vocab_size: int | None = None, **settings: Any) -> Any:
    """Save an adapter of a checkpoint as PEFT does, and return PEFT's model of it, unmerged.

    Args:
        seed: of the values; vocab_size: resize the table to so many rows first; settings: of `LoraConfig`.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    settings = {"target_modules": list(SEVEN), "r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **settings}
    model = base_model(checkpoint)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice about merging
        if vocab_size is not None:
            model.resize_token_embeddings(vocab_size, mean_resizing=False)
        model = get_peft_model(model, LoraConfig(**settings))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if not parameter.requires_grad:
                    continue
                noise = torch.randn(parameter.shape, generator=generator)
                if "magnitude" in name:
                    parameter.mul_(1 + 0.2 * noise)
                else:  # as large as the base's own weights
                    parameter.add_(0.15 * noise)
        model.save_pretrained(out)
    return model.eval()
