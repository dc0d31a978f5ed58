"""LoRA on the weights of an artifact: its int8 or int4 codes stay as they are, and what is trained is what is deployed.

Linears of the layers keep codes and scales in memory and are dequantized when they are used; the token table is
dequantized once. Norms and biases are the checkpoint's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.artifact.origin import checkpoint_of
from gemma_deploy.artifact.weights import ArtifactWeights
from gemma_deploy.checkpoint import Checkpoint, WeightSource
from gemma_deploy.errors import UsageError
from gemma_deploy.names import COLUMN_FACTOR
from gemma_deploy.patched import patched_module
from gemma_deploy.quantization.scales import choose_scales

if TYPE_CHECKING:
    from gemma_deploy.schemes import Codes


class DequantizedLinear(nn.Linear):
    """y = x @ (codes * scale of their group).T; `weight` holds the codes.

    Args:
        codes: int8 [out, in]; scale: float32 [out, groups].
    """

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor) -> None:
        super().__init__(codes.shape[1], codes.shape[0], bias=False, device="meta")
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in] -> [..., out]."""
        return _Product.apply(x, self.weight, self.scale)


class _Product(torch.autograd.Function):
    """Keeps codes for the backward pass, not what they are dequantized to."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        ctx.save_for_backward(codes, scale)
        return nn.functional.linear(x, dequantized(codes, scale).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """[..., out] -> [..., in]."""
        codes, scale = ctx.saved_tensors
        return grad @ dequantized(codes, scale).to(grad.dtype), None, None


def dequantized(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Codes [out, in] times scales [out, groups]: float32 [out, in]."""
    found: torch.Tensor = patched_module("quantization_vacc").dequantize(codes, scale)
    return found


def open_base(artifact: str | Path, checkpoint: Checkpoint, rank: int) -> ArtifactWeights:
    """The weights of an artifact that an adapter of the checkpoint is trained on, and then runs beside.

    Args:
        rank: of the adapter.

    Raises:
        ArtifactError: it is damaged.
        UsageError: it is another checkpoint's, its weights are no codes, it takes no adapter of that rank, or factors
            were moved from activations into its weights, so that its linears read other numbers than the checkpoint's.
    """
    opened = Artifact.open(artifact)
    checkpoint_of(opened, str(checkpoint.path))
    manifest = opened.manifest
    weights, slots = ArtifactWeights(checkpoint.config, opened.path, manifest), manifest.contract.adapters
    problems = []
    if manifest.storage is None:
        problems.append(f"its weights are {manifest.scheme}, not int8 or int4 codes")
    if any(row.name.endswith(COLUMN_FACTOR) for row in manifest.params) or weights.embedding_scale() is not None:
        problems.append("factors were moved from activations into its weights: its linears read other numbers")
    if slots is None:
        problems.append("its recipe has no section adapters: what is trained could not run beside it")
    elif slots.rank < rank:
        problems.append(f"it takes adapters of rank {slots.rank} at most, and finetune.lora.r is {rank}")
    if problems:
        raise UsageError(
            "no adapter can be trained on the weights of this artifact",
            where=f"{artifact} (finetune.base, --base)",
            problems=problems,
            expected=f"an int8 artifact of the checkpoint that takes adapters of rank {rank}",
            next_step="compile one: gemma-deploy compile cpu-int8 --checkpoint CHECKPOINT -s adapters.rank="
            f"{rank}; or leave --base out and train on the checkpoint's own weights",
        )
    return weights


def use_codes(model: nn.Module, weights: ArtifactWeights) -> None:
    """Put linears that read an artifact's codes in the place of a model's own."""
    for name in weights.code_names():
        codes, scale = weights.codes(name)
        if ".layers." in name:
            linear = DequantizedLinear(torch.from_numpy(codes), torch.from_numpy(scale))
            model.set_submodule(name.removesuffix(".weight"), linear)


@torch.no_grad()
def merge_and_quantize(model: Any, weights: ArtifactWeights, source: WeightSource) -> None:
    """Add the adapter to the checkpoint's float weights and round the sum to codes of the same form, to nearest.

    What a compile of the merged checkpoint stores, so that the two ways can be compared; the adapter itself is left on.

    Args:
        model: of PEFT, over a model with the linears of `use_codes`; its codes are overwritten.
        weights: of the artifact; source: the checkpoint that it was made from.
    """
    for name, module in model.get_base_model().named_modules():
        linear = getattr(module, "base_layer", None)
        if not isinstance(linear, DequantizedLinear):
            continue
        full = f"{name}.weight"
        merged = torch.from_numpy(source.rows(full, 0, linear.out_features)) + module.get_delta_weight("default")
        form = weights.form_of(name)
        codes, scale = quantized(merged, form)
        linear.weight.data.copy_(codes)
        linear.scale.copy_(scale)


def quantized(weight: torch.Tensor, form: Codes) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to nearest: int8 codes [out, in] and scales [out, groups].

    Args:
        weight: float32 [out, in]; form: bits and groups.
    """
    most = 2 ** (form.bits - 1) - 1
    scale = choose_scales(weight, most, form.groupsize)
    grouped = weight.unflatten(-1, (scale.shape[-1], -1))
    codes = (grouped / scale[..., None]).round().clamp(-most, most)
    return codes.flatten(-2).to(torch.int8), scale
