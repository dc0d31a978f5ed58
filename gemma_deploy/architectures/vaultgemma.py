"""VaultGemma: Gemma 2 without the norms behind attention and MLP."""

from __future__ import annotations

from gemma_deploy.architectures import gemma2
from gemma_deploy.architectures.base import Architecture, LayerSpec, Patched, Sizes
from gemma_deploy.architectures.shared import attention, decoder_layer, gated_mlp

BRANCHES = (attention(post_norm=None), gated_mlp(norm="pre_feedforward_layernorm", post_norm=None))
NORMS = ("input_layernorm", "pre_feedforward_layernorm")


def layer(config: Sizes, index: int) -> LayerSpec:
    """What decoder layer `index` of a VaultGemma computes."""
    scale = config.query_pre_attn_scalar**-0.5
    return decoder_layer(config, index, branches=BRANCHES, norms=NORMS, attention_scale=scale)


VAULTGEMMA = Architecture(
    name="VaultGemma",
    model_type="vaultgemma",
    transformers_type="vaultgemma",
    causal_class="VaultGemmaForCausalLM",
    openvino=True,
    genai_type="gemma2",  # the same loop; onnxruntime-genai has no name of its own for it
    activation_key=gemma2.ACTIVATION_KEY,
    patched=Patched(
        configuration="configuration_vaultgemma_vacc",
        config_class="VaultGemmaConfig",
        modeling="modeling_vaultgemma_vacc",
        stack="VaultGemmaModel",
        causal="VaultGemmaForCausalLM",
        classifier=None,
    ),
    gguf=None,
    read=gemma2.read,
    layer=layer,
    branches=BRANCHES,
)
