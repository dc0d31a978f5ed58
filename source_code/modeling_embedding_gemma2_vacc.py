"""Patched EmbeddingGemma 2 text: legacy rotary and sizes per layer kind, explicit masks on both sides, int8 linears.

The stock numbers. Copied beside the weights and loaded by transformers as remote code; needs torch and transformers
alone.
"""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from .configuration_embedding_gemma2_vacc import EmbeddingGemma2TextConfig
from .encoder_vacc import EncoderTextModelMixin
from .gain_vacc import GainAttention, GainNorm, OfEachLayer
from .layers_vacc import SLIDING, FourNormLayer, LegacyRotary, ScaledEmbedding

__all__ = ["EmbeddingGemma2PreTrainedModel", "EmbeddingGemma2TextModel"]


class VectorsOfEmbeddings(nn.Module):
    """A vector for each token and layer, made of the token's embedding alone.

    Args:
        layers: for which there are vectors.
    """

    def __init__(self, config: EmbeddingGemma2TextConfig, layers: int):
        super().__init__()
        self.width = config.hidden_size_per_layer_input
        self.per_layer_model_projection = nn.Linear(config.hidden_size, layers * self.width, bias=False)
        self.per_layer_projection_norm = GainNorm(self.width, config.rms_norm_eps)

    def forward(self, embeds: torch.Tensor) -> torch.Tensor:
        """embeds: [batch, seq, hidden] -> [batch, seq, layers, width]."""
        made = self.per_layer_model_projection(embeds) * embeds.shape[-1] ** -0.5
        return self.per_layer_projection_norm(made.reshape(*embeds.shape[:2], -1, self.width))


class VectorBlock(nn.Module):
    """What a layer adds of a token's vector: norm(projection(act(gate(x)) * vector))."""

    def __init__(self, config: EmbeddingGemma2TextConfig):
        super().__init__()
        hidden, width = config.hidden_size, config.hidden_size_per_layer_input
        self.act_fn = ACT2FN[config.hidden_activation]
        self.per_layer_input_gate = nn.Linear(hidden, width, bias=False)
        self.per_layer_projection = nn.Linear(width, hidden, bias=False)
        self.post_per_layer_input_norm = GainNorm(hidden, config.rms_norm_eps)


class EmbeddingGemma2EncoderLayer(FourNormLayer):
    """Five sliding layers, then a full one with wider heads; the stream is multiplied by a number at the end."""

    norm_class = GainNorm

    def __init__(self, config: EmbeddingGemma2TextConfig, layer_idx: int):
        own = config.per_layer_config[layer_idx]
        super().__init__(config, GainAttention(config, layer_idx, (own.num_key_value_heads, own.head_dim)))
        self.layer_scalar = nn.Buffer(torch.ones(1))
        self.per_layer_in_float32 = False  # gate and product, where GELU's input does not fit float16
        self.ple_block = VectorBlock(config)

    def forward(
        self, hidden_states, position_embeddings, attention_mask, past_key_values=None, per_layer_input=None, **more
    ):
        """hidden_states: [batch, seq, hidden] -> the same, probabilities, present (see `Attention`).

        Args:
            per_layer_input: [batch, seq, hidden_size_per_layer_input].
        """
        hidden_states, probs, present = super().forward(
            hidden_states, position_embeddings, attention_mask, past_key_values, **more
        )
        block, added = self.ple_block, self.gated(hidden_states, per_layer_input)
        hidden_states = hidden_states + block.post_per_layer_input_norm(block.per_layer_projection(added))
        return hidden_states * self.layer_scalar.to(hidden_states.dtype), probs, present

    def gated(self, hidden_states, per_layer_input):
        """What per_layer_projection reads [batch, seq, hidden_size_per_layer_input]; arguments as of `forward`."""
        inner = hidden_states.float() if self.per_layer_in_float32 else hidden_states
        block = self.ple_block
        return (block.act_fn(block.per_layer_input_gate(inner)) * per_layer_input).to(hidden_states.dtype)


class EmbeddingGemma2PreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation."""

    config_class = EmbeddingGemma2TextConfig
    config: EmbeddingGemma2TextConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["EmbeddingGemma2EncoderLayer"]  # noqa: RUF012 (transformers' own form)

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, GainNorm) and module.weight is not None:
            nn.init.ones_(module.weight)
        if isinstance(module, EmbeddingGemma2EncoderLayer):
            nn.init.ones_(module.layer_scalar)


class EmbeddingGemma2TextModel(EncoderTextModelMixin, EmbeddingGemma2PreTrainedModel):
    """Embedding, layers, final norm, and a projection of each token; a rotary table for each kind of layer present."""

    encodes = True

    def __init__(self, config: EmbeddingGemma2TextConfig):
        super().__init__(config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = ScaledEmbedding(
            config.vocab_size, config.hidden_size, config.pad_token_id, config.embed_scale
        )
        self.layers = nn.ModuleList(EmbeddingGemma2EncoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = GainNorm(config.hidden_size, config.rms_norm_eps)
        first = {kind: config.layer_types.index(kind) for kind in sorted(set(config.layer_types))}
        self.rotary = nn.ModuleDict(
            {
                kind: LegacyRotary.of(config.per_layer_config[layer].head_dim, config.rope_parameters[kind])
                for kind, layer in first.items()
            }
        )
        self.ple = VectorsOfEmbeddings(config, config.per_layer_vectors or config.num_hidden_layers)
        self.embedding_projection = nn.Linear(config.hidden_size, config.embedding_dim, bias=False)
        self.gradient_checkpointing = False
        self.post_init()

    def reach(self, kind: str):
        """`sliding_window` is a radius: the keys at that distance are seen as well."""
        return self.config.sliding_window + 1 if kind == SLIDING else None

    def projected(self, normed):
        """[batch, seq, hidden] -> [batch, seq, embedding_dim]."""
        return self.embedding_projection(normed)

    def per_layer_inputs(self, input_ids, embeds: torch.Tensor) -> torch.Tensor:
        """embeds: [batch, seq, hidden] -> [batch, seq, layers, width]; ids are not looked at."""
        return self.ple(embeds)

    def beside(self, input_ids, embeds, **kwargs):
        """Vectors of the embeddings."""
        return OfEachLayer(self.per_layer_inputs(input_ids, embeds))
