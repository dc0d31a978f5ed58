"""Parts in a row as one causal LM of transformers: loss, gradients, and every way of `generate()`."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DummyLayer, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from gemma_deploy.errors import UsageError
from gemma_deploy.patched import patched_config
from gemma_deploy.split.base import Part
from gemma_deploy.split.factory import load_part
from gemma_deploy.split.layout import read_split
from gemma_deploy.split.parts import Bottom, Top


class SplitChain(PreTrainedModel, GenerationMixin):
    """bottom, trunks, top; each stays on its own device, hidden states are moved.

    Args:
        parts: in order, without a gap.

    Raises:
        UsageError: parts of different models, missing ones, or another order.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        edges = [0, *(part.span.stop for part in parts)]
        model = parts[0].model_config if parts else None
        whole = (
            model is not None
            and isinstance(parts[0], Bottom)
            and isinstance(parts[-1], Top)
            and [part.span.start for part in parts] == edges[:-1]
            and edges[-1] == model.num_hidden_layers
        )
        if model is None or not whole or any(part.model_config != model for part in parts):
            held = ", ".join(f"{part.kind} {part.span.start} to {part.span.stop}" for part in parts)
            raise UsageError(
                f"these parts are no whole model: {held or 'none'}",
                expected="bottom, trunk(s) and top of one checkpoint, in order and without a gap",
                next_step="pass all parts that ModelFactory.create_split_models returned",
            )
        super().__init__(patched_config(model, embed_scale=parts[0].embed_scale))
        self.parts = nn.ModuleList(parts)
        self.train(parts[0].training)
        self.loss_type = "ForCausalLM"
        self.generation_config.eos_token_id = list(model.eos_token_ids)

    @classmethod
    def from_split(cls, directory: str | Path, device: str | Sequence[str] = "cpu") -> SplitChain:
        """Load what `gemma-deploy split` wrote.

        Args:
            device: one for all parts, or one for each.
        """
        names = read_split(Path(directory))
        devices = [device] * len(names) if isinstance(device, str) else list(device)
        if len(devices) != len(names):
            raise UsageError(
                f"{len(devices)} devices for {len(names)} parts: {', '.join(names)}", next_step="name one for each part"
            )
        return cls([load_part(Path(directory) / name, at) for name, at in zip(names, devices, strict=True)])

    @property
    def device(self) -> torch.device:
        """The device of the first part, where token ids go."""
        return self.parts[0].device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parts' parameters."""
        return next(self.parameters()).dtype

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As the whole model's forward; logits and loss are on the top's device.

        The cache is one `Cache` to the outside. Every part is given one of its own layers, whose keys and values stay
        on the part's device.

        Raises:
            ValueError: not exactly one of input_ids and inputs_embeds.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if past_key_values is None and use_cache and not self.training:
            past_key_values = DynamicCache(config=self.config)
        caches = self._caches(past_key_values)
        at = {"attention_mask": attention_mask, "position_ids": position_ids}
        bottom, *middle, top = self.parts
        hidden = bottom(input_ids, inputs_embeds=inputs_embeds, **at, past_key_values=caches[0])
        for part, cache in zip(middle, caches[1:-1], strict=True):
            hidden = part(hidden, **at, past_key_values=cache)
        logits = top(hidden, **at, past_key_values=caches[-1], logits_to_keep=logits_to_keep).logits
        loss = None
        if labels is not None:
            labels = labels.to(logits.device)
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def _caches(self, cache: Cache | None) -> list[Cache | None]:
        """A cache for each part, over the same layer objects as the whole one."""
        if cache is None:
            return [None] * len(self.parts)
        while len(cache.layers) < self.config.num_hidden_layers:  # made one by one where all layers are of one kind
            cache.layers.append(cache.layer_class_to_replicate())
        for part in self.parts:  # a part has a copy of what it reads of earlier ones, in the place of its first reader
            for source, place in () if part.reads is None else part.reads.borrowed.items():
                if isinstance(cache.layers[part.span.start + place], DummyLayer):
                    cache.layers[part.span.start + place] = deepcopy(cache.layers[source])
        return [Cache(layers=cache.layers[part.span.start : part.span.stop]) for part in self.parts]
