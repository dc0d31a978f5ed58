"""What every patched Gemma generation shares: the decoder stack, the causal LM and the classification head.

Stand-alone: needs torch and transformers alone. A generation adds its decoder layer and says which rotary table each
kind of layer uses; see modeling_gemma_vacc.py and modeling_gemma3_vacc.py.
"""

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.utils import can_return_tuple

from .layers_vacc import FULL, SLIDING, packed_sequences, prefill_mask, static_decode_mask, static_prefill_mask
from .quantization_vacc import quantize_model


def kv_sizes(past_key_values, layer_idx: int, q_len: int) -> tuple[int, int]:
    """Length and index of the first key that layer `layer_idx` will attend to."""
    if past_key_values is None:
        return q_len, 0
    if isinstance(past_key_values, Cache):
        return past_key_values.get_mask_sizes(q_len, layer_idx)
    return past_key_values[layer_idx][0].shape[2] + q_len, 0


def past_length(past_key_values) -> int:
    """Number of tokens already in the cache."""
    if past_key_values is None:
        return 0
    if isinstance(past_key_values, Cache):
        return past_key_values.get_seq_length()
    return past_key_values[0][0].shape[2]


class Beside:
    """What the layers of one pass read beside the residual stream: nothing, see gain_vacc.py for more.

    Attributes:
        first_sharing: the first of the layers at the end that read the keys and values of earlier ones; None: none do.
    """

    first_sharing: int | None = None

    def source(self, layer_idx: int) -> int:
        """The layer in whose cache this one's keys and values are."""
        return layer_idx

    def of_layer(self, layer_idx: int) -> dict:
        """More arguments of a layer."""
        return {}

    def made(self, layer_idx: int, present) -> None:
        """Take note of a layer's keys and values."""


class TextModelMixin:
    """Forward of the decoder stack; expects embed_tokens, layers, norm, rotary (a ModuleDict by layer kind)."""

    encodes = False  # whether positions see those behind them as well; nothing is cached then

    def layer_kind(self, layer_idx: int) -> str:
        """`full_attention` or `sliding_attention`."""
        kinds = getattr(self.config, "layer_types", None)
        return kinds[layer_idx] if kinds else FULL

    def window(self, kind: str) -> int | None:
        """Keys a query of this kind sees, itself included; None for all."""
        return self.config.sliding_window if kind == SLIDING else None

    def entered(self, embeds):
        """What the first layer reads of embeddings [batch, seq, hidden]."""
        return embeds

    def left(self, hidden):
        """What the last norm reads of what the last layer gives."""
        return hidden

    def projected(self, normed):
        """What the stack gives of what leaves the last norm [batch, seq, hidden]."""
        return normed

    def states(self, before, last, normed):
        """What `output_hidden_states` asks for: what layers read, and what the stack gives.

        Args:
            before: what each layer read; last: what the last one made.
        """
        return (*before, normed)

    def beside(self, input_ids, embeds, **kwargs):
        """What layers read beside the residual stream; most generations: nothing."""
        return Beside()

    def build_masks(
        self, attention_mask, position_ids, batch, q_len, past_key_values, dtype, device, sequences=None
    ) -> dict:
        """One additive mask per layer kind; a prepared mapping or 4D mask is taken as it is."""
        kinds = {self.layer_kind(i): i for i in reversed(range(len(self.layers)))}
        if isinstance(attention_mask, dict):
            return {kind: attention_mask[kind] for kind in kinds}
        if attention_mask is not None and attention_mask.dim() == 4:
            return dict.fromkeys(kinds, attention_mask)
        if self.config.iter_num == 0:
            return {kind: static_prefill_mask(attention_mask, self.window(kind), dtype) for kind in kinds}
        if self.config.iter_num == 1:
            return {kind: static_decode_mask(attention_mask, position_ids, self.window(kind), dtype) for kind in kinds}
        q_offset = past_length(past_key_values)
        masks = {}
        for kind, layer_idx in kinds.items():
            kv_len, kv_offset = kv_sizes(past_key_values, layer_idx, q_len)
            masks[kind] = prefill_mask(
                attention_mask, batch, q_len, kv_len, q_offset, kv_offset, self.window(kind), dtype, device, sequences
            )
        return masks

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
        logits_to_keep=0,
        **kwargs,
    ):
        """Run the stack.

        Args:
            input_ids: [batch, seq]; attention_mask: [batch, past + seq] of 0 / 1; position_ids: [batch, seq]; without
            a mask and a cache (`use_cache` False) a row may hold several samples, whose positions begin anew;
            past_key_values: a `Cache`, or a legacy tuple of (key, value) per layer, or None; logits_to_keep: of so many
            last positions alone, where a number: layers that share keys and values compute no others.

        Returns:
            BaseModelOutputWithPast; past_key_values is a `Cache` when a `Cache` or nothing was given, and a tuple of
            (key, value) when a tuple was given or `config.iter_num` is set.

        Raises:
            ValueError: not exactly one of input_ids and inputs_embeds, a static graph without its mask, or a cache for
                an encoder.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        use_cache = False if self.encodes else self.config.use_cache if use_cache is None else use_cache
        if self.training and self.gradient_checkpointing:  # layers run twice
            use_cache = False
        if self.encodes and past_key_values is not None:
            raise ValueError("positions see those behind them as well: an encoder has no cache")
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        static = self.config.iter_num is not None
        if static and (attention_mask is None or position_ids is None):
            raise ValueError("a static graph (config.iter_num 0 or 1) needs attention_mask and position_ids")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, q_len = hidden.shape[:2]
        if past_key_values is None and use_cache and not static:
            past_key_values = DynamicCache(config=self.config)
        sequences = None
        if position_ids is not None and attention_mask is None and past_key_values is None:
            sequences = packed_sequences(position_ids)
        if position_ids is None:
            position_ids = torch.arange(q_len, device=hidden.device)[None] + past_length(past_key_values)
        masks = self.build_masks(
            attention_mask, position_ids, batch, q_len, past_key_values, hidden.dtype, hidden.device, sequences
        )
        rotary = {kind: module(hidden, position_ids) for kind, module in self.rotary.items()}

        cache = past_key_values if isinstance(past_key_values, Cache) else None
        presents, attentions, states = [], [], []
        beside = self.beside(input_ids, hidden, **kwargs)
        hidden = self.entered(hidden)
        whole = output_hidden_states or output_attentions
        last = 1 if self.config.iter_num == 0 and self.config.insert_slice else 0 if whole else logits_to_keep
        for i, layer in enumerate(self.layers):
            if i == beside.first_sharing and isinstance(last, int) and 0 < last < q_len:
                hidden, rotary, masks = beside.last_positions(hidden, rotary, masks, last)
            if output_hidden_states:
                states.append(hidden)
            kind = self.layer_kind(i)
            past = cache if cache is not None or past_key_values is None else past_key_values[beside.source(i)]
            hidden, probs, present = layer(
                hidden,
                position_embeddings=rotary[kind],
                attention_mask=masks[kind],
                past_key_values=past,
                **beside.of_layer(i),
            )
            beside.made(i, present)
            if use_cache and cache is None and beside.source(i) == i:
                presents.append(present)
            if output_attentions:
                attentions.append(probs)
        normed = self.projected(self.norm(self.left(hidden)))
        return BaseModelOutputWithPast(
            last_hidden_state=normed,
            past_key_values=(cache if cache is not None else tuple(presents)) if use_cache else None,
            hidden_states=self.states(states, hidden, normed) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )


class CausalLMMixin:
    """LM head over the stack, with the strided slice of the prefill graph and `quantize`."""

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        logits_to_keep=0,
        **kwargs,
    ):
        """Logits [batch, seq, vocab]; [batch, 1, vocab] with `iter_num` 0 and `insert_slice`; takes the stack's."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            logits_to_keep=logits_to_keep,
            **({"per_layer_inputs": kwargs.pop("per_layer_inputs")} if "per_layer_inputs" in kwargs else {}),
        )
        hidden = outputs.last_hidden_state
        if self.config.iter_num == 0 and self.config.insert_slice:
            hidden = hidden[:, -1:, :]
        elif isinstance(logits_to_keep, torch.Tensor):
            hidden = hidden[:, logits_to_keep, :]
        elif logits_to_keep:
            hidden = hidden[:, -logits_to_keep:, :]
        logits = self.lm_head(hidden)
        cap = getattr(self.config, "final_logit_softcapping", None)
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def quantize(self, bits: int = 8, embeddings: bool = False):
        """Swap the linears of every layer (and the table with `embeddings`) for per-channel int8, in place."""
        return quantize_model(self, bits, embeddings)


class SequenceClassificationMixin:
    """Scores of the last real token, wherever the padding is."""

    def _make_head(self, config) -> None:
        self.num_labels = config.num_labels
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        **kwargs,
    ):
        """Pooled logits [batch, num_labels] (arguments: the stack's).

        Raises:
            ValueError: a batch without a padding token, where the last real token cannot be found.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        logits = self.score(outputs.last_hidden_state)
        batch, pad = logits.shape[0], self.config.pad_token_id
        if pad is None and batch != 1:
            raise ValueError("a batch of more than one sequence needs config.pad_token_id")
        if pad is None or input_ids is None:
            last = torch.full((batch,), logits.shape[1] - 1, device=logits.device)
        else:
            # The number of positions before the count of non-pad tokens is complete: right for either padding side.
            seen = torch.ne(input_ids, pad).cumsum(-1)
            last = (seen < seen[:, -1:]).sum(-1).to(logits.device)
        pooled = logits[torch.arange(batch, device=logits.device), last]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=pooled, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=pooled,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
