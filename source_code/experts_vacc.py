"""Experts of Gemma 4 26B-A4B: a router, and small gated MLPs of which every token runs through a few.

Stand-alone: needs torch and transformers alone. As in layers_vacc.py, operations and their order are the stock ones
with `experts_implementation="eager"`. While a graph is exported the experts emit one `Vastai::MixtureOfExperts` node
(or `Vastai::QuantizedMixtureOfExperts`, of codes); its ONNX function body is attached afterwards by the exporter.
"""

import torch
from torch import nn
from transformers.activations import ACT2FN

from .gain_vacc import GainNorm
from .quantization_vacc import dequantize, quantize_rows


class Router(nn.Module):
    """Which experts a token runs through, and how much each of them counts."""

    def __init__(self, config):
        super().__init__()
        self.chosen, self.root = config.top_k_experts, config.hidden_size**-0.5
        self.norm = GainNorm(config.hidden_size, config.rms_norm_eps, gain=False)
        self.proj = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.scale = nn.Parameter(torch.ones(config.hidden_size))
        self.per_expert_scale = nn.Parameter(torch.ones(config.num_experts))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x: [..., hidden], the residual stream itself -> weights float32 and experts int64, [..., chosen] both.

        Computed in the dtype of the router's own weights, which may be wider than x.
        """
        scores = self.proj(self.norm(x.to(self.scale.dtype)) * self.scale * self.root)
        probabilities = nn.functional.softmax(scores, dim=-1, dtype=torch.float32)
        weights, experts = torch.topk(probabilities, k=self.chosen, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights * self.per_expert_scale[experts], experts


class Stack(nn.Module):
    """A matrix [out, in] of each expert, stored as codes, or narrower than activations.

    Args:
        weight: [experts, out, in]; scale: float32 [experts, out], or [experts, out, groups], of codes; None of floats.
    """

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor | None = None):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def __getitem__(self, expert) -> torch.Tensor:
        """The matrix of one expert; codes as float32."""
        weight = self.weight[expert]
        if self.scale is None:
            return weight
        return dequantize(weight, self.scale[expert].reshape(weight.shape[0], -1))

    @classmethod
    def quantized(cls, weights: torch.Tensor) -> "Stack":
        """Int8 per row of every expert of [experts, out, in]."""
        made = [quantize_rows(weight) for weight in weights.detach()]
        return cls(*(torch.stack(parts) for parts in zip(*made, strict=True)))


class Experts(nn.Module):
    """down(act(gate(x)) * up(x)) of the experts that a token was given, in the order of their numbers, added up."""

    def __init__(self, config):
        super().__init__()
        count, hidden, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(count, hidden, width))
        self.act_fn = ACT2FN[config.hidden_activation]
        self.approximate = "none" if config.hidden_activation == "gelu" else "tanh"  # as ONNX says it

    def forward(self, x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """x: [..., hidden]; weights, experts: [..., chosen], see `Router` -> [..., hidden]."""
        if torch.compiler.is_exporting():
            return self._node(x, weights, experts)
        flat, weights, experts = x.reshape(-1, x.shape[-1]), weights.flatten(0, -2), experts.flatten(0, -2)
        added = torch.zeros_like(flat)
        for expert in experts.unique().tolist():
            place, token = torch.where(expert == experts.T)
            gate, up = nn.functional.linear(flat[token], self.gate_up_proj[expert].to(x.dtype)).chunk(2, dim=-1)
            made = nn.functional.linear(self.act_fn(gate) * up, self.down_proj[expert].to(x.dtype))
            made = made * weights[token, place, None]
            added.index_add_(0, token, made.to(added.dtype))
        return added.reshape(x.shape)

    def quantize_experts(self) -> None:
        """Swap both tensors for int8 ones, with a scale for every row of every expert."""
        for name in ("gate_up_proj", "down_proj"):
            stack = Stack.quantized(getattr(self, name))
            delattr(self, name)
            setattr(self, name, stack)

    def _node(self, x, weights, experts):
        """The operator of the exported graph."""
        gate_up, down = (_operands(one, x.dtype) for one in (self.gate_up_proj, self.down_proj))
        name, how = "Vastai::MixtureOfExperts", {"approximate": self.approximate}
        if len(gate_up) == 2:
            name = "Vastai::QuantizedMixtureOfExperts"
            how["gate_up_block_size"] = x.shape[-1] // gate_up[1].shape[-1]
            how["down_block_size"] = down[0].shape[-1] // down[1].shape[-1]
        return torch.onnx.ops.symbolic(
            name, (x, weights, experts, *gate_up, *down), how, dtype=x.dtype, shape=x.shape, version=1
        )


def _operands(stack, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """What the operator reads of a stack: floats of the dtype of activations, or codes and scales in groups."""
    if not isinstance(stack, Stack):
        return (stack,)
    if stack.scale is None:
        return (stack.weight.to(dtype),)
    return stack.weight, stack.scale if stack.scale.dim() == 3 else stack.scale[..., None]
