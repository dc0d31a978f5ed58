"""Where the column factors of a linear go: into what makes its input. Data about the architecture, no arithmetic.

A norm's gain absorbs any factor. What feeds o_proj is a weighted mean of value rows, and what feeds down_proj is the
product of the activation with up_proj's output, so that factors there are those of rows of v_proj and up_proj, whose
scales are free.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gemma_deploy.calibration.points import LAYER_INPUTS
from gemma_deploy.checkpoint import ModelConfig


@dataclass(frozen=True)
class InputGroup:
    """Linears of a layer that read one tensor.

    Args:
        observed: the linear whose input is looked at; readers: all of them; names within the layer.
        norm: the norm that makes the input, or None. maker: the linear that does, or None.
    """

    observed: str
    readers: tuple[str, ...]
    norm: str | None
    maker: str | None

    def shared(self, config: ModelConfig) -> torch.Tensor | None:
        """[columns] row of the maker that feeds each column; None where every column has its own."""
        if self.maker != "self_attn.v_proj":
            return None
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        first = torch.arange(heads) // (heads // kv_heads) * config.head_dim
        return (first[:, None] + torch.arange(config.head_dim)).reshape(-1)


def input_groups(config: ModelConfig) -> tuple[InputGroup, ...]:
    """The four groups of a decoder layer, in the order in which they run."""
    second = "post_attention_layernorm" if config.model_type == "gemma" else "pre_feedforward_layernorm"
    absorbed: dict[str, tuple[str | None, str | None]] = {
        "self_attn.q_proj": ("input_layernorm", None),
        "self_attn.o_proj": (None, "self_attn.v_proj"),
        "mlp.gate_proj": (second, None),
        "mlp.down_proj": (None, "mlp.up_proj"),
    }
    return tuple(InputGroup(observed, readers, *absorbed[observed]) for observed, readers in LAYER_INPUTS.items())


def folded_norms(config: ModelConfig) -> tuple[str, ...]:
    """Norms of a layer whose gains change."""
    return tuple(group.norm for group in input_groups(config) if group.norm)
