"""What peft itself computes: adapters moved a little, saved, and loaded onto the model again, unmerged, in float32."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

PROMPT = 24  # tokens, three windows of the tiny models

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base_model(checkpoint: Path, vocabulary: int | None = None) -> Any:
    """transformers' class in float32 with eager attention; resized where a vocabulary is given."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    if vocabulary is not None:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    return model.eval()


def save_adapter(checkpoint: Path, out: Path, *, seed: int = 0, vocabulary: int | None = None, **fields: Any) -> Path:
    """Save a LoRA whose every trained number was moved; `fields` are those of `LoraConfig`."""
    import peft

    torch.manual_seed(seed)
    fields = {"r": 4, "lora_alpha": 8, "target_modules": SEVEN, "task_type": "CAUSAL_LM", **fields}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base_model(checkpoint, vocabulary), peft.LoraConfig(**fields))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(out)
    return out


def unmerged(checkpoint: Path, *adapters: tuple[Path, float], vocabulary: int | None = None) -> Any:
    """The model as peft loads it: adapters with their weights, all active, none merged."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = base_model(checkpoint, vocabulary)
        model = peft.PeftModel.from_pretrained(base, adapters[0][0], adapter_name="a0")
        for number, (path, _) in enumerate(adapters[1:], 1):
            model.load_adapter(path, adapter_name=f"a{number}")
        names = [f"a{number}" for number in range(len(adapters))]
        if len(names) > 1:
            model.base_model.set_adapter(names)
        for module in model.modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                for name, (_, weight) in zip(names, adapters, strict=True):
                    module.set_scale(name, weight)
    return model.eval()


def logits(model: Any, vocabulary: int = 512) -> torch.Tensor:
    """[2, PROMPT, vocabulary] on fixed tokens."""
    tokens = torch.randint(3, vocabulary, (2, PROMPT), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=tokens).logits
    return found


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference, relative to the largest number."""
    return float((one - other).abs().max() / other.abs().max())
