"""What the names in adapter_model.safetensors mean: which module of the model, and which part of its update.

peft writes `base_model.model.`, the module's path in the model that was trained, and the part (`.lora_A.weight`). That
model may be another class than the one here: the multimodal Gemma, or the base model without its head.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from gemma_deploy.checkpoint.naming import PREFIX, TOWERS, inside, is_inside
from gemma_deploy.names import HEAD

ADAPTER_PREFIX = "base_model.model."
# Ending -> part, the longest first. What is not among them is a module's own weight or bias.
PARTS = {
    ".token_adapter.trainable_tokens_delta": "tokens",
    ".token_adapter.base_layer.weight": "base",
    ".original_module.weight": "base",
    ".modules_to_save.weight": "copy",  # the same numbers as the module's own weight, which peft reads
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector": "magnitude",
    ".lora_embedding_A": "embedding_A",
    ".lora_embedding_B": "embedding_B",
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_B.bias": "lora_bias",
    ".base_layer.weight": "base",
    ".base_layer.bias": "bias",
    ".weight": "weight",
    ".bias": "bias",
}


@dataclass(frozen=True)
class Named:
    """One tensor of the file.

    Args:
        stored: its name there.
        trained: path of the module in the model that was trained; patterns of the settings are about it.
        module: path of the module here; None where the model has no such module.
        part: see `PARTS`; "" for none of them.
        tower: of a multimodal model, which a text model has no use for; "" for none.
    """

    stored: str
    trained: str
    module: str | None
    part: str
    tower: str = ""

    @property
    def multimodal(self) -> bool:
        """Whether the name is one of a multimodal model."""
        return bool(self.tower) or is_inside(self.trained)


def name_of(stored: str, modules: Collection[str]) -> Named:
    """Find a tensor's module.

    Args:
        stored: its name in the file.
        modules: paths of the model's modules that have weights.
    """
    if not stored.startswith(ADAPTER_PREFIX):
        return Named(stored, stored, None, "")
    inner = stored.removeprefix(ADAPTER_PREFIX)
    ending = next((ending for ending in PARTS if inner.endswith(ending)), "")
    part = PARTS.get(ending, "")
    trained = inner.removesuffix(ending)
    tower = trained.removeprefix(PREFIX).partition(".")[0]
    if tower in TOWERS:
        return Named(stored, trained, None, part, tower)
    return Named(stored, trained, next((path for path in _paths(trained) if path in modules), None), part)


def _paths(trained: str) -> list[str]:
    """What a module's path may be here."""
    return [trained, *inside(trained), *([] if trained == HEAD else [PREFIX + trained])]
