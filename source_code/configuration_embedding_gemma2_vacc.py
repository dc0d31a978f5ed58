"""Configuration of the patched EmbeddingGemma 2 text model: the stock configuration plus the keys of the patch.

Copied beside the weights and loaded by transformers as remote code; needs transformers alone.
"""

from huggingface_hub.dataclasses import strict
from transformers.models.embedding_gemma2.configuration_embedding_gemma2 import (
    EmbeddingGemma2TextConfig as StockEmbeddingGemma2TextConfig,
)

from .configuration_gemma4_vacc import Switches

__all__ = ["EmbeddingGemma2TextConfig"]


@strict
class EmbeddingGemma2TextConfig(Switches, StockEmbeddingGemma2TextConfig):
    r"""EmbeddingGemma 2 text configuration with the switches of the patched model.

    Args:
        iter_num (`int`, *optional*): 0 where a static graph is traced, None in ordinary use.
        insert_slice (`bool`): of a decoder alone.
        embed_scale (`str`): `exact` rounds sqrt(hidden_size) to the run dtype, `bf16` to bfloat16 first.
        is_part (`bool`): the layers are some of a model's.
        per_layer_vectors (`int`, *optional*): layers of the whole model, for which there are vectors.
    """

    iter_num: int | None = None
    insert_slice: bool = False
    embed_scale: str = "exact"
    is_part: bool = False
    per_layer_vectors: int | None = None
