"""Building blocks of the patched Gemma models: norm, embedding, legacy rotary, explicit masks, attention, MLP.

Stand-alone: needs torch and transformers alone. Operations and their order are those of the stock classes with eager
attention, so that logits agree bit for bit; the static decode graph (`config.iter_num` 1) is the one exception, see
`decode_attention`.
"""

import math

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

SLIDING, FULL = "sliding_attention", "full_attention"


class ScaledEmbedding(nn.Embedding):
    """Embedding times sqrt(hidden_size); the scale is a scalar of the graph and never folded into the tied table."""

    def __init__(self, vocab_size: int, hidden_size: int, padding_idx: int | None, rounding: str):
        super().__init__(vocab_size, hidden_size, padding_idx)
        if rounding not in ("exact", "bf16"):
            raise ValueError(f'config.embed_scale is {rounding!r}; allowed: "exact", "bf16"')
        self.rounding = rounding
        self.divisor = 1.0  # a power of two: the residual stream of a rescaled float16 graph is that much smaller

    @property
    def embed_scale(self) -> float:
        """What the rows are multiplied by; PEFT reads it to scale what an adapter adds to them."""
        return self.scale_value(self.weight.dtype) / self.divisor

    def scale_value(self, dtype: torch.dtype) -> float:
        """sqrt(hidden_size) as the number the run dtype holds (bfloat16: 640 -> 25.25, 3072 -> 55.5)."""
        return rounded_sqrt(self.embedding_dim, dtype, self.rounding)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """input_ids: [batch, seq] -> [batch, seq, hidden]."""
        return super().forward(input_ids) * self.embed_scale


def rounded_sqrt(hidden_size: int, dtype: torch.dtype, rounding: str) -> float:
    """sqrt(hidden_size) rounded to `dtype`, by way of bfloat16 when `rounding` is "bf16"."""
    return rounded(math.sqrt(hidden_size), torch.float32, *([torch.bfloat16] if rounding == "bf16" else []), dtype)


def rounded(value: float, *dtypes: torch.dtype) -> float:
    """A positive number as one dtype after the other holds it."""
    # Spelled with math alone: a tensor made here would be a meta or fake tensor under init or export.
    for step in dtypes:
        ulp = torch.finfo(step).eps * 2.0 ** math.floor(math.log2(value))
        value = round(value / ulp) * ulp
    return value


class RMSNorm(nn.Module):
    """x_hat * (1 + weight), computed in float32 and cast once at the end."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., dim]."""
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return (x32 * (1.0 + self.weight.float())).type_as(x)


class LegacyRotary(nn.Module):
    """cos / sin tables gathered by position_ids (transformers 4.31 style), half as wide because both halves are equal.

    Args:
        head_dim: D.
        theta: base of the frequencies.
        factor: linear position scaling (Gemma 3, 4B and up, global layers).
        rotated: share of the pairs that turn, the first ones; frequencies are those of all (Gemma 4, global layers).
    """

    def __init__(self, head_dim: int, theta: float, factor: float = 1.0, rotated: float = 1.0):
        super().__init__()
        self.head_dim, self.theta, self.factor, self.rotated = head_dim, theta, factor, rotated
        self.in_float32 = False  # cos and sin in float32, for activations of any dtype
        self._tables: tuple[torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def of(cls, head_dim: int, rope: dict) -> "LegacyRotary":
        """From an entry of `config.rope_parameters`.

        Raises:
            ValueError: a rope_type that no Gemma has.
        """
        kind, factor = rope["rope_type"], rope.get("factor", 1.0)
        if kind not in ("default", "linear", "proportional"):
            raise ValueError(f"config.rope_parameters: rope_type is {kind!r}; allowed: default, linear, proportional")
        rotated = rope.get("partial_rotary_factor", 1.0) if kind == "proportional" else 1.0
        return cls(head_dim, rope["rope_theta"], 1.0 if kind == "default" else factor, rotated)

    def make_tables(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos, sin: [length, head_dim / 2], float32 on the CPU."""
        with torch.device("cpu"):
            inv_freq = 1.0 / (self.theta ** (torch.arange(0, self.head_dim, 2, dtype=torch.float) / self.head_dim))
            inv_freq[int(self.rotated * self.head_dim // 2) :] = 0.0
            freqs = torch.arange(length).float()[:, None] * (inv_freq / self.factor)[None, :]
        return freqs.cos(), freqs.sin()

    def freeze(self, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Make the tables buffers of fixed length (for export, where they become initializers)."""
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """position_ids: [batch, seq] -> cos, sin: [batch, seq, head_dim] of x's dtype (float32 when `in_float32`)."""
        if "cos" in self._buffers:
            cos, sin = self.cos, self.sin
        else:
            needed = int(position_ids.max()) + 1
            if self._tables is None or self._tables[0].shape[0] < needed or self._tables[0].device != x.device:
                tables = self.make_tables(max(needed, 1 << (needed - 1).bit_length()))
                self._tables = (tables[0].to(x.device), tables[1].to(x.device))
            cos, sin = self._tables
        cos, sin = nn.functional.embedding(position_ids, cos), nn.functional.embedding(position_ids, sin)
        dtype = torch.float32 if self.in_float32 else x.dtype
        return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((sin, sin), dim=-1).to(dtype)


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """(x1, x2) -> (-x2, x1) over the last dimension."""
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int = 1) -> torch.Tensor:
    """x: [batch, heads, seq, head_dim], or with heads in another dimension; cos, sin: [batch, seq, head_dim].

    Computed in the dtype of cos and sin.
    """
    return ((x * cos.unsqueeze(heads)) + (rotate_half(x) * sin.unsqueeze(heads))).to(x.dtype)


def additive(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Boolean [batch, 1, q, k] -> 0 where allowed, the dtype's minimum elsewhere."""
    return torch.where(allowed, torch.zeros((), dtype=dtype, device=allowed.device), torch.finfo(dtype).min)


def packed_sequences(position_ids: torch.Tensor) -> torch.Tensor:
    """Number of the sample that each token is of, [batch, seq]: one begins where positions do not follow each other."""
    return (torch.diff(position_ids, dim=-1, prepend=position_ids[:, :1] - 1) != 1).cumsum(-1)


def prefill_mask(attention_mask, batch, q_len, kv_len, q_offset, kv_offset, window, dtype, device, sequences=None):
    """Explicit causal, padding and window mask over cache indices: [batch, 1, q_len, kv_len].

    Args:
        attention_mask: [batch, >= kv_offset + kv_len] of 0 / 1, or None. Columns past its end count as padding.
        q_offset: index of the first query; kv_offset: index of the first key.
        window: a query at i sees keys i - window + 1 .. i; None for global layers.
        sequences: [batch or 1, q_len] of `packed_sequences`, where several samples lie in a row; no query sees another
            sample's keys. Queries and keys are the same tokens.
    """
    q_idx = torch.arange(q_len, device=device)[:, None] + q_offset
    kv_idx = torch.arange(kv_len, device=device)[None, :] + kv_offset
    allowed = kv_idx <= q_idx
    if window is not None:
        allowed = allowed & (kv_idx > q_idx - window)
    allowed = allowed[None, None].expand(batch, 1, q_len, kv_len)
    if attention_mask is not None:
        padding = attention_mask.to(torch.bool)
        if padding.shape[1] < kv_offset + kv_len:
            padding = nn.functional.pad(padding, (0, kv_offset + kv_len - padding.shape[1]))
        allowed = allowed & padding[:, None, None, kv_offset : kv_offset + kv_len]
    if sequences is not None:
        allowed = allowed & (sequences[:, None, :, None] == sequences[:, None, None, :])
    return additive(allowed, dtype)


def static_prefill_mask(attention_mask: torch.Tensor, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """Mask of the iter0 graph, attention_mask: [batch, P] -> [batch, 1, P, P].

    A padding query sees itself: in float16 a row of nothing but the minimum can overflow to -inf, and its NaN would
    reach the real tokens as 0 * NaN.
    """
    length = attention_mask.shape[1]
    idx = torch.arange(length, device=attention_mask.device)
    allowed = idx[None, :] <= idx[:, None]
    if window is not None:
        allowed = allowed & (idx[None, :] > idx[:, None] - window)
    allowed = allowed[None, None] & attention_mask.to(torch.bool)[:, None, None, :]
    return additive(allowed | (idx[None, :] == idx[:, None])[None, None], dtype)


def static_decode_mask(
    attention_mask: torch.Tensor, position_ids: torch.Tensor, window: int | None, dtype: torch.dtype
) -> torch.Tensor:
    """Mask of the iter1 graph: [batch, 1, S, C + S] for S new tokens (1 in the static graph).

    Slots are not positions (left padding, empty slots), so the window is measured in real positions: the k-th filled
    slot holds position k.

    Args:
        attention_mask: [batch, C + S], 1 for filled slots and for the last columns, the new tokens.
        position_ids: [batch, S], the new tokens' positions.
    """
    length, keys = position_ids.shape[1], attention_mask.shape[1]
    filled = attention_mask.to(torch.bool)[:, None, :]
    if length == 1 and window is None:
        return additive(filled[:, None], dtype)
    positions = (attention_mask.cumsum(-1) - 1)[:, None, :]
    queries = position_ids[:, :, None]
    allowed = filled if window is None else filled & (positions > queries - window)
    if length != 1:  # among the new tokens; a padding query sees itself, as in static_prefill_mask
        slots = torch.arange(keys, device=filled.device)
        own = slots[None, :] - (keys - length) == slots[:length, None]
        allowed = (allowed & (positions <= queries)) | own
    return additive(allowed[:, None], dtype)


def repeat_kv(x: torch.Tensor, groups: int) -> torch.Tensor:
    """[batch, kv_heads, seq, head_dim] -> [batch, kv_heads * groups, seq, head_dim]."""
    if groups == 1:
        return x
    batch, heads, seq, dim = x.shape
    return x[:, :, None].expand(batch, heads, groups, seq, dim).reshape(batch, heads * groups, seq, dim)


def masked_softmax(weights: torch.Tensor, mask: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Soft cap (Gemma 2), then the additive mask, then a float32 softmax in the dtype of `weights`."""
    if softcap is not None:
        weights = torch.tanh(weights / softcap) * softcap
    weights = weights + mask
    return nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(weights.dtype)


def score_inputs(q: torch.Tensor, k: torch.Tensor, in_float32: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys as they are multiplied: float32 where the product does not fit float16."""
    return (q.float(), k.float()) if in_float32 else (q, k)


def eager_attention(q, k, v, mask, scaling, softcap=None, dropout=0.0, in_float32=False):
    """Stock eager attention.

    Args:
        q: [batch, heads, q_len, head_dim]; k, v: [batch, kv_heads, kv_len, head_dim]; mask: [batch, 1, q_len, kv_len].
        in_float32: scores in float32, whatever the inputs are; the mask is float32 as well.

    Returns:
        [batch, q_len, heads, head_dim] and the probabilities.
    """
    groups = q.shape[1] // k.shape[1]
    q, k = score_inputs(q, k, in_float32)
    weights = torch.matmul(q, repeat_kv(k, groups).transpose(2, 3)) * scaling
    probs = masked_softmax(weights, mask, softcap).to(v.dtype)
    if dropout:
        probs = nn.functional.dropout(probs, p=dropout)
    return torch.matmul(probs, repeat_kv(v, groups)).transpose(1, 2).contiguous(), probs


def decode_attention(q, k, v, past_k, past_v, mask, scaling, softcap=None, in_float32=False):
    """Attention of new tokens over a cache that is read where it lies.

    Differs from `eager_attention` in the order of additions only (the new tokens' contribution is added last): the
    stock form concatenates past and new keys, which copies the whole cache for every token. Keys stand on the left of
    the first product for the same reason: transposing them would copy them, transposing the scores is cheap.

    Args:
        q: [batch, heads, S, head_dim]; k, v: [batch, kv_heads, S, head_dim]; past_k, past_v: [batch, kv_heads, C,
            head_dim]; mask: [batch, 1, S, C + S]. S is 1 in the static graph.
        in_float32: scores in float32, see `eager_attention`.

    Returns:
        [batch, S, heads, head_dim] and the probabilities [batch, heads, S, C + S].
    """
    batch, heads, length, dim = q.shape
    kv_heads, context = past_k.shape[1], past_k.shape[2]
    q, k = score_inputs(q, k, in_float32)
    past_k = past_k.to(k.dtype)
    grouped = q.reshape(batch, kv_heads, heads // kv_heads * length, dim)
    past = torch.matmul(past_k, grouped.transpose(2, 3)).transpose(2, 3)
    new = torch.matmul(grouped, k.transpose(2, 3))
    scores = torch.cat((past, new), dim=-1) * scaling
    if length == 1:
        probs = masked_softmax(scores, mask, softcap).to(v.dtype)
        out = torch.matmul(probs[..., :context], past_v) + probs[..., context:] * v
        return out.reshape(batch, 1, heads, dim), probs.reshape(batch, heads, 1, context + 1)
    probs = masked_softmax(scores.reshape(batch, heads, length, context + length), mask, softcap).to(v.dtype)
    grouped_probs = probs.reshape(batch, kv_heads, heads // kv_heads * length, context + length)
    out = torch.matmul(grouped_probs[..., :context], past_v) + torch.matmul(grouped_probs[..., context:], v)
    return out.reshape(batch, heads, length, dim).transpose(1, 2), probs


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)); the tanh form of GELU unless a Gemma 2 or 3 config says `gelu`, the exact one."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: str):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.act_fn = ACT2FN[activation]
        self.in_float32 = False  # gate, up and their product in float32, where GELU's input does not fit float16

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, seq, hidden]."""
        inner = x.float() if self.in_float32 else x
        return self.down_proj((self.act_fn(self.gate_proj(inner)) * self.up_proj(inner)).to(x.dtype))


class Attention(nn.Module):
    """Grouped-query attention with legacy rotary; Gemma 3 adds RMSNorm on q and k (`qk_norm`).

    Args:
        sizes: KV heads and head_dim, where layers differ in them.
    """

    def __init__(
        self, config, layer_idx: int, scaling: float, qk_norm: bool = False, softcap: float | None = None, sizes=None
    ):
        super().__init__()
        kv_heads, dim = sizes or (config.num_key_value_heads, config.head_dim)
        heads = config.num_attention_heads
        self.config, self.layer_idx, self.head_dim, self.scaling = config, layer_idx, dim, scaling
        self.softcap, self.wide_scores = softcap, False
        self.q_proj = nn.Linear(config.hidden_size, heads * dim, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * dim, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * dim, bias=config.attention_bias)
        self.o_proj = nn.Linear(heads * dim, config.hidden_size, bias=config.attention_bias)
        if qk_norm:
            self.q_norm = RMSNorm(dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(dim, config.rms_norm_eps)

    def heads_of(self, hidden_states, position_embeddings):
        """Queries, keys and values [batch, heads, seq, head_dim] of hidden states [batch, seq, hidden]."""
        batch, seq = hidden_states.shape[:2]
        made = (linear(hidden_states) for linear in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (heads.view(batch, seq, -1, self.head_dim).transpose(1, 2) for heads in made)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        return apply_rotary(q, *position_embeddings), apply_rotary(k, *position_embeddings), v

    def forward(self, hidden_states, position_embeddings, attention_mask, past_key_values=None):
        """Attend, and return what this layer adds to the cache.

        Args:
            hidden_states: [batch, seq, hidden]; position_embeddings: cos, sin [batch, seq, head_dim]; attention_mask:
                additive [batch, 1, seq, kv_len]; past_key_values: a `Cache`, a (key, value) pair, or None.

        Returns:
            output [batch, seq, hidden], probabilities, and the present (key, value): the new entries alone with
            `config.iter_num` 1, what was attended to otherwise; a `Cache` is updated in place.
        """
        batch, seq = hidden_states.shape[:2]
        q, k, v = self.heads_of(hidden_states, position_embeddings)
        present = (k, v)
        if self.config.iter_num == 1:
            out, probs = decode_attention(
                q, k, v, *past_key_values, attention_mask, self.scaling, self.softcap, self.wide_scores
            )
        else:
            if isinstance(past_key_values, Cache):
                k, v = past_key_values.update(k, v, self.layer_idx)
            elif past_key_values is not None:
                k = torch.cat((past_key_values[0], k), dim=2)
                v = torch.cat((past_key_values[1], v), dim=2)
            present = (k, v)
            dropout = self.config.attention_dropout if self.training else 0.0
            out, probs = eager_attention(q, k, v, attention_mask, self.scaling, self.softcap, dropout, self.wide_scores)
        return self.o_proj(out.reshape(batch, seq, -1)), probs, present


class FourNormLayer(GradientCheckpointingLayer):
    """Decoder layer of Gemma 2, 3 and 4: attention and MLP with a norm before each and one before its residual add.

    Modules stand in the stock class's order: a seed then gives adapters the same first values on either class.
    """

    norm_class = RMSNorm

    def __init__(self, config, attention: Attention, intermediate_size: int | None = None):
        super().__init__()
        hidden, norm, self.self_attn = config.hidden_size, self.norm_class, attention
        self.mlp = MLP(hidden, intermediate_size or config.intermediate_size, config.hidden_activation)
        self.input_layernorm = norm(hidden, config.rms_norm_eps)
        self.post_attention_layernorm = norm(hidden, config.rms_norm_eps)
        self.pre_feedforward_layernorm = norm(hidden, config.rms_norm_eps)
        self.post_feedforward_layernorm = norm(hidden, config.rms_norm_eps)

    def forward(self, hidden_states, position_embeddings, attention_mask, past_key_values=None, **more):
        """hidden_states: [batch, seq, hidden] -> the same, probabilities, present (see `Attention`)."""
        attn, probs, present = self.self_attn(
            self.input_layernorm(hidden_states), position_embeddings, attention_mask, past_key_values, **more
        )
        hidden_states = hidden_states + self.post_attention_layernorm(attn)
        hidden_states = hidden_states + self.post_feedforward_layernorm(self.feed_forward(hidden_states))
        return hidden_states, probs, present

    def feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        """What is added to x [batch, seq, hidden], before its norm."""
        return self.mlp(self.pre_feedforward_layernorm(x))
