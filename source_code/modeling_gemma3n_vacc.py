"""Patched Gemma 3n text: four streams (AltUp), LAuReL, per-layer embeddings, shared keys and values; the stock numbers.

Copied beside the weights and loaded by transformers as remote code; needs torch and transformers alone. Ordinary use
with a `Cache` is here; static graphs are not.
"""

import math

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import can_return_tuple

from .configuration_gemma3n_vacc import Gemma3nTextConfig
from .decoder_vacc import CausalLMMixin, TextModelMixin, past_length
from .gain_vacc import GainNorm
from .layers_vacc import LegacyRotary, ScaledEmbedding, apply_rotary, eager_attention, packed_sequences

__all__ = ["Gemma3nForCausalLM", "Gemma3nPreTrainedModel", "Gemma3nTextModel"]

SMALLEST = 1e-5  # mean square to which a stream is brought, at least


class SparseMLP(nn.Module):
    """down(act(gate(x)) * up(x)); of a sparse layer only gates above a quantile of the normal distribution count.

    Args:
        sparsity: share of the gates that are set to zero in front of the activation, were they normal; 0 for none.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, activation: str, sparsity: float):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.act_fn = ACT2FN[activation]
        self.quantile = normal_quantile(sparsity) if sparsity > 0 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, seq, hidden]."""
        gate = self.gate_proj(x)
        if self.quantile is not None:
            deviation = torch.std(gate, dim=-1, keepdim=True, unbiased=False)
            cutoff = gate.mean(-1, keepdim=True) + deviation * torch.tensor(self.quantile).type(gate.dtype)
            gate = nn.functional.relu(gate - cutoff)
        return self.down_proj(self.act_fn(gate) * self.up_proj(x))


def normal_quantile(share: float) -> float:
    """Below which that share of a standard normal distribution lies, as torch has it in float32."""
    with torch.device("cpu"):
        return float(torch.distributions.normal.Normal(0, 1).icdf(torch.tensor(share, dtype=torch.float32)))


class SharingAttention(nn.Module):
    """Grouped-query attention without a scale; the last layers read keys and values of an earlier one of their kind."""

    def __init__(self, config: Gemma3nTextConfig, layer_idx: int):
        super().__init__()
        heads, kv_heads, dim, eps = (
            config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.rms_norm_eps
        )  # fmt: skip
        self.config, self.layer_idx, self.head_dim = config, layer_idx, dim
        mode = config.kv_sharing_modes[layer_idx]
        self.kind, self.reads, self.gives = config.layer_types[layer_idx], mode == "reuse", mode == "store"
        self.q_proj = nn.Linear(config.hidden_size, heads * dim, bias=config.attention_bias)
        self.q_norm = GainNorm(dim, eps)
        if not self.reads:
            self.k_proj = nn.Linear(config.hidden_size, kv_heads * dim, bias=config.attention_bias)
            self.v_proj = nn.Linear(config.hidden_size, kv_heads * dim, bias=config.attention_bias)
            self.k_norm, self.v_norm = GainNorm(dim, eps), GainNorm(dim, eps, gain=False)
        self.o_proj = nn.Linear(heads * dim, config.hidden_size, bias=config.attention_bias)

    def forward(self, x, position_embeddings, attention_mask, past_key_values=None, shared=None):
        """Attend.

        Args:
            x: [batch, seq, hidden]; position_embeddings: cos, sin [batch, seq, head_dim]; attention_mask: additive
                [batch, 1, seq, kv_len]; past_key_values: a `Cache`, or None.
            shared: kind of layer -> keys and values that later layers read; filled here.

        Returns:
            [batch, seq, hidden] and the probabilities.
        """
        batch, seq = x.shape[:2]

        def heads(linear: nn.Module) -> torch.Tensor:
            return linear(x).view(batch, seq, -1, self.head_dim)

        q = apply_rotary(self.q_norm(heads(self.q_proj)).transpose(1, 2), *position_embeddings)
        if self.reads:
            k, v = shared[self.kind]
        else:
            k = apply_rotary(self.k_norm(heads(self.k_proj)).transpose(1, 2), *position_embeddings)
            v = self.v_norm(heads(self.v_proj)).transpose(1, 2)
            if past_key_values is not None:
                k, v = past_key_values.update(k, v, self.layer_idx)
        if self.gives:
            shared[self.kind] = k, v
        dropout = self.config.attention_dropout if self.training else 0.0
        out, probs = eager_attention(q, k, v, attention_mask, 1.0, None, dropout)
        return self.o_proj(out.reshape(batch, seq, -1)), probs


class Laurel(nn.Module):
    """Learned augmented residual: x + norm(right(left(x)))."""

    def __init__(self, config: Gemma3nTextConfig):
        super().__init__()
        self.linear_left = nn.Linear(config.hidden_size, config.laurel_rank, bias=False)
        self.linear_right = nn.Linear(config.laurel_rank, config.hidden_size, bias=False)
        self.post_laurel_norm = GainNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, seq, hidden]."""
        return x + self.post_laurel_norm(self.linear_right(self.linear_left(x)))


class AltUp(nn.Module):
    """Alternating updates: a layer computes one of several streams, and a small map carries the others along."""

    def __init__(self, config: Gemma3nTextConfig):
        super().__init__()
        self.streams, self.active, self.clip = config.altup_num_inputs, config.altup_active_idx, config.altup_coef_clip
        self.correct_output_scale = nn.Parameter(torch.zeros(config.hidden_size))
        self.correction_coefs = nn.Linear(self.streams, self.streams, bias=False)
        self.prediction_coefs = nn.Linear(self.streams, self.streams**2, bias=False)
        self.modality_router = nn.Linear(config.hidden_size, self.streams, bias=False)
        self.router_norm = GainNorm(config.hidden_size, config.rms_norm_eps)
        self.input_scale = config.hidden_size**-1.0

    def routed(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, seq, hidden] -> [batch, seq, streams]."""
        normed = self.router_norm(x)
        scaled = normed * torch.tensor(self.input_scale).to(normed)  # rounded to the run's dtype, as the stock buffer
        return torch.tanh(self.modality_router(scaled).float()).type_as(x)

    def predict(self, streams: torch.Tensor) -> torch.Tensor:
        """What the layer is expected to make of all streams, [streams, batch, seq, hidden]."""
        routed = self.routed(streams[self.active])
        if self.training and self.clip is not None:
            self.prediction_coefs.weight.data.clamp_(-self.clip, self.clip)
        maps = self.prediction_coefs(routed).reshape(*routed.shape[:-1], self.streams, self.streams).permute(0, 1, 3, 2)
        predicted = torch.matmul(streams.permute(1, 2, 3, 0), maps).permute(3, 0, 1, 2)
        return (predicted + streams).contiguous().type_as(streams)

    def correct(self, predicted: torch.Tensor, activated: torch.Tensor) -> torch.Tensor:
        """The streams after the layer made `activated` [batch, seq, hidden] of the active one."""
        routed = self.routed(activated)
        innovation = (activated - predicted[self.active]).repeat(self.streams, 1, 1, 1)
        if self.training and self.clip is not None:
            factors = nn.functional.linear(routed, self.correction_coefs.weight.clamp(-self.clip, self.clip))
        else:
            factors = self.correction_coefs(routed)
        factors = (factors + 1.0).permute(2, 0, 1).unsqueeze(-1)
        return (torch.mul(innovation, factors) + predicted).contiguous().type_as(activated)

    def forward(self, corrected: torch.Tensor) -> torch.Tensor:
        """The active stream [batch, seq, hidden] as the token's vector meets it; hooks know a forward alone."""
        scale = self.correct_output_scale
        return (corrected.type_as(scale) * scale).type_as(corrected)


class Gemma3nDecoderLayer(GradientCheckpointingLayer):
    """Attention beside LAuReL, MLP, the streams' correction, and the layer's own embedding for all but the first."""

    def __init__(self, config: Gemma3nTextConfig, layer_idx: int):
        super().__init__()
        hidden, eps, inner = config.hidden_size, config.rms_norm_eps, config.hidden_size_per_layer_input
        self.config = config
        self.self_attn = SharingAttention(config, layer_idx)
        self.mlp = SparseMLP(
            hidden,
            config.intermediate_size[layer_idx],
            config.hidden_activation,
            config.activation_sparsity_pattern[layer_idx],
        )
        self.input_layernorm = GainNorm(hidden, eps)
        self.post_attention_layernorm = GainNorm(hidden, eps)
        self.pre_feedforward_layernorm = GainNorm(hidden, eps)
        self.post_feedforward_layernorm = GainNorm(hidden, eps)
        self.act_fn = ACT2FN[config.hidden_activation]
        self.altup, self.laurel = AltUp(config), Laurel(config)
        self.per_layer_input_gate = nn.Linear(hidden, inner, bias=False)
        self.per_layer_projection = nn.Linear(inner, hidden, bias=False)
        self.post_per_layer_input_norm = GainNorm(hidden, eps)

    def forward(self, streams, position_embeddings, attention_mask, per_layer, past_key_values=None, shared=None):
        """streams: [streams, batch, seq, hidden]; per_layer: [batch, seq, inner] -> streams, probabilities."""
        predicted = self.altup.predict(streams)
        active = predicted[self.config.altup_active_idx]
        normed = self.input_layernorm(active)
        laurel = self.laurel(normed)
        attn, probs = self.self_attn(normed, position_embeddings, attention_mask, past_key_values, shared)
        x = (active + self.post_attention_layernorm(attn) + laurel) / math.sqrt(2)
        x = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        streams = self.altup.correct(predicted, x)
        first = streams[self.config.altup_active_idx]
        if self.config.altup_correct_scale:
            first = self.altup(first)
        own = self.act_fn(self.per_layer_input_gate(first)) * per_layer
        own = self.post_per_layer_input_norm(self.per_layer_projection(own))
        return torch.cat((streams[:1], streams[1:] + own)), probs


class Gemma3nPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation."""

    config_class = Gemma3nTextConfig
    config: Gemma3nTextConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Gemma3nDecoderLayer"]  # noqa: RUF012 (transformers' own form)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, GainNorm) and module.weight is not None:
            nn.init.ones_(module.weight)
        elif isinstance(module, AltUp):
            nn.init.zeros_(module.correct_output_scale)


class Gemma3nTextModel(TextModelMixin, Gemma3nPreTrainedModel):
    """Embeddings, decoder layers on several streams, their mean, final norm."""

    def __init__(self, config: Gemma3nTextConfig):
        super().__init__(config)
        hidden, inner, layers = config.hidden_size, config.hidden_size_per_layer_input, config.num_hidden_layers
        self.embed_tokens = ScaledEmbedding(config.vocab_size, hidden, config.pad_token_id, config.embed_scale)
        self.layers = nn.ModuleList(Gemma3nDecoderLayer(config, i) for i in range(layers))
        self.norm = GainNorm(hidden, config.rms_norm_eps)
        kinds = sorted(set(config.layer_types))
        self.rotary = nn.ModuleDict(
            {kind: LegacyRotary.of(config.head_dim, config.rope_parameters[kind]) for kind in kinds}
        )
        self.embed_tokens_per_layer = nn.Embedding(
            config.vocab_size_per_layer_input, layers * inner, config.pad_token_id
        )
        self.per_layer_model_projection = nn.Linear(hidden, layers * inner, bias=False)
        self.per_layer_projection_norm = GainNorm(inner, config.rms_norm_eps)
        others = range(1, config.altup_num_inputs)
        self.altup_projections = nn.ModuleList(nn.Linear(hidden, hidden, bias=False) for _ in others)
        self.altup_unembed_projections = nn.ModuleList(nn.Linear(hidden, hidden, bias=False) for _ in others)
        unread = ("k_proj", "v_proj", "k_norm", "v_norm")  # which files of sharing layers may hold
        self._keys_to_ignore_on_load_unexpected = [
            f"layers.{i}.self_attn.{name}"
            for i, layer in enumerate(self.layers)
            if layer.self_attn.reads
            for name in unread
        ]
        self.gradient_checkpointing = False
        self.post_init()

    def per_layer_inputs(self, input_ids, embeds: torch.Tensor) -> torch.Tensor:
        """What each layer gets of each token, [batch, seq, layers, inner].

        Args:
            input_ids: [batch, seq], None where only embeddings are given; embeds: [batch, seq, hidden], scaled.
        """
        config, shape = self.config, (*embeds.shape[:-1], self.config.num_hidden_layers, -1)
        projected = self.per_layer_model_projection(embeds) * torch.tensor(config.hidden_size**-0.5).to(embeds)
        projected = self.per_layer_projection_norm(projected.reshape(shape))
        if input_ids is None:
            return projected
        inside = (input_ids >= 0) & (input_ids < config.vocab_size_per_layer_input)
        own = self.embed_tokens_per_layer(torch.where(inside, input_ids, 0))
        own = own * torch.tensor(config.hidden_size_per_layer_input**0.5).to(own)
        return (projected + own.reshape(shape)) * torch.rsqrt(torch.tensor(2.0)).to(embeds)

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        **kwargs,
    ):
        """Run the stack; arguments as of `TextModelMixin.forward`, with a `Cache` or nothing in it.

        Raises:
            ValueError: not exactly one of input_ids and inputs_embeds, or a static graph.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if self.config.iter_num is not None or not (past_key_values is None or isinstance(past_key_values, Cache)):
            raise ValueError("static graphs and legacy caches of Gemma 3n are not built")
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.training and self.gradient_checkpointing:
            use_cache = False  # layers run twice
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        per_layer = self.per_layer_inputs(input_ids, embeds)
        batch, q_len = embeds.shape[:2]
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache(config=self.config)
        sequences = None
        if position_ids is not None and attention_mask is None and past_key_values is None:
            sequences = packed_sequences(position_ids)
        if position_ids is None:
            position_ids = torch.arange(q_len, device=embeds.device)[None] + past_length(past_key_values)
        masks = self.build_masks(
            attention_mask, position_ids, batch, q_len, past_key_values, embeds.dtype, embeds.device, sequences
        )
        rotary = {kind: module(embeds, position_ids) for kind, module in self.rotary.items()}
        streams = torch.stack([embeds, *(alike(layer(embeds), embeds) for layer in self.altup_projections)])
        shared, attentions = {}, []
        for i, layer in enumerate(self.layers):
            kind = self.layer_kind(i)
            streams, probs = layer(
                streams, rotary[kind], masks[kind], per_layer[:, :, i], past_key_values=past_key_values, shared=shared
            )
            attentions.append(probs)
        others = [
            alike(layer(stream), streams[0])
            for layer, stream in zip(self.altup_unembed_projections, streams[1:], strict=True)
        ]
        hidden = self.norm(torch.mean(torch.stack([streams[0], *others]), dim=0))
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past_key_values if use_cache else None,
            attentions=tuple(attentions) if output_attentions else None,
        )


def alike(x: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """X [batch, seq, hidden] brought to the root mean square of `model`."""
    wanted = torch.mean(model**2, dim=-1, keepdim=True) ** 0.5
    own = torch.sqrt(torch.mean(x**2, dim=-1, keepdim=True).clamp(min=SMALLEST))
    return x * wanted / own


class Gemma3nForCausalLM(CausalLMMixin, Gemma3nPreTrainedModel, GenerationMixin):
    """Gemma 3n text with its language model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: Gemma3nTextConfig):
        super().__init__(config)
        self.model = Gemma3nTextModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
