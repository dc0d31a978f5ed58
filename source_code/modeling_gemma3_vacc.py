"""Patched Gemma 3 text: legacy rotary per layer kind, explicit masks, strided slice, int8 linears; the stock numbers.

Copied beside the weights and loaded by transformers as remote code; needs torch and transformers alone.
"""

from torch import nn
from transformers import PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_gemma3_vacc import Gemma3TextConfig
from .decoder_vacc import CausalLMMixin, SequenceClassificationMixin, TextModelMixin
from .layers_vacc import MLP, Attention, LegacyRotary, RMSNorm, ScaledEmbedding

__all__ = ["Gemma3ForCausalLM", "Gemma3PreTrainedModel", "Gemma3TextForSequenceClassification", "Gemma3TextModel"]


class Gemma3DecoderLayer(GradientCheckpointingLayer):
    """Attention and MLP, each with a norm before it and a norm before its residual add."""

    def __init__(self, config: Gemma3TextConfig, layer_idx: int):
        super().__init__()
        self.self_attn = Attention(config, layer_idx, scaling=config.query_pre_attn_scalar**-0.5, qk_norm=True)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, config.hidden_activation)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.pre_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states, position_embeddings, attention_mask, past_key_values=None):
        """hidden_states: [batch, seq, hidden] -> the same, probabilities, present (see `Attention`)."""
        attn, probs, present = self.self_attn(
            self.input_layernorm(hidden_states), position_embeddings, attention_mask, past_key_values
        )
        hidden_states = hidden_states + self.post_attention_layernorm(attn)
        mlp = self.mlp(self.pre_feedforward_layernorm(hidden_states))
        hidden_states = hidden_states + self.post_feedforward_layernorm(mlp)
        return hidden_states, probs, present


class Gemma3PreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation."""

    config_class = Gemma3TextConfig
    config: Gemma3TextConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Gemma3DecoderLayer"]  # noqa: RUF012 (transformers' own form)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, RMSNorm):
            nn.init.zeros_(module.weight)


class Gemma3TextModel(TextModelMixin, Gemma3PreTrainedModel):
    """Embedding, decoder layers, final norm; a rotary table for each kind of layer present."""

    def __init__(self, config: Gemma3TextConfig):
        super().__init__(config)
        if config.use_bidirectional_attention:
            raise ValueError("config.use_bidirectional_attention is set; the patched model is causal")
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = ScaledEmbedding(
            config.vocab_size, config.hidden_size, config.pad_token_id, config.embed_scale
        )
        self.layers = nn.ModuleList(Gemma3DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = nn.ModuleDict()
        for kind in sorted(set(config.layer_types)):
            rope = config.rope_parameters[kind]
            if rope["rope_type"] not in ("default", "linear"):
                raise ValueError(
                    f"config.rope_parameters.{kind}.rope_type is {rope['rope_type']!r}; allowed: default, linear"
                )
            factor = rope.get("factor", 1.0) if rope["rope_type"] == "linear" else 1.0
            self.rotary[kind] = LegacyRotary(config.head_dim, rope["rope_theta"], factor)
        self.gradient_checkpointing = False
        self.post_init()


class Gemma3ForCausalLM(CausalLMMixin, Gemma3PreTrainedModel, GenerationMixin):
    """Gemma 3 text with its language model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: Gemma3TextConfig):
        super().__init__(config)
        self.model = Gemma3TextModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class Gemma3TextForSequenceClassification(SequenceClassificationMixin, Gemma3PreTrainedModel):
    """Gemma 3 text with a classification head on the last real token."""

    def __init__(self, config: Gemma3TextConfig):
        super().__init__(config)
        self.model = Gemma3TextModel(config)
        self._make_head(config)
        self.post_init()
