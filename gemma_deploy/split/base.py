"""What every part of a split model is: some layers of the patched stack, with a KV cache of its own.

Layers count from 0 in every part; masks and rotary tables are made in each from attention_mask and position_ids, and
hidden states are all that passes between parts, but for the models that passing.py is about.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self, TypeAlias, TypeGuard

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache

from gemma_deploy.checkpoint import ModelConfig
from gemma_deploy.errors import UsageError
from gemma_deploy.names import EMBEDDING_WEIGHT, HEAD_WEIGHT, MIB
from gemma_deploy.partition import Span
from gemma_deploy.partition.beside import Reads
from gemma_deploy.partition.mapper import ParameterMapper
from gemma_deploy.partition.spans import BOTTOM, TOP, TRUNK
from gemma_deploy.patched import patched_causal
from gemma_deploy.split.passing import Hidden, NotingCache, PartBeside, Passed, as_is, given

Mask: TypeAlias = torch.Tensor | Mapping[str, torch.Tensor]


class Part(nn.Module):
    """Some layers of a model, and what goes in front of or behind them.

    Args:
        config: of the whole model; span: which part of it. Parameters are on the meta device.
        embed_scale: rounding of the embedding scale, `exact` or `bf16`.

    Attributes:
        cache: what `use_cache=True` has collected; None where there is nothing.
    """

    kind: ClassVar[str]

    def __init__(self, config: ModelConfig, span: Span, embed_scale: str = "exact") -> None:
        super().__init__()
        self.model_config, self.span, self.embed_scale = config, span, embed_scale
        causal = patched_causal(
            config,
            **config.architecture.part_keys(config.layers[span.start : span.stop]),
            embed_scale=embed_scale,
        )
        self.config = causal.config
        self.model = causal.model
        self.cache: Cache | None = None
        self._cache_is_padded = False
        self.reads = Reads.of(config, span) if config.reads_beside else None
        self._prune(causal)
        if self.reads is not None:
            self.config.num_kv_shared_layers = 0  # so that a cache made from it has a place for what others make
            self.model.beside = given
        if config.altup is not None:
            self._prune_streams()

    @classmethod
    def from_pretrained_split(
        cls,
        full_state_dict: Mapping[str, torch.Tensor],
        config: Any,
        *,
        start_layer: int = 0,
        end_layer: int | None = None,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Self:
        """This part of a model that is in memory; `ModelFactory` reads it from a checkpoint without the rest.

        Args:
            full_state_dict: the whole model's `state_dict()`; its tensors are copied.
            config: the whole model's, of transformers or as the dictionary in config.json.
            start_layer, end_layer: layers [start_layer, end_layer) of the model; of a top part the end may be left out.
            dtype: of the parameters; each tensor's own by default.

        Raises:
            UsageError: layers that are no such part; CheckpointError: tensors are missing or have another shape.
        """
        raw = dict(config) if isinstance(config, Mapping) else config.to_dict()
        head, table = full_state_dict.get(HEAD_WEIGHT), full_state_dict.get(EMBEDDING_WEIGHT)
        if head is not None and table is not None and head is not table and not torch.equal(head, table):
            raw["tie_word_embeddings"] = False  # as transformers: a head of its own is kept, whatever the config says
        whole = ModelConfig.from_dict(raw, "config")
        layers = whole.num_hidden_layers
        stop = layers if end_layer is None else end_layer
        fits = {BOTTOM: start_layer == 0 and stop < layers, TOP: start_layer > 0 and stop == layers, TRUNK: True}
        if not (fits[cls.kind] and 0 <= start_layer < stop <= layers):
            raise UsageError(
                f"layers {start_layer} to {stop} of {layers} are no {cls.kind} part",
                expected={
                    BOTTOM: f"start_layer 0 and an end_layer from 1 to {layers - 1}",
                    TOP: f"a start_layer from 1 to {layers - 1} and end_layer {layers}",
                }.get(cls.kind, f"0 <= start_layer < end_layer <= {layers}"),
                next_step="pass the layer numbers where the model is cut",
            )
        part = cls(whole, Span(cls.kind, start_layer, stop, cls.kind == BOTTOM, cls.kind == TOP))
        mapper = ParameterMapper(whole, part.span)
        mapper.check([local for local, name in mapper.sources.items() if name in full_state_dict], "full_state_dict")

        def copied(local: str, name: str) -> torch.Tensor:
            tensor, share = full_state_dict[name].detach(), mapper.shares.get(name)
            if share is not None:
                tensor = tensor.narrow(share.axis, share.start, share.stop - share.start)
            return tensor.to(device=device, dtype=dtype or tensor.dtype, copy=True)

        return part.fill(mapper, copied, "full_state_dict")

    def _prune(self, causal: nn.Module) -> None:
        """Take away what other parts have, and take what this one has besides its layers."""
        raise NotImplementedError

    def _prune_streams(self) -> None:
        """Take away what other parts do to make streams of embeddings, and one hidden state of streams."""
        if self.kind != BOTTOM:
            del self.model.altup_projections
            self.model.entered = as_is
        if self.kind != TOP:
            del self.model.altup_unembed_projections
            self.model.left = as_is

    def fill(self, mapper: ParameterMapper, read: Callable[[str, str], torch.Tensor], where: str) -> Self:
        """Give every parameter its tensor, and go into evaluation mode.

        Args:
            read: (name in the part, name in the model) -> tensor.
            where: the tensors come from, for messages.

        Raises:
            CheckpointError: a tensor has another shape than the config says.
        """
        mapper.check(self.state_dict(), where)
        for local, source in mapper.sources.items():
            value = read(local, source)
            mapper.check_shape(local, tuple(value.shape), where)
            module_name, _, parameter = local.rpartition(".")
            module = self.get_submodule(module_name)
            if parameter in module._buffers:
                module.register_buffer(parameter, value)
            else:
                module.register_parameter(parameter, nn.Parameter(value))
        return self.eval()

    @property
    def device(self) -> torch.device:
        """The device of the part's parameters."""
        return next(self.parameters()).device

    @property
    def start_layer(self) -> int:
        """The model's number of the first layer here."""
        return self.span.start

    @property
    def end_layer(self) -> int:
        """The model's number of the first layer behind this part."""
        return self.span.stop

    @property
    def num_layers(self) -> int:
        """Layers of this part."""
        return self.span.stop - self.span.start

    def num_parameters(self) -> int:
        """Numbers in all weights of this part; a tied table counts in the bottom and in the top part."""
        return sum(parameter.numel() for parameter in self.parameters())

    def memory_footprint_mb(self) -> float:
        """MiB of all weights of this part, in the dtype they have; the KV cache comes on top."""
        return sum(parameter.nbytes for parameter in self.parameters()) / MIB

    def get_transformer_blocks(self) -> nn.ModuleList:
        """Decoder layers of this part; the first has number 0."""
        layers: nn.ModuleList = self.model.layers
        return layers

    def get_layer_name_pattern(self) -> str:
        """Regular expression that finds the layer in a parameter's name: `model.layers.3.mlp.up_proj.weight`."""
        return r"\.layers\.[0-9]+"

    def prepare_attention_mask(
        self,
        attention_mask: Mask | None,
        hidden_states: Hidden,
        past_key_values: Cache | None = None,
    ) -> Mask:
        """The additive masks that this part's layers get: 0 where a token is seen, the dtype's minimum elsewhere.

        A call of the part makes them itself; it also takes one of these in the place of attention_mask.

        Args:
            attention_mask: [batch, past + seq] of 0 / 1; None sees every token before.
            hidden_states: [batch, seq, hidden], for sizes, dtype and device; past_key_values: the tokens before.

        Returns:
            [batch, 1, seq, keys]; where the part has layers with a sliding window and others, one for each kind.
        """
        batch, length = hidden_states.shape[:2]
        at = hidden_states.device
        masks: dict[str, torch.Tensor] = self.model.build_masks(
            attention_mask, None, batch, length, past_key_values, hidden_states.dtype, at
        )
        return next(iter(masks.values())) if len(masks) == 1 else masks

    def reset_cache(self) -> None:
        """Forget what `use_cache=True` has collected: the next call begins a new text."""
        self.cache, self._cache_is_padded = None, False

    def _run(
        self,
        entering: Mapping[str, Hidden],
        attention_mask: Mask | None,
        position_ids: torch.Tensor | None,
        past_key_values: Cache | None,
        use_cache: bool,
        logits_to_keep: int = 0,
    ) -> tuple[Hidden, Cache | None]:
        """What leaves the last layer (of a top the norm), and the cache that was used.

        Args:
            entering: `input_ids`, or `inputs_embeds`: embeddings of a bottom, else what the part before gave.
            logits_to_keep: layers that read keys and values of others compute so many last positions alone; 0: all.
        """
        here = self.device
        entering = {name: value.to(here) for name, value in entering.items()}
        attention_mask, position_ids = moved(attention_mask, here), moved(position_ids, here)
        batch, length = next(iter(entering.values())).shape[:2]
        cache = past_key_values
        if cache is None and use_cache:
            if self.cache is None:
                self.cache = DynamicCache(config=self.config)
            cache = self.cache
        if cache is not None:
            self._check_cache(cache, batch, length, attention_mask)
        if cache is not None and cache is self.cache and _is_flat(attention_mask):
            self._cache_is_padded = not bool(attention_mask.all())
        beside = None if self.reads is None else self._beside(entering, self.reads, cache)
        more = {} if beside is None else {"beside": beside, "logits_to_keep": logits_to_keep}
        hidden: torch.Tensor = self.model(
            **(entering if beside is None else {"inputs_embeds": beside.entered.hidden_states}),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache if beside is None or beside.cache is None else beside.cache,
            use_cache=cache is not None,
            **more,
        )[0]
        if beside is None or self.span.heads:
            return hidden, cache
        return beside.leaving(hidden, vectors_behind=self.model_config.per_layer is not None), cache

    def _beside(self, entering: Mapping[str, Hidden], reads: Reads, cache: Cache | None) -> PartBeside:
        """What layers read beside the stream, of token ids, embeddings, or what the part before gave.

        Raises:
            UsageError: that gave less than this part needs.
        """
        passed, ids = entering.get("inputs_embeds"), entering.get("input_ids")
        if self.span.embeds:
            embeds = self.model.embed_tokens(ids) if passed is None else passed
            passed = Passed(embeds, ids, embeds)
        adds = self.model_config.per_layer is not None
        passed = self._checked(passed, reads, adds)
        noting = None if cache is None else NotingCache(cache, self.num_layers)
        try:
            made = type(self.model).beside(self.model, passed.input_ids, passed.inputs_embeds) if adds else None
        except ValueError as error:
            raise UsageError(
                "this model looks up a vector of each token: embeddings do not say which tokens they are",
                expected="token ids",
                next_step="give the bottom part input_ids",
            ) from error
        return PartBeside(reads, made and made.per_layer, entered=passed, cache=noting)

    def _checked(self, passed: Hidden | None, reads: Reads, adds: bool) -> Passed:
        """What came of the part before, unless that is less than this one needs.

        Args:
            adds: whether layers add vectors of tokens.

        Raises:
            UsageError: hidden states alone, or other keys and values.
        """
        wanted = dict.fromkeys((*reads.borrowed, *(layer for layer in reads.passed if layer not in reads.made)))
        held = passed.keys_values if isinstance(passed, Passed) else {}
        missing = [f"keys and values of layer {layer}" for layer in wanted if layer not in held]
        if adds and (not isinstance(passed, Passed) or passed.inputs_embeds is None):
            missing.insert(0, "inputs_embeds")
        if missing or not isinstance(passed, Passed):
            raise UsageError(
                f"this {self.kind} part was given no {', '.join(missing) or 'more than hidden states'}",
                expected="all that the part before gives, which is more than hidden states",
                next_step="pass on what the part before returned, or Passed.of(...) of all its tensors",
            )
        return passed

    def _check_cache(self, cache: Cache, batch: int, length: int, attention_mask: Mask | None) -> None:
        """Refuse a cache or mask with which the result would be wrong without an error.

        Raises:
            UsageError: another number of layers or sequences, or a mask without the tokens before.
        """
        own = cache is self.cache
        columns = "append the new tokens' columns to the mask of before"
        forget = "call reset_cache() of every part to begin a new text"
        if len(cache.layers) > self.num_layers:
            raise UsageError(
                f"past_key_values has {len(cache.layers)} layers, and this {self.kind} part {self.num_layers}",
                expected="a cache for each part: its layers count from 0",
                next_step="give every part its own DynamicCache(config=part.config), or use_cache=True",
            )
        past = int(cache.get_seq_length())
        held = next((layer.keys.shape[0] for layer in cache.layers if getattr(layer, "keys", None) is not None), batch)
        if past and held != batch:
            raise UsageError(
                f"the cache of this {self.kind} part holds {held} sequences, and {batch} came",
                expected=f"the next tokens of the same {held}",
                next_step=forget if own else "give past_key_values of these sequences",
            )
        if _is_flat(attention_mask):
            if attention_mask.shape[1] < past + length:
                raise UsageError(
                    f"attention_mask has {attention_mask.shape[1]} columns for {past} tokens before and {length} new",
                    expected=f"[batch, {past + length}]: one column for every token from the first on",
                    next_step=f"{columns}, or {forget}" if own else columns,
                )
        elif attention_mask is None and own and past and self._cache_is_padded:
            raise UsageError(
                f"the {past} tokens in the cache of this {self.kind} part hold padding, and no attention_mask came",
                expected=f"attention_mask [batch, {past + length}] with 0 for padding, as before",
                next_step=f"{columns}, or {forget}",
            )


def moved(value: Any, device: torch.device) -> Any:
    """A tensor, a mask for each kind of layer, or None, on that device."""
    if isinstance(value, Mapping):
        return {kind: mask.to(device) for kind, mask in value.items()}
    return None if value is None else value.to(device)


def _is_flat(attention_mask: Mask | None) -> TypeGuard[torch.Tensor]:
    """Whether a mask is [batch, tokens] of 0 / 1, and not yet what layers add to their scores."""
    return isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2
