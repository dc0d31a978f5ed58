"""Blocks of Gemma 3n and 4: norms that multiply by their weight, values with a norm of their own, unscaled scores.

Stand-alone: needs torch and transformers alone. As in layers_vacc.py, operations and their order are the stock ones.
"""

import torch
from torch import nn

from .layers_vacc import Attention, RMSNorm, apply_rotary


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
