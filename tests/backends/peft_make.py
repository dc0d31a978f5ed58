"""LoRA adapters as PEFT makes and computes them, and the inputs of a graph that stand for them."""

from __future__ import annotations

from typing import Any

import numpy as np

SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def adapted(model: Any, seed: int, *, rank: int = 4, alpha: int = 12, name: str = "default", **settings: Any) -> Any:
    """A causal LM of transformers with a random adapter, unmerged, in evaluation mode; A and B are both random.

    Args:
        model: of transformers, or what this function gave, which gets an adapter more.
    """
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model

    settings = {"target_modules": list(SEVEN), **settings}
    config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights=False, **settings)
    torch.manual_seed(seed)
    if isinstance(model, PeftModel):
        model.add_adapter(name, config)
    else:
        model = get_peft_model(model, config, adapter_name=name)
    for key, value in model.named_parameters():
        if f"lora_A.{name}" in key or f"lora_B.{name}" in key:
            value.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(seed + len(key)))
    model.set_adapter(name)
    return model.eval()


def inputs_of(model: Any, name: str = "default") -> dict[str, np.ndarray]:
    """What the graph takes in the place of an adapter: A [in, r], and B [r, out] times its scaling."""
    from peft.tuners.lora import LoraLayer

    found = {}
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer) and name in module.lora_A:
            path = path.removeprefix("base_model.model.")
            found[f"{path}.lora_A"] = module.lora_A[name].weight.detach().numpy().T.copy()
            up = module.lora_B[name].weight.detach().numpy().T
            found[f"{path}.lora_B"] = np.float32(module.scaling[name]) * up
    return found
