"""The loss without the logits of a batch: torch's cross entropy and its gradients, in float64."""

import pytest
import torch

from gemma_deploy.finetune import head, table
from gemma_deploy.finetune.head import SummedCrossEntropy


def reference(hidden, weight, targets, softcap):
    logits = hidden.double() @ weight.double().T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum"), logits.argmax(-1)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_loss_and_gradients_are_those_of_cross_entropy(softcap, rows, monkeypatch):
    monkeypatch.setattr(head, "LOGITS_BYTES", rows * 4 * 50)
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(11, 16, generator=draw, requires_grad=True)
    weight = torch.randn(50, 16, generator=draw, requires_grad=True)
    targets = torch.randint(50, (11,), generator=draw)
    targets[3] = (hidden[3] @ weight.T).argmax()
    loss, correct = SummedCrossEntropy.apply(hidden, weight, targets, softcap)
    (2.5 * loss).backward()
    found = [hidden.grad.clone(), weight.grad.clone()]
    hidden.grad = weight.grad = None
    expected, likeliest = reference(hidden, weight, targets, softcap)
    (2.5 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert correct.item() == (likeliest == targets).sum().item() >= 1
    for one, other in zip(found, (hidden.grad, weight.grad), strict=True):
        assert (one - other).abs().max() <= 2e-6 * other.abs().max()  # measured: 4e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_rows", [1, 7, 50])
def test_a_table_of_16_bits_is_the_same_in_float32(dtype, block_rows, monkeypatch):
    """Blocks of the vocabulary are converted and multiplied one after the other; the reference is in float64."""
    monkeypatch.setattr(head, "LOGITS_BYTES", 3 * 4 * 50)
    monkeypatch.setattr(table, "BLOCK_BYTES", block_rows * 4 * 16)
    draw = torch.Generator().manual_seed(3)
    hidden = torch.randn(11, 16, generator=draw, requires_grad=True)
    weight, targets = torch.randn(50, 16, generator=draw).to(dtype), torch.randint(50, (11,), generator=draw)
    loss, correct = SummedCrossEntropy.apply(hidden, weight, targets, 3.0)
    (2.5 * loss).backward()
    found, hidden.grad = hidden.grad.clone(), None
    expected, likeliest = reference(hidden, weight, targets, 3.0)
    (2.5 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert correct.item() == (likeliest == targets).sum().item()
    assert (found - hidden.grad).abs().max() <= 2e-6 * hidden.grad.abs().max()  # measured: 4e-7


def test_no_gradient_is_computed_where_none_is_wanted(monkeypatch):
    hidden, weight = torch.randn(4, 8), torch.randn(20, 8)
    loss, _ = SummedCrossEntropy.apply(hidden, weight, torch.tensor([1, 2, 3, 4]), None)
    expected, _ = reference(hidden, weight, torch.tensor([1, 2, 3, 4]), None)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert not loss.requires_grad


def test_no_token_to_learn_is_a_loss_of_zero_with_gradients():
    hidden = torch.randn(0, 8, requires_grad=True)
    loss, correct = SummedCrossEntropy.apply(hidden, torch.randn(20, 8), torch.zeros(0, dtype=torch.int64), None)
    loss.backward()
    assert (loss.item(), correct.item(), hidden.grad.shape) == (0.0, 0, (0, 8))


def test_under_autocast_products_are_bfloat16_and_sums_float32():
    draw = torch.Generator().manual_seed(1)
    hidden = torch.randn(6, 32, generator=draw, requires_grad=True)
    weight, targets = torch.randn(40, 32, generator=draw), torch.arange(6)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = SummedCrossEntropy.apply(hidden, weight, targets, None)
    loss.backward()
    half = (hidden.detach().bfloat16() @ weight.bfloat16().T).float()
    expected = torch.nn.functional.cross_entropy(half, targets, reduction="sum")
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert hidden.grad.isfinite().all()
