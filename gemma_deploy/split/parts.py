"""Bottom, trunk and top: the patched model's own stack with the modules a part does not have left out.

Layers count from 0 in every part, so each has a KV cache of its own; masks and rotary tables are made in each from
attention_mask and position_ids, and hidden states are all that passes between them.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from transformers.cache_utils import Cache

from gemma_deploy.checkpoint import ModelConfig
from gemma_deploy.graph.skeleton import new_model
from gemma_deploy.partition import Span
from gemma_deploy.partition.spans import BOTTOM, TOP, TRUNK


class Part(nn.Module):
    """Some layers of a model, and what goes in front of or behind them.

    Args:
        config: of the whole model; span: which part of it. Parameters are on the meta device.
        embed_scale: rounding of the embedding scale.
    """

    kind: ClassVar[str]

    def __init__(self, config: ModelConfig, span: Span, embed_scale: str = "exact") -> None:
        super().__init__()
        self.model_config, self.span, self.embed_scale = config, span, embed_scale
        causal = new_model(
            config,
            num_hidden_layers=span.stop - span.start,
            layer_types=list(config.layer_types[span.start : span.stop]),
            embed_scale=embed_scale,
        )
        self.config = causal.config
        self.model = causal.model
        self._prune(causal)

    def _prune(self, causal: nn.Module) -> None:
        """Take away what other parts have, and take what this one has besides its layers."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Of the parameters."""
        return next(self.parameters()).device

    def stack(self, entering: dict[str, torch.Tensor], **kwargs: Any) -> torch.Tensor:
        """Run the layers: `input_ids` or `inputs_embeds` -> hidden states [batch, seq, hidden]."""
        hidden: torch.Tensor = self.model(**entering, use_cache=kwargs.get("past_key_values") is not None, **kwargs)[0]
        return hidden

    def forward(
        self,
        entering: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> torch.Tensor:
        """Run the part.

        Args:
            entering: hidden states [batch, seq, hidden] of the part before; of a bottom token ids [batch, seq].
            attention_mask: [batch, past + seq] of 0 / 1; position_ids: [batch, seq].
            past_key_values: this part's cache, updated in place; None computes without one.

        Returns:
            hidden states [batch, seq, hidden]; of a top after the final norm, see `Top.head`.
        """
        return self.stack(
            {"inputs_embeds": entering},
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
        )


class Bottom(Part):
    """Embedding and layers [0, a): token ids -> hidden states."""

    kind = BOTTOM

    def _prune(self, causal: nn.Module) -> None:
        self.model.norm = nn.Identity()

    def forward(
        self,
        entering: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> torch.Tensor:
        """entering: token ids [batch, seq], or embeddings [batch, seq, hidden] in their place."""
        name = "inputs_embeds" if entering.is_floating_point() else "input_ids"
        return self.stack(
            {name: entering},
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
        )


class Trunk(Part):
    """Layers [a, b): hidden states -> hidden states."""

    kind = TRUNK

    def _prune(self, causal: nn.Module) -> None:
        self.model.norm = nn.Identity()
        del self.model.embed_tokens


class Top(Part):
    """Layers [b, n), final norm and LM head: hidden states -> normed hidden states, and logits from those."""

    kind = TOP

    def _prune(self, causal: nn.Module) -> None:
        del self.model.embed_tokens
        self.lm_head = causal.lm_head

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normed hidden states [..., hidden] -> logits [..., vocab], capped where the model caps them."""
        logits: torch.Tensor = self.lm_head(hidden)
        cap = self.model_config.final_logit_softcapping
        return logits if cap is None else torch.tanh(logits / cap) * cap
