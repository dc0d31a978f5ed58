"""Patched VaultGemma: legacy rotary, explicit masks, soft caps, strided slice, int8 linears; the stock eager numbers.

The attention cap comes before the mask. transformers' SDPA drops it: compare with `attn_implementation="eager"`.
Copied beside the weights and loaded by transformers as remote code; needs torch and transformers alone.
"""

from torch import nn
from transformers import PreTrainedModel
from transformers.generation import GenerationMixin

from .configuration_vaultgemma_vacc import VaultGemmaConfig
from .decoder_vacc import CausalLMMixin, TextModelMixin
from .layers_vacc import Attention, FourNormLayer, LegacyRotary, RMSNorm, ScaledEmbedding

__all__ = [
    "VaultGemmaForCausalLM",
    "VaultGemmaModel",
    "VaultGemmaPreTrainedModel",
]


class VaultGemmaDecoderLayer(FourNormLayer):
    """Gemma 2's layer without the norms before the residual adds; sliding and global layers take turns."""

    def __init__(self, config: VaultGemmaConfig, layer_idx: int):
        scaling, softcap = config.query_pre_attn_scalar**-0.5, config.attn_logit_softcapping
        super().__init__(config, Attention(config, layer_idx, scaling=scaling, softcap=softcap))
        self.post_attention_layernorm = nn.Identity()
        self.post_feedforward_layernorm = nn.Identity()


class VaultGemmaPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation."""

    config_class = VaultGemmaConfig
    config: VaultGemmaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["VaultGemmaDecoderLayer"]  # noqa: RUF012 (transformers' own form)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, RMSNorm):
            nn.init.zeros_(module.weight)


class VaultGemmaModel(TextModelMixin, VaultGemmaPreTrainedModel):
    """Embedding, decoder layers, final norm; one rotary table for both kinds of layer."""

    def __init__(self, config: VaultGemmaConfig):
        super().__init__(config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = ScaledEmbedding(
            config.vocab_size, config.hidden_size, config.pad_token_id, config.embed_scale
        )
        self.layers = nn.ModuleList(VaultGemmaDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        rope = config.rope_parameters
        self.rotary = nn.ModuleDict(
            {kind: LegacyRotary.of(config.head_dim, rope) for kind in sorted(set(config.layer_types))}
        )
        self.gradient_checkpointing = False
        self.post_init()


class VaultGemmaForCausalLM(CausalLMMixin, VaultGemmaPreTrainedModel, GenerationMixin):
    """VaultGemma with its language model head; its logits are capped."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: VaultGemmaConfig):
        super().__init__(config)
        self.model = VaultGemmaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
