"""Patched VaultGemma: legacy rotary, explicit masks, soft caps, strided slice, int8 linears; the stock eager numbers.

The attention cap comes before the mask. transformers' SDPA drops it: compare with `attn_implementation="eager"`.
Copied beside the weights and loaded by transformers as remote code; needs torch and transformers alone.
"""

from torch import nn
from transformers import PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_vaultgemma_vacc import VaultGemmaConfig
from .decoder_vacc import CausalLMMixin, TextModelMixin
from .layers_vacc import MLP, Attention, LegacyRotary, RMSNorm, ScaledEmbedding

__all__ = [
    "VaultGemmaForCausalLM",
    "VaultGemmaModel",
    "VaultGemmaPreTrainedModel",
]


class VaultGemmaDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention with capped scores, and MLP; sliding and global layers take turns, the first one slides."""

    def __init__(self, config: VaultGemmaConfig, layer_idx: int):
        super().__init__()
        scaling, softcap = config.query_pre_attn_scalar**-0.5, config.attn_logit_softcapping
        self.self_attn = Attention(config, layer_idx, scaling=scaling, softcap=softcap)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, config.hidden_activation)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.pre_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states, position_embeddings, attention_mask, past_key_values=None):
        """hidden_states: [batch, seq, hidden] -> the same, probabilities, present (see `Attention`)."""
        attn, probs, present = self.self_attn(
            self.input_layernorm(hidden_states), position_embeddings, attention_mask, past_key_values
        )
        hidden_states = hidden_states + attn
        hidden_states = hidden_states + self.mlp(self.pre_feedforward_layernorm(hidden_states))
        return hidden_states, probs, present


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
