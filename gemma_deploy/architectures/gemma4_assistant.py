"""Gemma 4 assistants: drafters of a few Gemma 4 layers that have queries alone (multi-token prediction).

From the embedding of the last token and the last hidden state of the model they guess for, [2 * backbone], to the next
token and what stands for the next hidden state; keys and values are those of that model's last layer of each kind that
has some. Every token guessed in a row has one position, that of the token in front of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from gemma_deploy.architectures.base import Facts, LayerSpec, Sizes
from gemma_deploy.architectures.drafting import Drafting
from gemma_deploy.architectures.gemma4 import GEMMA4, GEMMA4_UNIFIED, read, with_keys
from gemma_deploy.architectures.keys import ConfigKeys
from gemma_deploy.architectures.sharing import SHARED_LAYERS, queries_alone

BACKBONE, ORDERED, GROUPS, CHOSEN = (
    *("backbone_hidden_size", "use_ordered_embeddings"),
    *("num_centroids", "centroid_intermediate_top_k"),
)
# Of transformers' Gemma4AssistantConfig.
BACKBONE_SIZE, GROUP_COUNT, CHOSEN_COUNT = 1536, 2048, 32


def read_assistant(keys: ConfigKeys, size: Mapping[str, int], layers: int) -> Facts:
    """What config.json says about an assistant, defaults filled in."""
    for key in ("enable_moe_block", "use_double_wide_mlp", "hidden_size_per_layer_input"):
        if value := keys.raw.get(key):
            keys.problem(key, value, "0 or false: no assistant has it")
    if (shared := keys.raw.get(SHARED_LAYERS)) not in (None, 0, layers):
        keys.problem(SHARED_LAYERS, shared, f"{layers}: all layers of an assistant read keys and values of its model")
    inner = ConfigKeys({key: value for key, value in keys.raw.items() if key != SHARED_LAYERS}, keys.where)
    inner.problems, inner.warnings = keys.problems, keys.warnings
    facts = read(inner, size, layers)
    backbone, groups, chosen = keys.integer(BACKBONE, default=BACKBONE_SIZE), 0, 0
    if keys.boolean(ORDERED, False):
        groups, chosen = keys.integer(GROUPS, default=GROUP_COUNT), keys.integer(CHOSEN, default=CHOSEN_COUNT)
        if size["vocab_size"] % groups:
            keys.problem(GROUPS, groups, f"a divisor of vocab_size {size['vocab_size']}")
        if chosen > groups:
            keys.problem(CHOSEN, chosen, f"{groups} at most, as many as {GROUPS}")
    # transformers' class does not cap the logits of an assistant, whatever its text_config says
    return replace(facts, final_logit_softcapping=None, drafting=Drafting(backbone, groups, chosen))


def layer(config: Sizes, index: int) -> LayerSpec:
    """What layer `index` of an assistant computes."""
    return queries_alone(with_keys(config, index))


GEMMA4_ASSISTANT = replace(
    GEMMA4,
    name="Gemma 4 assistant",
    model_type="gemma4_assistant",
    transformers_type="gemma4_assistant",
    causal_class="Gemma4AssistantForCausalLM",
    gguf=None,
    read=read_assistant,
    layer=layer,
    per_layer=lambda config: None,
    multimodal=("gemma4_assistant",),
    text_type="gemma4_text",
    around=(BACKBONE, ORDERED, GROUPS, CHOSEN),
)
GEMMA4_UNIFIED_ASSISTANT = replace(
    GEMMA4_ASSISTANT,
    name="Gemma 4 12B assistant",
    model_type="gemma4_unified_assistant",
    transformers_type="gemma4_unified_assistant",
    causal_class="Gemma4UnifiedAssistantForCausalLM",
    patched=GEMMA4_UNIFIED.patched,
    multimodal=("gemma4_unified_assistant",),
    text_defaults=GEMMA4_UNIFIED.text_defaults,
    text_type="gemma4_unified_text",
)
