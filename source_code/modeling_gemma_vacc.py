"""Patched Gemma 1: legacy rotary, explicit masks, strided slice in prefill, int8 linears; the stock numbers.

Copied beside the weights and loaded by transformers as remote code; needs torch and transformers alone.
"""

from torch import nn
from transformers import PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_gemma_vacc import GemmaConfig
from .decoder_vacc import CausalLMMixin, SequenceClassificationMixin, TextModelMixin
from .layers_vacc import FULL, MLP, Attention, LegacyRotary, RMSNorm, ScaledEmbedding

__all__ = ["GemmaForCausalLM", "GemmaForSequenceClassification", "GemmaModel", "GemmaPreTrainedModel"]


class GemmaDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: GemmaConfig, layer_idx: int):
        super().__init__()
        self.self_attn = Attention(config, layer_idx, scaling=config.head_dim**-0.5)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, config.hidden_act)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states, position_embeddings, attention_mask, past_key_values=None):
        """hidden_states: [batch, seq, hidden] -> the same, probabilities, present (see `Attention`)."""
        attn, probs, present = self.self_attn(
            self.input_layernorm(hidden_states), position_embeddings, attention_mask, past_key_values
        )
        hidden_states = hidden_states + attn
        hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states, probs, present


class GemmaPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation."""

    config_class = GemmaConfig
    config: GemmaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GemmaDecoderLayer"]  # noqa: RUF012 (transformers' own form)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, RMSNorm):
            nn.init.zeros_(module.weight)


class GemmaModel(TextModelMixin, GemmaPreTrainedModel):
    """Embedding, decoder layers, final norm."""

    def __init__(self, config: GemmaConfig):
        super().__init__(config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = ScaledEmbedding(
            config.vocab_size, config.hidden_size, config.pad_token_id, config.embed_scale
        )
        self.layers = nn.ModuleList(GemmaDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = nn.ModuleDict({FULL: LegacyRotary.of(config.head_dim, config.rope_parameters)})
        self.gradient_checkpointing = False
        self.post_init()


class GemmaForCausalLM(CausalLMMixin, GemmaPreTrainedModel, GenerationMixin):
    """Gemma 1 with its language model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: GemmaConfig):
        super().__init__(config)
        self.model = GemmaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class GemmaForSequenceClassification(SequenceClassificationMixin, GemmaPreTrainedModel):
    """Gemma 1 with a classification head on the last real token."""

    def __init__(self, config: GemmaConfig):
        super().__init__(config)
        self.model = GemmaModel(config)
        self._make_head(config)
        self.post_init()
