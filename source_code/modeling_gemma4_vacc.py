"""Patched Gemma 4 text: legacy rotary and sizes per layer kind, explicit masks, strided slice, int8 linears.

The stock numbers. Copied beside the weights and loaded by transformers as remote code; needs torch and transformers
alone.
"""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.generation import GenerationMixin

from .configuration_gemma4_vacc import Gemma4TextConfig, Gemma4UnifiedTextConfig
from .decoder_vacc import CausalLMMixin, TextModelMixin
from .experts_vacc import Experts, Router
from .gain_vacc import GainAttention, GainNorm, PerLayerInputs, SharedAndPerLayer, SharingAttention
from .layers_vacc import FULL, FourNormLayer, LegacyRotary, ScaledEmbedding

__all__ = [
    "Gemma4ForCausalLM",
    "Gemma4PreTrainedModel",
    "Gemma4TextModel",
    "Gemma4UnifiedForCausalLM",
    "Gemma4UnifiedTextModel",
]


class Gemma4DecoderLayer(FourNormLayer):
    """Five sliding layers, then a global one with wider heads; the stream is multiplied by a number at the end.

    Of E2B and E4B a vector for each token is added as well, and the last layers have no keys and values of their own.
    Of 26B-A4B there are experts beside the MLP.
    """

    norm_class = GainNorm

    def __init__(self, config: Gemma4TextConfig, layer_idx: int):
        own, width = config.per_layer_config[layer_idx], config.intermediate_size
        sizes = own.num_key_value_heads, own.head_dim
        if layer_idx >= config.num_hidden_layers - config.num_kv_shared_layers:
            attention = SharingAttention(config, layer_idx, sizes)
            width *= 2 if config.use_double_wide_mlp else 1
        else:
            value_is_key = config.attention_k_eq_v and config.layer_types[layer_idx] == FULL
            attention = GainAttention(config, layer_idx, sizes, value_is_key)
        super().__init__(config, attention, width)
        self.layer_scalar = nn.Buffer(torch.ones(1))
        size = getattr(config, "hidden_size_per_layer_input", 0)
        if size:
            self.act_fn = ACT2FN[config.hidden_activation]
            self.per_layer_in_float32 = False  # gate and product, where GELU's input does not fit float16
            self.per_layer_input_gate = nn.Linear(config.hidden_size, size, bias=False)
            self.per_layer_projection = nn.Linear(size, config.hidden_size, bias=False)
            self.post_per_layer_input_norm = GainNorm(config.hidden_size, config.rms_norm_eps)
        self.has_experts = bool(getattr(config, "enable_moe_block", False))
        self.wide_experts = False  # computed in float32, whatever the stream is
        if self.has_experts:
            self.router = Router(config)
            self.experts = Experts(config)
            self.post_feedforward_layernorm_1 = GainNorm(config.hidden_size, config.rms_norm_eps)
            self.post_feedforward_layernorm_2 = GainNorm(config.hidden_size, config.rms_norm_eps)
            self.pre_feedforward_layernorm_2 = GainNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, hidden_states, position_embeddings, attention_mask, past_key_values=None, per_layer_input=None, **shared
    ):
        """hidden_states: [batch, seq, hidden] -> the same, probabilities, present (see `Attention`).

        Args:
            per_layer_input: [batch, seq, hidden_size_per_layer_input]; shared: see `SharingAttention`.
        """
        hidden_states, probs, present = super().forward(
            hidden_states, position_embeddings, attention_mask, past_key_values, **shared
        )
        if per_layer_input is not None:
            added = self.gated(hidden_states, per_layer_input)
            hidden_states = hidden_states + self.post_per_layer_input_norm(self.per_layer_projection(added))
        return hidden_states * self.layer_scalar.to(hidden_states.dtype), probs, present

    def feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        """The MLP, and experts beside it, which are chosen by x itself; x: [batch, seq, hidden] -> the same."""
        dense = super().feed_forward(x)
        return self.with_experts(dense, x) if self.has_experts else dense

    def with_experts(self, dense: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """What the MLP makes of x, and beside it what the experts do, each behind a norm of its own."""
        dense = self.post_feedforward_layernorm_1(dense)
        chosen = self.router(x)
        added = self.experts(self.pre_feedforward_layernorm_2(x.float() if self.wide_experts else x), *chosen)
        return dense + self.post_feedforward_layernorm_2(added).type_as(dense)

    def gated(self, hidden_states, per_layer_input):
        """What per_layer_projection reads [batch, seq, hidden_size_per_layer_input]; arguments as of `forward`."""
        inner = hidden_states.float() if self.per_layer_in_float32 else hidden_states
        return (self.act_fn(self.per_layer_input_gate(inner)) * per_layer_input).to(hidden_states.dtype)


class Gemma4PreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation."""

    config_class = Gemma4TextConfig
    config: Gemma4TextConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Gemma4DecoderLayer"]  # noqa: RUF012 (transformers' own form)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, GainNorm) and module.weight is not None:
            nn.init.ones_(module.weight)
        if isinstance(module, Gemma4DecoderLayer):
            nn.init.ones_(module.layer_scalar)
        if isinstance(module, Router):
            nn.init.ones_(module.scale)
            nn.init.ones_(module.per_expert_scale)
        if isinstance(module, Experts):
            for stack in (module.gate_up_proj, module.down_proj):
                nn.init.normal_(stack, std=self.config.initializer_range)


class Gemma4TextModel(PerLayerInputs, TextModelMixin, Gemma4PreTrainedModel):
    """Embedding, decoder layers, final norm; a rotary table for each kind of layer present."""

    def __init__(self, config: Gemma4TextConfig):
        super().__init__(config)
        if config.use_bidirectional_attention == "all":
            raise ValueError('config.use_bidirectional_attention is "all"; the patched model is causal')
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = ScaledEmbedding(
            config.vocab_size, config.hidden_size, config.pad_token_id, config.embed_scale
        )
        self.layers = nn.ModuleList(Gemma4DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = GainNorm(config.hidden_size, config.rms_norm_eps)
        first = {kind: config.layer_types.index(kind) for kind in sorted(set(config.layer_types))}
        self.rotary = nn.ModuleDict(
            {
                kind: LegacyRotary.of(config.per_layer_config[layer].head_dim, config.rope_parameters[kind])
                for kind, layer in first.items()
            }
        )
        self.gradient_checkpointing = False
        if getattr(config, "hidden_size_per_layer_input", 0):
            self.make_per_layer(config, config.per_layer_vectors or config.num_hidden_layers)
        self.post_init()

    def beside(self, input_ids, embeds, per_layer_inputs=None, **kwargs):
        """Per-layer inputs of the ids, or of rows of the table [batch, seq, layers, width] that were looked up before.

        Raises:
            ValueError: embeddings without the rows that belong to them.
        """
        config = self.config
        vectors = None
        if getattr(config, "hidden_size_per_layer_input", 0):
            if per_layer_inputs is not None:
                vectors = self.project_per_layer(per_layer_inputs.flatten(2), embeds)
            elif input_ids is None:
                raise ValueError("inputs_embeds need per_layer_inputs beside them: rows of embed_tokens_per_layer")
            else:
                vectors = self.per_layer_inputs(input_ids, embeds)
        return SharedAndPerLayer(config.layer_types, config.num_kv_shared_layers, vectors)


class Gemma4ForCausalLM(CausalLMMixin, Gemma4PreTrainedModel, GenerationMixin):
    """Gemma 4 text with its language model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    stack_class = Gemma4TextModel

    def __init__(self, config: Gemma4TextConfig):
        super().__init__(config)
        self.model = self.stack_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class Gemma4UnifiedTextModel(Gemma4TextModel):
    """The same for Gemma 4 12B, whose text model has a model type of its own."""

    config_class = Gemma4UnifiedTextConfig
    config: Gemma4UnifiedTextConfig


class Gemma4UnifiedForCausalLM(Gemma4ForCausalLM):
    """Gemma 4 12B, text, with its language model head."""

    config_class = Gemma4UnifiedTextConfig
    config: Gemma4UnifiedTextConfig
    stack_class = Gemma4UnifiedTextModel
