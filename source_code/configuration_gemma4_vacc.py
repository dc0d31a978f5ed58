"""Configuration of the patched Gemma 4 text model: the stock configuration plus the keys of the patch.

Copied beside the weights and loaded by transformers as remote code; needs transformers alone.
"""

from huggingface_hub.dataclasses import strict
from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig as StockGemma4TextConfig
from transformers.models.gemma4_unified.configuration_gemma4_unified import (
    Gemma4UnifiedTextConfig as StockGemma4UnifiedTextConfig,
)

__all__ = ["Gemma4TextConfig", "Gemma4UnifiedTextConfig"]


class Switches:
    """What both configurations add.

    The stock class makes the last layer one of full attention. In a part of a model (`is_part`) the last layer is not
    that of the model, and keeps its kind; such a config brings `layer_types` and `per_layer_config`.
    """

    def __post_init__(self, **kwargs):
        kinds = list(self.layer_types) if self.is_part else []
        if kinds:
            self.layer_types = [*kinds[:-1], "full_attention"]
        super().__post_init__(**kwargs)
        if kinds:
            self.layer_types = kinds


@strict
class Gemma4TextConfig(Switches, StockGemma4TextConfig):
    r"""Gemma 4 text configuration with the switches of the patched model.

    Args:
        iter_num (`int`, *optional*): which static graph is traced: 0 prefill, 1 decode, None ordinary use.
        insert_slice (`bool`): with `iter_num` 0, keep only the last position before the LM head.
        embed_scale (`str`): `exact` rounds sqrt(hidden_size) to the run dtype, `bf16` to bfloat16 first.
        is_part (`bool`): the layers are some of a model's.
        per_layer_vectors (`int`, *optional*): layers of the whole model, for which a per-layer table has vectors.
    """

    iter_num: int | None = None
    insert_slice: bool = False
    embed_scale: str = "exact"
    is_part: bool = False
    per_layer_vectors: int | None = None


@strict
class Gemma4UnifiedTextConfig(Switches, StockGemma4UnifiedTextConfig):
    r"""The same for Gemma 4 12B, whose text model has a model type of its own.

    Args:
        iter_num (`int`, *optional*): which static graph is traced: 0 prefill, 1 decode, None ordinary use.
        insert_slice (`bool`): with `iter_num` 0, keep only the last position before the LM head.
        embed_scale (`str`): `exact` rounds sqrt(hidden_size) to the run dtype, `bf16` to bfloat16 first.
        is_part (`bool`): the layers are some of a model's.
    """

    iter_num: int | None = None
    insert_slice: bool = False
    embed_scale: str = "exact"
    is_part: bool = False
