"""The loss of a causal LM without the logits of a whole batch: some rows of [tokens, vocabulary] at a time.

With a vocabulary of 262,144 the logits of 1,024 tokens take 1 GiB, and as much again for each step of the softmax and
its gradient. Here a block of rows is multiplied, turned into its own gradient in place and multiplied back, so that
every product with the table is computed once forward and once backward, and nothing but the gradient of the hidden
states is kept. Positions whose label is -100 are left out.

The same sums as torch's cross entropy in float32, in another order.
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import ModelOutput

from gemma_deploy.finetune.encoding import IGNORED
from gemma_deploy.finetune.settings import LOGITS_BYTES
from gemma_deploy.finetune.table import converted

FLAG = "summed_loss"  # the keyword argument that asks a model for this loss


@dataclass
class SummedLoss(ModelOutput):
    """What a model returns.

    Args:
        loss: sum of the negative log likelihoods in nats, a scalar.
        tokens: how many there are; correct: of them those whose label is the likeliest token. Scalars, no gradient.
    """

    loss: torch.Tensor | None = None
    tokens: torch.Tensor | None = None
    correct: torch.Tensor | None = None


class SummedCrossEntropy(torch.autograd.Function):
    """sum over n of -log softmax(cap(hidden @ weight.T))[n, targets[n]], and how often the target is the likeliest.

    cap(x) is softcap * tanh(x / softcap), or x where softcap is None. Gradients are computed in the forward pass, as
    they are those of the sum up to one factor.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, softcap: float | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum and count.

        Args:
            ctx: of autograd.
            hidden: [tokens, hidden_size]; weight: [vocabulary, hidden_size], of any float dtype.
            targets: [tokens], int64.
            softcap: of the logits, or None.
        """
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        for_hidden, for_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        rows = max(1, LOGITS_BYTES // (4 * len(weight)))
        grad_hidden = torch.empty_like(hidden) if for_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if for_weight else None
        losses = hidden.new_zeros(len(hidden), dtype=torch.float32)
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        table = weight.to(dtype) if weight.dtype.itemsize >= dtype.itemsize else weight
        buffer = torch.empty(min(rows, len(hidden)), len(weight), dtype=torch.float32, device=hidden.device)
        with torch.autocast(device, enabled=False):
            for start in range(0, len(hidden), rows):
                part = slice(start, start + rows)
                some, wanted = hidden[part].to(dtype), targets[part]
                logits = buffer[: len(some)]
                for columns, block in converted(table, dtype):
                    _product(some, block.T, logits[:, columns])
                losses[part], likeliest, slope = _softmax(logits, wanted, softcap, gradient=for_hidden or for_weight)
                correct += (likeliest == wanted).sum()
                if slope is None:
                    continue
                slope = slope.to(dtype)
                if grad_hidden is not None:
                    grad_hidden[part] = sum(slope[:, columns] @ block for columns, block in converted(table, dtype))
                if grad_weight is not None:
                    grad_weight += slope.T @ some
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(correct)
        return losses.sum(), correct

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        """Scale what the forward pass computed."""
        hidden, weight = ctx.saved_tensors
        return (
            (None if hidden is None else hidden * grad.to(hidden.dtype)),
            (None if weight is None else weight * grad.to(weight.dtype)),
            None,
            None,
        )


def _product(one: torch.Tensor, other: torch.Tensor, out: torch.Tensor) -> None:
    """Write a product of matrices to a part of a float32 matrix, without a copy where the factors are float32."""
    if one.dtype == out.dtype:
        torch.mm(one, other, out=out)
    else:
        out.copy_(one @ other)


def _softmax(
    logits: torch.Tensor, targets: torch.Tensor, softcap: float | None, *, gradient: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(losses [rows], likeliest tokens [rows], d loss / d logits before the cap [rows, vocabulary]); in place.

    Args:
        logits: [rows, vocabulary] float32, overwritten; targets: [rows].
    """
    steepness = None
    if softcap is not None:
        logits.div_(softcap).tanh_()
        if gradient:
            steepness = 1 - logits.square()
        logits.mul_(softcap)
    most, likeliest = logits.max(-1, keepdim=True)
    at = targets.unsqueeze(-1)
    said = logits.gather(-1, at)
    exp = logits.sub_(most).exp_()
    total = exp.sum(-1, keepdim=True)
    losses = (total.log() + most - said).squeeze(-1)
    if not gradient:
        return losses, likeliest.squeeze(-1), None
    slope = exp.div_(total)
    slope.scatter_add_(-1, at, torch.full_like(said, -1.0))
    if steepness is not None:
        slope.mul_(steepness)
    return losses, likeliest.squeeze(-1), slope


def add_summed_loss(model: Any) -> None:
    """Let `model(input_ids=..., labels=..., summed_loss=True)` return a `SummedLoss`; every other call is as before.

    Args:
        model: a causal LM of transformers, or of source_code/.
    """
    before = model.forward
    softcap = getattr(model.config, "final_logit_softcapping", None)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.pop(FLAG, False):
            return before(*args, **kwargs)
        labels = kwargs.pop("labels")
        hidden = self.base_model(*args, **{**kwargs, "use_cache": False}).last_hidden_state[:, :-1]
        labels = labels[:, 1:].to(hidden.device)
        counted = labels != IGNORED
        loss, correct = SummedCrossEntropy.apply(
            hidden[counted], self.get_output_embeddings().weight, labels[counted], softcap
        )
        return SummedLoss(loss=loss, tokens=counted.sum(), correct=correct)

    model.forward = types.MethodType(forward, model)
