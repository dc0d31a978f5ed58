"""Patched Gemma 3n text: four streams (AltUp), LAuReL, per-layer embeddings, shared keys and values; the stock numbers.

Copied beside the weights and loaded by transformers as remote code; needs torch and transformers alone. Streams are one
tensor [batch, seq, streams, hidden], so that positions are where other generations have them.
"""

import math

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_gemma3n_vacc import Gemma3nTextConfig
from .decoder_vacc import CausalLMMixin, TextModelMixin
from .gain_vacc import GainAttention, GainNorm, PerLayerInputs, SharedAndPerLayer, SharingAttention
from .layers_vacc import LegacyRotary, ScaledEmbedding, apply_rotary, rounded

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
        self.in_float32 = False  # gate, up and their product, where GELU's input does not fit float16
        self.wide_statistics = False  # mean and deviation of the gates, and what is left of these, in float32

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, seq, hidden]."""
        inner = x.float() if self.in_float32 else x
        gate = self.gate_proj(inner)
        if self.quantile is not None:
            gate = self.sparse(gate.float() if self.wide_statistics else gate).to(gate.dtype)
        return self.down_proj((self.act_fn(gate) * self.up_proj(inner)).to(x.dtype))

    def sparse(self, gate: torch.Tensor) -> torch.Tensor:
        """Gates above the quantile by how much they are; the others are zero."""
        mean = self.mean_of(gate)
        if torch.compiler.is_exporting():  # in operators that ONNX has
            deviation = torch.sqrt(self.mean_of((gate - mean).pow(2)))
        else:
            deviation = torch.std(gate, dim=-1, keepdim=True, unbiased=False)
        return nn.functional.relu(gate - (mean + deviation * self.quantile_in(gate.dtype)))

    def mean_of(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, seq, intermediate] -> [batch, seq, 1]; where gates are divided, something else is put here."""
        return x.mean(-1, keepdim=True)

    def quantile_in(self, dtype: torch.dtype) -> float:
        """The quantile as the run dtype holds it."""
        quantile = self.quantile or 0.0
        return math.copysign(rounded(abs(quantile), dtype), quantile) if quantile else 0.0


def normal_quantile(share: float) -> float:
    """Below which that share of a standard normal distribution lies, as torch has it in float32."""
    with torch.device("cpu"):
        return float(torch.distributions.normal.Normal(0, 1).icdf(torch.tensor(share, dtype=torch.float32)))


class OwnAttention(GainAttention):
    """Attention with keys and values of its own, each normed before the next one is made, as the stock class has it."""

    def heads_of(self, hidden_states, position_embeddings):
        """Queries, keys and values [batch, heads, seq, head_dim] of hidden states [batch, seq, hidden]."""
        shape = (*hidden_states.shape[:2], -1, self.head_dim)
        q = self.q_norm(self.q_proj(hidden_states).view(shape))
        k = self.k_norm(self.k_proj(hidden_states).view(shape))
        v = self.v_norm(self.v_proj(hidden_states).view(shape))
        q, k = (apply_rotary(heads, *position_embeddings, heads=2) for heads in (q, k))
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


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

    in_float32 = False  # whatever the streams are

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
        scaled = self.router_norm(x) * rounded(self.input_scale, torch.float32, x.dtype)
        return torch.tanh(self.modality_router(scaled).float()).type_as(x)

    def predict(self, streams: torch.Tensor) -> torch.Tensor:
        """What the layer is expected to make of all streams [batch, seq, streams, hidden]."""
        streams = streams.float() if self.in_float32 else streams
        if self.training and self.clip is not None:
            self.prediction_coefs.weight.data.clamp_(-self.clip, self.clip)
        maps = self.prediction_coefs(self.routed(streams[:, :, self.active]))
        maps = maps.unflatten(-1, (self.streams, self.streams))
        if torch.compiler.is_exporting():
            return torch.matmul(maps, streams) + streams
        # The stock class's product, whose sums are rounded in another order.
        return torch.matmul(streams.transpose(2, 3), maps.transpose(2, 3)).transpose(2, 3) + streams

    def correct(self, predicted: torch.Tensor, activated: torch.Tensor) -> torch.Tensor:
        """The streams after the layer made `activated` [batch, seq, hidden] of the active one."""
        activated = activated.to(predicted.dtype)
        routed = self.routed(activated)
        innovation = activated - predicted[:, :, self.active]
        if self.training and self.clip is not None:
            factors = nn.functional.linear(routed, self.correction_coefs.weight.clamp(-self.clip, self.clip))
        else:
            factors = self.correction_coefs(routed)
        return innovation.unsqueeze(2) * (factors + 1.0).unsqueeze(-1) + predicted

    def forward(self, corrected: torch.Tensor) -> torch.Tensor:
        """The active stream [batch, seq, hidden] as the token's vector meets it; hooks know a forward alone."""
        scale = self.correct_output_scale
        return (corrected.type_as(scale) * scale).type_as(corrected)


class Gemma3nDecoderLayer(GradientCheckpointingLayer):
    """Attention beside LAuReL, MLP, the streams' correction, and the layer's own embedding for all but the first."""

    def __init__(self, config: Gemma3nTextConfig, layer_idx: int):
        super().__init__()
        hidden, eps, inner = config.hidden_size, config.rms_norm_eps, config.hidden_size_per_layer_input
        sizes = config.num_key_value_heads, config.head_dim
        shares = layer_idx >= config.num_hidden_layers - config.num_kv_shared_layers
        self.config = config
        self.self_attn = (SharingAttention if shares else OwnAttention)(config, layer_idx, sizes)
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
        self.per_layer_in_float32 = False  # gate and product, where GELU's input does not fit float16
        self.per_layer_input_gate = nn.Linear(hidden, inner, bias=False)
        self.per_layer_projection = nn.Linear(inner, hidden, bias=False)
        self.post_per_layer_input_norm = GainNorm(hidden, eps)

    def forward(
        self, hidden_states, position_embeddings, attention_mask, past_key_values=None, per_layer_input=None, **shared
    ):
        """hidden_states: [batch, seq, streams, hidden] -> the same, probabilities, present (see `Attention`).

        Args:
            per_layer_input: [batch, seq, hidden_size_per_layer_input]; shared: see `SharingAttention`.
        """
        predicted = self.altup.predict(hidden_states)
        active = predicted[:, :, self.altup.active].to(hidden_states.dtype)
        normed = self.input_layernorm(active)
        laurel = self.laurel(normed)
        attn, probs, present = self.self_attn(normed, position_embeddings, attention_mask, past_key_values, **shared)
        x = (active + self.post_attention_layernorm(attn) + laurel) / math.sqrt(2)
        x = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        streams = self.altup.correct(predicted, x)
        first = streams[:, :, self.altup.active]
        if self.config.altup_correct_scale:
            first = self.altup(first)
        own = self.per_layer_projection(self.gated(first.to(hidden_states.dtype), per_layer_input))
        own = self.post_per_layer_input_norm(own).to(streams.dtype)
        streams = torch.cat((streams[:, :, :1], streams[:, :, 1:] + own.unsqueeze(2)), dim=2)
        return streams.to(hidden_states.dtype), probs, present

    def gated(self, active, per_layer_input):
        """What per_layer_projection reads [batch, seq, hidden_size_per_layer_input] of the active stream's."""
        inner = active.float() if self.per_layer_in_float32 else active
        return (self.act_fn(self.per_layer_input_gate(inner)) * per_layer_input).to(active.dtype)


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


class Gemma3nTextModel(PerLayerInputs, TextModelMixin, Gemma3nPreTrainedModel):
    """Embeddings, decoder layers on several streams, their mean, final norm.

    Attributes:
        streams_in_float32: projections of streams, and their size, whatever streams are.
        divisor: by which embeddings and streams are stored smaller.
    """

    streams_in_float32, divisor = False, 1.0

    def __init__(self, config: Gemma3nTextConfig):
        super().__init__(config)
        hidden, layers = config.hidden_size, config.num_hidden_layers
        self.embed_tokens = ScaledEmbedding(config.vocab_size, hidden, config.pad_token_id, config.embed_scale)
        self.layers = nn.ModuleList(Gemma3nDecoderLayer(config, i) for i in range(layers))
        self.norm = GainNorm(hidden, config.rms_norm_eps)
        kinds = sorted(set(config.layer_types))
        self.rotary = nn.ModuleDict(
            {kind: LegacyRotary.of(config.head_dim, config.rope_parameters[kind]) for kind in kinds}
        )
        self.make_per_layer(config, config.per_layer_vectors or layers)
        others = range(1, config.altup_num_inputs)
        self.altup_projections = nn.ModuleList(nn.Linear(hidden, hidden, bias=False) for _ in others)
        self.altup_unembed_projections = nn.ModuleList(nn.Linear(hidden, hidden, bias=False) for _ in others)
        unread = ("k_proj", "v_proj", "k_norm", "v_norm")  # which files of sharing layers may hold
        own = layers - config.num_kv_shared_layers
        self._keys_to_ignore_on_load_unexpected = [
            f"layers.{i}.self_attn.{name}" for i in range(own, layers) for name in unread
        ]
        self.gradient_checkpointing = False
        self.post_init()

    def beside(self, input_ids, embeds, per_layer_inputs=None, **kwargs):
        """Per-layer inputs of the ids, or of rows of the table [batch, seq, layers, width] that were looked up before.

        Embeddings without either have those of the embeddings alone, as in the stock class.
        """
        config = self.config
        if per_layer_inputs is not None:
            vectors = self.project_per_layer(per_layer_inputs, embeds)
        elif input_ids is not None:
            vectors = self.per_layer_inputs(input_ids, embeds)
        else:
            vectors = self.context_of(embeds)
        return SharedAndPerLayer(config.layer_types, config.num_kv_shared_layers, vectors)

    def per_layer_inputs(self, input_ids: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        """input_ids: [batch, seq], of which the table has not all; embeds: [batch, seq, hidden], scaled."""
        inside = (input_ids >= 0) & (input_ids < self.config.vocab_size_per_layer_input)
        return self.project_per_layer(self.embed_tokens_per_layer(torch.where(inside, input_ids, 0)), embeds)

    def project_per_layer(self, rows: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        """rows: [batch, seq, layers * width], of the table -> [batch, seq, layers, width]."""
        context = self.context_of(embeds)
        return (context + rows.reshape(context.shape)) * rounded(2.0**-0.5, torch.float32, embeds.dtype)

    def context_of(self, embeds: torch.Tensor) -> torch.Tensor:
        """The part of the embeddings [batch, seq, hidden]: [batch, seq, layers, width]."""
        scale = rounded(embeds.shape[-1] ** -0.5, torch.float32, embeds.dtype)
        context = (self.per_layer_model_projection(embeds) * scale).reshape(
            *embeds.shape[:2], -1, self.config.hidden_size_per_layer_input
        )
        return self.per_layer_projection_norm(context)

    def entered(self, embeds: torch.Tensor) -> torch.Tensor:
        """[batch, seq, hidden] -> [batch, seq, streams, hidden]: the embeddings, and projections of their size."""
        wide = embeds.float() if self.streams_in_float32 else embeds
        others = [alike(projection(wide), wide, self.smallest) for projection in self.altup_projections]
        return torch.stack([wide, *others], dim=2).to(embeds.dtype)

    @property
    def smallest(self) -> float:
        """Mean square to which a stream is brought, at least, as it is stored."""
        return SMALLEST / self.divisor**2

    def states(self, before, last, normed):
        """Streams before each layer and behind the last, [streams, batch, seq, hidden] as in the stock class."""
        return tuple(streams.permute(2, 0, 1, 3) for streams in (*before, last))

    def left(self, hidden: torch.Tensor) -> torch.Tensor:
        """[batch, seq, streams, hidden] -> [batch, seq, hidden]: the mean, the others projected and of equal size."""
        first, *streams = (hidden.float() if self.streams_in_float32 else hidden).unbind(2)
        pairs = zip(self.altup_unembed_projections, streams, strict=True)
        others = [alike(projection(stream), first, self.smallest) for projection, stream in pairs]
        return torch.mean(torch.stack([first, *others]), dim=0)


def alike(x: torch.Tensor, model: torch.Tensor, smallest: float) -> torch.Tensor:
    """X [batch, seq, hidden] brought to the root mean square of `model`.

    Args:
        smallest: what the mean of its own squares counts as, at least.
    """
    wanted = torch.mean(model**2, dim=-1, keepdim=True) ** 0.5
    own = torch.sqrt(torch.mean(x**2, dim=-1, keepdim=True).clamp(min=smallest))
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
