"""Bottom, trunk and top of a Gemma.

    hidden = trunk(bottom(input_ids))
    output = top(hidden)  # output.logits; output.loss where labels are given

A call computes the whole sequence it is given. With `use_cache=True` it continues what the part was given before, until
`reset_cache()`: the prompt first, then each new token on its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from gemma_deploy.partition.spans import BOTTOM, TOP, TRUNK
from gemma_deploy.split.base import Mask, Part
from gemma_deploy.split.choosing import Sampling, choose, continued, last_positions
from gemma_deploy.split.passing import Hidden


class Bottom(Part):
    """Embedding and layers [0, a): token ids -> hidden states."""

    kind = BOTTOM

    def _prune(self, causal: nn.Module) -> None:
        self.model.norm = nn.Identity()

    def get_embeddings(self) -> nn.Module:
        """Token embedding: ids [batch, seq] -> [batch, seq, hidden], Gemma's factor sqrt(hidden_size) included."""
        table: nn.Module = self.model.embed_tokens
        return table

    def apply_position_encoding(
        self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The embeddings as they are: Gemma's positions are rotations of queries and keys inside every layer (RoPE)."""
        return inputs_embeds

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Mask | None = None,
        *,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        inputs_embeds: torch.Tensor | None = None,
    ) -> Hidden:
        """Embed, and run the layers.

        Args:
            input_ids: token ids [batch, seq], or embeddings [batch, seq, hidden] in their place.
            attention_mask: [batch, past + seq] of 0 / 1, or what `prepare_attention_mask` gives; None: no padding.
            position_ids: [batch, seq]; by default a token's place in the text, padding included.
            past_key_values: a cache for this part's layers, updated in place.
            use_cache: continue this part's own cache. Without it and without past_key_values nothing is kept.
            inputs_embeds: [batch, seq, hidden] in the place of input_ids.

        Returns:
            Hidden states [batch, seq, hidden] for the next part; where its layers read more, a `Passed`.

        Raises:
            UsageError: the cache and what came do not belong together.
            ValueError: not exactly one of input_ids and inputs_embeds.
        """
        if input_ids is not None and input_ids.is_floating_point() and inputs_embeds is None:
            input_ids, inputs_embeds = None, input_ids
        given = {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
        entering: dict[str, Hidden] = {name: value for name, value in given.items() if value is not None}
        if len(entering) != 1:
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        return self._run(entering, attention_mask, position_ids, past_key_values, use_cache)[0]


class Trunk(Part):
    """Layers [a, b): hidden states -> hidden states."""

    kind = TRUNK

    def _prune(self, causal: nn.Module) -> None:
        self.model.norm = nn.Identity()
        del self.model.embed_tokens

    def forward(
        self,
        hidden_states: Hidden,
        attention_mask: Mask | None = None,
        *,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
    ) -> Hidden:
        """Run the layers on hidden states [batch, seq, hidden] of the part before; the rest as in `Bottom.forward`."""
        entering = {"inputs_embeds": hidden_states}
        return self._run(entering, attention_mask, position_ids, past_key_values, use_cache)[0]


class Top(Part):
    """Layers [b, n), final norm and LM head: hidden states -> logits, loss, the next tokens."""

    kind = TOP

    def _prune(self, causal: nn.Module) -> None:
        del self.model.embed_tokens
        self.lm_head = causal.lm_head

    def get_final_norm(self) -> nn.Module:
        """The RMSNorm in front of the LM head."""
        norm: nn.Module = self.model.norm
        return norm

    def get_lm_head(self) -> nn.Module:
        """The linear layer hidden -> vocab; `head` caps its logits where the model does (Gemma 2)."""
        head: nn.Module = self.lm_head
        return head

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normed hidden states [..., hidden] -> logits [..., vocab], capped where the model caps them."""
        logits: torch.Tensor = self.lm_head(hidden)
        cap = self.model_config.final_logit_softcapping
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _normed(self, hidden_states: Hidden, **at: Any) -> tuple[torch.Tensor, Cache | None]:
        """What leaves the norm [batch, seq, hidden], of the last positions alone where layers compute no others."""
        hidden, cache = self._run({"inputs_embeds": hidden_states}, **at)
        assert isinstance(hidden, torch.Tensor)
        return hidden, cache

    def forward(
        self,
        hidden_states: Hidden,
        attention_mask: Mask | None = None,
        *,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
    ) -> CausalLMOutputWithPast:
        """Run the layers, the norm and the LM head.

        Args:
            hidden_states: [batch, seq, hidden] of the part before; attention_mask, position_ids, past_key_values,
                use_cache: as in `Bottom.forward`.
            labels: token ids [batch, seq], -100 where there is no loss. Token i + 1 is the label of position i: pass
                the input ids themselves.
            logits_to_keep: of the last so many positions alone, or of the positions in a tensor; 0: all.

        Returns:
            `logits` [batch, positions, vocab], `loss` where there are labels, `past_key_values` where a cache was used.

        Raises:
            UsageError: the cache and what came do not belong together.
        """
        hidden, cache = self._normed(
            hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep if isinstance(logits_to_keep, int) else 0,
        )
        if isinstance(logits_to_keep, torch.Tensor):
            hidden = hidden[:, logits_to_keep.to(hidden.device), :]
        elif logits_to_keep:
            hidden = hidden[:, -logits_to_keep:, :]
        logits = self.head(hidden)
        loss = None
        if labels is not None:
            loss = ForCausalLMLoss(logits, labels.to(logits.device), vocab_size=self.model_config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)

    def next_tokens(
        self,
        hidden_states: Hidden,
        attention_mask: torch.Tensor | None = None,
        *,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        sampling: Sampling | None = None,
    ) -> torch.Tensor:
        """The token that follows the last one of each sequence, which padding on either side does not count as.

        Args:
            hidden_states and the rest: as in `forward`; sampling: the likeliest token without it.

        Returns:
            Token ids [batch, 1], as a bottom part takes them.
        """
        ends = attention_mask is None or bool(attention_mask[:, -1].all())  # no padding on the right
        with torch.no_grad():
            hidden, _ = self._normed(
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                logits_to_keep=int(ends),
            )
            return choose(self.head(last_positions(hidden, attention_mask)), sampling or Sampling())

    def generate(
        self,
        hidden_states: Hidden,
        continue_with: Callable[..., Hidden],
        attention_mask: torch.Tensor | None = None,
        *,
        position_ids: torch.Tensor | None = None,
        max_new_tokens: int = 20,
        sampling: Sampling | None = None,
    ) -> torch.Tensor:
        """Write text token by token, with the other parts wherever they are; `SplitChain.generate` has them all here.

            def below(ids, **at):
                return trunk(bottom(ids, use_cache=True, **at), use_cache=True, **at)

            new = top.generate(below(prompt_ids), below, max_new_tokens=20)

        Args:
            hidden_states: of the prompt [batch, seq, hidden], as they enter this part; its own cache starts anew.
            continue_with: called with the tokens that were chosen [batch, 1], and with attention_mask
                [batch, past + 1] and, where position_ids came, those; returns what enters this part for them.
            attention_mask, position_ids: of the prompt, as the parts before had them; padding stands on the left.
            max_new_tokens: at least 1; less come where every sequence has ended with a stop token of the model.
            sampling: the likeliest tokens without it.

        Returns:
            Token ids [batch, new], padded behind a stop token.
        """
        self.reset_cache()

        def step(hidden: Hidden, **at: Any) -> torch.Tensor:
            return self.next_tokens(hidden, **at, use_cache=True, sampling=sampling)

        config = self.model_config
        stops, pad = config.eos_token_ids, config.pad_token_id or 0
        at = {"attention_mask": attention_mask, "position_ids": position_ids}
        return continued(step, continue_with, hidden_states, at=at, max_new_tokens=max_new_tokens, stops=stops, pad=pad)
