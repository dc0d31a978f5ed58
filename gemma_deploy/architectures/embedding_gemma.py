"""EmbeddingGemma: Gemma 3 whose positions see those behind them as well; texts become vectors.

config.json says `gemma3_text` with `use_bidirectional_attention`. Full layers see everything. Sliding ones see half of
`sliding_window` on either side: transformers' class halves the number of the file when it reads it (512 becomes 257,
the first distance that is too far).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from gemma_deploy.architectures import gemma3
from gemma_deploy.architectures.base import Facts, LayerSpec, Sizes
from gemma_deploy.architectures.keys import ConfigKeys


def read(keys: ConfigKeys, size: Mapping[str, int], layers: int) -> Facts:
    """What config.json says about it: a Gemma 3's keys."""
    facts = gemma3.read(keys, size, layers)
    if facts.attn_logit_softcapping is not None:
        keys.problem("attn_logit_softcapping", facts.attn_logit_softcapping, "null: no encoder has soft caps")
    return facts


def layer(config: Sizes, index: int) -> LayerSpec:
    """What layer `index` computes: a Gemma 3's, whose window lies on both sides."""
    made = gemma3.layer(config, index)
    return made if made.window is None else replace(made, window=2 * (made.window // 2) + 1)


EMBEDDING_GEMMA = replace(
    gemma3.GEMMA3,
    name="EmbeddingGemma",
    model_type="embedding_gemma",
    written_as=gemma3.GEMMA3.model_type,
    genai_type="",
    patched=replace(gemma3.GEMMA3.patched, classifier=None),
    gguf=None,
    read=read,
    layer=layer,
    multimodal=(),
    text_defaults={},
    encoder=True,
)
