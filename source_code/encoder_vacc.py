"""What an encoder needs: every position sees those behind it as well.

Stand-alone: needs torch and transformers alone.
"""

import torch

from .decoder_vacc import TextModelMixin
from .layers_vacc import SLIDING, additive


def encoder_mask(attention_mask, batch, length, reach, dtype, device, *, sequences=None, itself=False):
    """Explicit mask of real tokens within reach on either side: additive [batch, 1, length, length].

    Args:
        attention_mask: [batch, length] of 0 / 1, or None.
        reach: a query at i sees keys nearer than this; None for all.
        sequences: [batch or 1, length] of `packed_sequences`, where several samples lie in a row.
        itself: let a query see itself, padding too: in float16 a row of nothing but the minimum can overflow to -inf,
            and its NaN would reach the real tokens as 0 * NaN.
    """
    places = torch.arange(length, device=device)
    distance = (places[:, None] - places[None, :]).abs()
    allowed = torch.ones_like(distance, dtype=torch.bool) if reach is None else distance < reach
    allowed = allowed[None, None].expand(batch, 1, length, length)
    if attention_mask is not None:
        allowed = allowed & attention_mask.to(torch.bool)[:, None, None, :]
    if sequences is not None:
        allowed = allowed & (sequences[:, None, :, None] == sequences[:, None, None, :])
    if itself:
        allowed = allowed | (distance == 0)[None, None]
    return additive(allowed, dtype)


class EncoderTextModelMixin(TextModelMixin):
    """A stack that may be an encoder: its `encodes` says whether positions see those behind them as well."""

    def reach(self, kind: str):
        """A query of this kind sees keys nearer than this, on either side; None for all."""
        return self.config.sliding_window if kind == SLIDING else None

    def build_masks(
        self, attention_mask, position_ids, batch, q_len, past_key_values, dtype, device, sequences=None
    ) -> dict:
        """One additive mask per layer kind; of a decoder, as any other generation has them."""
        given = isinstance(attention_mask, dict) or (attention_mask is not None and attention_mask.dim() == 4)
        if given or not self.encodes:
            return super().build_masks(
                attention_mask, position_ids, batch, q_len, past_key_values, dtype, device, sequences
            )
        itself = self.config.iter_num is not None
        return {
            kind: encoder_mask(
                attention_mask,
                batch,
                q_len,
                self.reach(kind),
                dtype,
                device,
                sequences=sequences,
                itself=itself,
            )
            for kind in dict.fromkeys(self.layer_kind(i) for i in range(len(self.layers)))
        }
