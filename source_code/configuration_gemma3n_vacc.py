"""Configuration of the patched Gemma 3n text model: the stock configuration plus the keys of the patch.

Copied beside the weights and loaded by transformers as remote code; needs transformers alone.
"""

from huggingface_hub.dataclasses import strict
from transformers.models.gemma3n.configuration_gemma3n import Gemma3nTextConfig as StockGemma3nTextConfig

__all__ = ["Gemma3nTextConfig"]


@strict
class Gemma3nTextConfig(StockGemma3nTextConfig):
    r"""Gemma 3n text configuration with the switches of the patched model.

    Args:
        iter_num (`int`, *optional*): which static graph is traced: 0 prefill, 1 decode, None ordinary use.
        insert_slice (`bool`): with `iter_num` 0, keep only the last position before the LM head.
        embed_scale (`str`): `exact` rounds sqrt(hidden_size) to the run dtype, `bf16` to bfloat16 first.
        per_layer_vectors (`int`, *optional*): layers of the whole model, for which a per-layer table has vectors.
    """

    iter_num: int | None = None
    insert_slice: bool = False
    embed_scale: str = "exact"
    per_layer_vectors: int | None = None
