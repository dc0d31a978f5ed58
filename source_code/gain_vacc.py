"""Blocks of Gemma 3n and 4: norms that multiply by their weight, values with a norm of their own, unscaled scores.

And per-layer embeddings, and layers that share the keys and values of earlier ones. Stand-alone: needs torch and
transformers alone. As in layers_vacc.py, operations and their order are the stock ones.
"""

import torch
from torch import nn

from .decoder_vacc import Beside
from .layers_vacc import (
    Attention,
    RMSNorm,
    ScaledEmbedding,
    apply_rotary,
    decode_attention,
    eager_attention,
    rounded_sqrt,
)


class GainNorm(RMSNorm):
    """x_hat * weight, or x_hat alone; computed in float32 and cast once at the end.

    Args:
        gain: whether there is a weight.
    """

    def __init__(self, dim: int, eps: float, gain: bool = True):
        super().__init__(dim, eps)
        self.weight = nn.Parameter(torch.ones(dim)) if gain else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., dim]."""
        x32 = x.float()
        x32 = x32 * torch.pow(x32.pow(2).mean(-1, keepdim=True) + self.eps, -0.5)
        if self.weight is not None:
            x32 = x32 * self.weight.float()
        return x32.type_as(x)


class GainAttention(Attention):
    """Attention whose queries, keys and values are normed in each head; scores have no other scale.

    Args:
        sizes: KV heads and head_dim.
        value_is_key: there is no v_proj: values are what k_proj gives, under a norm of their own and not turned.
    """

    def __init__(self, config, layer_idx: int, sizes, value_is_key: bool = False):
        super().__init__(config, layer_idx, scaling=1.0, sizes=sizes)
        if value_is_key:
            del self.v_proj
        self.q_norm = GainNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = GainNorm(self.head_dim, config.rms_norm_eps)
        self.v_norm = GainNorm(self.head_dim, config.rms_norm_eps, gain=False)

    def heads_of(self, hidden_states, position_embeddings):
        """Queries, keys and values [batch, heads, seq, head_dim] of hidden states [batch, seq, hidden]."""
        shape = (*hidden_states.shape[:2], -1, self.head_dim)
        q = self.q_norm(self.q_proj(hidden_states).view(shape))
        k = self.k_proj(hidden_states).view(shape)
        v = self.v_proj(hidden_states).view(shape) if hasattr(self, "v_proj") else k
        k, v = self.k_norm(k), self.v_norm(v)
        q, k = (apply_rotary(heads, *position_embeddings, heads=2) for heads in (q, k))
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


class SharingAttention(Attention):
    """Attention of queries of its own to keys and values of an earlier layer of its kind."""

    def __init__(self, config, layer_idx: int, sizes):
        super().__init__(config, layer_idx, scaling=1.0, sizes=sizes)
        del self.k_proj, self.v_proj
        self.q_norm = GainNorm(self.head_dim, config.rms_norm_eps)

    def forward(self, hidden_states, position_embeddings, attention_mask, past_key_values=None, shared=None):
        """As `Attention.forward`; there is no present.

        Args:
            shared: (key, value) of the earlier layer, normed and turned: the new ones alone with `config.iter_num` 1,
                where past_key_values is that layer's, else all.
        """
        batch, seq = hidden_states.shape[:2]
        q = self.q_norm(self.q_proj(hidden_states).view(batch, seq, -1, self.head_dim))
        q = apply_rotary(q, *position_embeddings, heads=2).transpose(1, 2)
        if self.config.iter_num == 1:
            out, probs = decode_attention(
                q, *shared, *past_key_values, attention_mask, self.scaling, None, self.wide_scores
            )
        else:
            dropout = self.config.attention_dropout if self.training else 0.0
            out, probs = eager_attention(q, *shared, attention_mask, self.scaling, None, dropout, self.wide_scores)
        return self.o_proj(out.reshape(batch, seq, -1)), probs, None


class PerLayerEmbedding(ScaledEmbedding):
    """A table whose rows hold a vector for each layer; the scale is that of one vector.

    Args:
        width: of a vector.
    """

    def __init__(self, vocab_size: int, layers: int, width: int, padding_idx: int | None, rounding: str):
        super().__init__(vocab_size, layers * width, padding_idx, rounding)
        self.width = width

    def scale_value(self, dtype: torch.dtype) -> float:
        """sqrt(width) as the number the run dtype holds."""
        return rounded_sqrt(self.width, dtype, self.rounding)


class PerLayerInputs:
    """The part of a stack that makes a vector for each token and layer out of ids and embeddings.

    Expects embed_tokens_per_layer, per_layer_model_projection and per_layer_projection_norm.
    """

    def make_per_layer(self, config, layers: int) -> None:
        """Make the modules, in the stock class's order."""
        width = config.hidden_size_per_layer_input
        self.embed_tokens_per_layer = PerLayerEmbedding(
            config.vocab_size_per_layer_input, layers, width, config.pad_token_id, config.embed_scale
        )
        self.per_layer_model_projection = nn.Linear(config.hidden_size, layers * width, bias=False)
        self.per_layer_projection_norm = GainNorm(width, config.rms_norm_eps)

    def per_layer_inputs(self, input_ids: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        """input_ids: [batch, seq]; embeds: [batch, seq, hidden] -> [batch, seq, layers, width]."""
        return self.project_per_layer(self.embed_tokens_per_layer(input_ids), embeds)

    def project_per_layer(self, rows: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        """rows: [batch, seq, layers * width], of the table -> the same as `per_layer_inputs`."""
        shape = (*embeds.shape[:2], -1, self.config.hidden_size_per_layer_input)
        context = self.per_layer_model_projection(embeds) * embeds.shape[-1] ** -0.5
        context = self.per_layer_projection_norm(context.reshape(shape))
        return (context + rows.reshape(shape)) * 2.0**-0.5


class OfEachLayer(Beside):
    """Vectors of tokens for each layer, and nothing else.

    Args:
        vectors: [batch, seq, layers, width].
    """

    def __init__(self, vectors: torch.Tensor):
        self.vectors = vectors

    def of_layer(self, layer_idx: int) -> dict:
        """Its vectors."""
        return {"per_layer_input": self.vectors[:, :, layer_idx]}


class SharedAndPerLayer(Beside):
    """Per-layer inputs, and keys and values that later layers read.

    Args:
        kinds: of attention, of each layer; shared: how many layers at the end share; per_layer: [batch, seq, layers,
            width], or None.
    """

    def __init__(self, kinds, shared: int, per_layer: torch.Tensor | None):
        own = len(kinds) - shared
        self.kinds, self.per_layer = kinds, per_layer
        self.first_sharing = own if shared else None
        last = {kind: i for i, kind in enumerate(kinds[:own])}
        self.sources = [i if i < own else last[kind] for i, kind in enumerate(kinds)]
        self.kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def source(self, layer_idx: int) -> int:
        """The layer in whose cache this one's keys and values are."""
        return self.sources[layer_idx]

    def of_layer(self, layer_idx: int) -> dict:
        """Its vectors, and the keys and values it shares."""
        more = {}
        if self.per_layer is not None:
            more["per_layer_input"] = self.per_layer[:, :, layer_idx]
        if self.source(layer_idx) != layer_idx:
            more["shared"] = self.kept[self.source(layer_idx)]
        return more

    def made(self, layer_idx: int, present) -> None:
        """Keep what later layers read."""
        if layer_idx in self.sources[self.first_sharing or len(self.kinds) :]:
            self.kept[layer_idx] = present

    def last_positions(self, hidden, rotary, masks, count: int):
        """Of the layers from here on the last positions alone are wanted."""
        if self.per_layer is not None:
            self.per_layer = self.per_layer[:, -count:]
        rotary = {kind: tuple(table[:, -count:] for table in tables) for kind, tables in rotary.items()}
        return hidden[:, -count:], rotary, {kind: mask[:, :, -count:] for kind, mask in masks.items()}
