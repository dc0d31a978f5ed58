"""A dynamic artifact in the runner: any batch, padded to the longest prompt only, a cache that grows on the way."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from gemma_deploy.backends.tvm_vacc.runner import GROWTH, StaticRunner
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.errors import ArtifactError, UsageError
from tests.exporting import DYNAMIC_SIZES, contract_of
from tests.manifests import manifest

(P, C), VOCAB = DYNAMIC_SIZES, 512


@pytest.fixture(scope="module", params=["gemma3_text", pytest.param("gemma", marks=pytest.mark.slow)])
def made(artifacts, request):
    """Directory, manifest and the stock model of the same checkpoint."""
    path = artifacts(request.param, "fp32", dynamic=True)
    checkpoint = path.parent / "checkpoint"
    contract = contract_of(Checkpoint.open(checkpoint).config, "fp32", dynamic=True)
    stock = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager", dtype=torch.float32).eval()
    return path, manifest(contract=contract.to_json()), stock


@pytest.fixture
def runner(made):
    path, found, _ = made
    return StaticRunner(path, "strict", 1, manifest=found)


def expected(stock, sequences, lengths):
    with torch.no_grad():
        rows = [stock(torch.tensor([s])).logits[0, n - 1 :] for s, n in zip(sequences, lengths, strict=True)]
    return torch.stack(rows).numpy()


@pytest.mark.parametrize("lengths", [(250,), (20, 250, 3), (3, 9)])
def test_logits_equal_the_stock_model_while_the_cache_grows(made, runner, lengths):
    rng, steps = np.random.default_rng(5), 20
    sequences = [rng.integers(3, VOCAB, n + steps).tolist() for n in lengths]
    slots = []
    logits = [runner.prefill([s[:n] for s, n in zip(sequences, lengths, strict=True)])]
    for step in range(steps):
        logits.append(runner.step([s[n + step] for s, n in zip(sequences, lengths, strict=True)]))
        slots.append(runner._caches[0].shape)
    want = expected(made[2], sequences, lengths)
    assert np.abs(np.stack(logits, 1) - want).max() <= 1e-5 * np.abs(want).max()  # 2e-6 was measured
    longest, heads = max(lengths), made[2].config.num_key_value_heads
    sizes = [GROWTH if longest + step < GROWTH else C for step in range(steps)]
    assert slots == [(len(lengths), heads, size, 32) for size in sizes]


def test_batches_may_follow_one_another(made, runner):
    sequences = np.random.default_rng(6).integers(3, VOCAB, (3, 30)).tolist()
    together = runner.prefill(sequences)
    runner.step([5, 6, 7])
    alone = runner.prefill([sequences[1]])
    np.testing.assert_allclose(alone[0], together[1], atol=1e-5 * np.abs(together).max())
    assert runner.batch == 1
    want = expected(made[2], [[*sequences[1], 9]], [30])
    assert np.abs(runner.step([9])[0] - want[0, 1]).max() <= 1e-5 * np.abs(want).max()


def test_the_context_ends_where_the_rotary_tables_end(runner):
    runner.prefill([[5] * P])
    for _ in range(C - P):
        runner.step([5])
    with pytest.raises(UsageError, match=f"all {C} cache slots are used"):
        runner.step([5])


def test_limits_are_told(runner):
    with pytest.raises(UsageError, match=f"1 to {P} tokens"):
        runner.prefill([[5] * (P + 1)])
    with pytest.raises(UsageError, match="no prompts"):
        runner.prefill([])


def test_sizes_are_in_the_manifest_alone(made):
    with pytest.raises(ArtifactError, match="sizes of dynamic ones"):
        StaticRunner(made[0])
