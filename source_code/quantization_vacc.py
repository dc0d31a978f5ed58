"""Int8 weights for the patched models, with scales per channel (absmax / 127, rounded half to even) or group.

Stand-alone: needs torch alone. While a graph is exported the linear emits one `Vastai::QuantizedLinearPerChannel` node
(or `...PerGroup`, whose codes may be int4);
the node's ONNX function body (DequantizeLinear -> Transpose -> MatMul) is attached afterwards by the exporter.
"""

import torch
from torch import nn

DEQUANTIZED_ELEMENTS = 4 << 20  # of a weight at a time, so that int8 takes less memory in torch as well
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, columns] of any float dtype -> int8 [rows, columns], float32 scale [rows] (1 for rows of zeros)."""
    weight = weight.detach().float()
    scale = weight.abs().amax(dim=1) / 127.0
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (weight / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


class QuantizedLinearPerChannel(nn.Module):
    """y = x @ (weight * scale[:, None]).T with an int8 weight [out, in] and a float32 scale [out]."""

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> "QuantizedLinearPerChannel":
        """Quantize a linear's weight; a bias stays as it is."""
        return cls(*quantize_rows(linear.weight), None if linear.bias is None else linear.bias.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, seq, in] -> [batch, seq, out]."""
        if torch.compiler.is_exporting():
            y = torch.onnx.ops.symbolic(
                "Vastai::QuantizedLinearPerChannel",
                (x, self.weight, self.scale),
                dtype=x.dtype,
                shape=(*x.shape[:-1], self.out_features),
                version=1,
            )
        else:
            rows = max(1, DEQUANTIZED_ELEMENTS // self.in_features)
            parts = zip(self.weight.split(rows), self.scale.split(rows), strict=True)
            y = torch.cat([nn.functional.linear(x, (w * s[:, None]).to(x.dtype)) for w, s in parts], dim=-1)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """Sizes, as nn.Linear prints them."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bits=8"


class QuantizedLinearPerGroup(nn.Module):
    """y = x @ (weight * scale of its group).T with codes [out, in] and a float32 scale [out, in / groupsize]."""

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.groupsize = self.in_features // scale.shape[1]
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, seq, in] -> [batch, seq, out]."""
        if torch.compiler.is_exporting():
            return torch.onnx.ops.symbolic(
                "Vastai::QuantizedLinearPerGroup",
                (x, self.weight, self.scale),
                {"block_size": self.groupsize},
                dtype=x.dtype,
                shape=(*x.shape[:-1], self.out_features),
                version=1,
            )
        rows = max(1, DEQUANTIZED_ELEMENTS // self.in_features)
        parts = zip(self.weight.split(rows), self.scale.split(rows), strict=True)
        return torch.cat([nn.functional.linear(x, dequantize(w, s).to(x.dtype)) for w, s in parts], dim=-1)

    def extra_repr(self) -> str:
        """Sizes, as nn.Linear prints them."""
        return f"in_features={self.in_features}, out_features={self.out_features}, groupsize={self.groupsize}"


def dequantize(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Codes [..., columns] times scales [..., groups], each of a run of columns -> float32 [..., columns]."""
    return (codes.float().unflatten(-1, (scale.shape[-1], -1)) * scale[..., None]).flatten(-2)


def quantized_linear(weight: torch.Tensor, scale: torch.Tensor) -> nn.Module:
    """The linear of codes [out, in] whose scale is [out], or [out, groups]."""
    return (QuantizedLinearPerChannel if scale.dim() == 1 else QuantizedLinearPerGroup)(weight, scale)


class QuantizedEmbedding(nn.Module):
    """Rows of an int8 table times their own scale times sqrt(hidden_size); the LM head reads the same table.

    Args:
        weight: int8 [vocab, hidden]; scale: float32 [vocab], or [vocab, groups]; dtype: of the output.
        embed_scale: the rounded root, or float32 [hidden]: the root divided by what the columns were multiplied by.
    """

    def __init__(
        self, weight: torch.Tensor, scale: torch.Tensor, embed_scale: float | torch.Tensor, dtype: torch.dtype
    ):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.dtype = dtype
        if isinstance(embed_scale, torch.Tensor):
            self.register_buffer("column_scale", embed_scale)
        else:
            self.column_scale = embed_scale

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """input_ids: [batch, seq] -> [batch, seq, hidden]."""
        rows = nn.functional.embedding(input_ids, self.weight).to(torch.float32)
        if self.scale.dim() == 1:
            rows = rows * nn.functional.embedding(input_ids, self.scale[:, None])
        else:
            rows = dequantize(rows, nn.functional.embedding(input_ids, self.scale))
        return rows.to(self.dtype) * self.column_scale


class StoredLinear(nn.Module):
    """A linear whose weight is stored narrower (bfloat16) than the activations it is applied to."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, seq, in] -> [batch, seq, out], in x's dtype."""
        return nn.functional.linear(x, self.weight.to(x.dtype))


class StoredEmbedding(nn.Module):
    """A table stored narrower (bfloat16) than the hidden states it gives."""

    def __init__(self, weight: torch.Tensor, embed_scale: float, dtype: torch.dtype):
        super().__init__()
        self.register_buffer("weight", weight)
        self.embed_scale, self.dtype = embed_scale, dtype

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """input_ids: [batch, seq] -> [batch, seq, hidden]."""
        return nn.functional.embedding(input_ids, self.weight).to(self.dtype) * self.embed_scale


def quantize_model(model: nn.Module, bits: int, embeddings: bool = False) -> nn.Module:
    """Swap the seven linears of every decoder layer and all experts, and on request the tied table with the LM head.

    Raises:
        ValueError: bits is not 8, or the model has no such linears left (quantized twice).
    """
    if bits != 8:
        raise ValueError(f"quantize({bits}): this model has per-channel int8 weights only; call quantize(8)")
    targets = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if name in LINEARS and isinstance(child, nn.Linear)
    ]
    if not targets:
        raise ValueError("quantize(8): no linear layer left to quantize; was it called twice?")
    for experts in (module for module in model.modules() if hasattr(module, "quantize_experts")):
        experts.quantize_experts()
    for parent, name in targets:
        setattr(parent, name, QuantizedLinearPerChannel.from_linear(getattr(parent, name)))
    if embeddings:
        embed = model.model.embed_tokens
        dtype = embed.weight.dtype
        table = QuantizedEmbedding(*quantize_rows(embed.weight), embed.scale_value(dtype), dtype)
        if model.config.tie_word_embeddings:
            head = QuantizedLinearPerChannel(table.weight, table.scale)
        else:
            head = QuantizedLinearPerChannel.from_linear(model.lm_head)
        model.model.embed_tokens, model.lm_head = table, head
    return model
