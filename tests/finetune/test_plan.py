"""The memory of a training: told before the model is loaded, with a smaller setting that fits."""

from dataclasses import replace

import pytest

pytest.importorskip("trl")

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.errors import PreflightError
from gemma_deploy.finetune.plan import Shape, check_memory, estimate, smaller
from gemma_deploy.finetune.run import finetune
from gemma_deploy.finetune.settings import FinetuneSettings
from gemma_deploy.machine import Machine
from tests.finetune.make import settings, texts_file, tiny

LORA, FULL = FinetuneSettings(), FinetuneSettings(method="full")
SHAPE = Shape("lora", 8, 1024, True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return Checkpoint.open(tiny(tmp_path_factory.mktemp("base") / "gemma3", "gemma3_text"))


def machine(ram):
    return Machine(ram_bytes=ram, ram_source="a test", disk_free_bytes=1 << 40, cpus=2)


def test_weights_gradients_and_states_follow_from_shapes(checkpoint):
    weights = sum(info.nbytes // 2 for info in checkpoint.tensors.values())
    full = estimate(FULL, checkpoint, replace(SHAPE, method="full"))
    assert (full.weights, full.gradients, full.optimizer) == (4 * weights, 4 * weights, 8 * weights)
    # r (in + out) of the seven linears of seven layers: hidden 64, inner 160, 4 heads and 2 KV heads of 32.
    adapter = 16 * 7 * (2 * (64 + 128) + 2 * (64 + 64) + 3 * (64 + 160))
    lora = estimate(LORA, checkpoint, SHAPE)
    assert (lora.gradients, lora.optimizer) == (4 * adapter, 8 * adapter)
    assert lora.weights == 4 * (weights + adapter)


def test_each_smaller_setting_takes_less(checkpoint):
    shape = Shape("full", 8, 1024, False)
    totals = [estimate(FULL, checkpoint, shape).total]
    for _, other in smaller(shape):
        totals.append(estimate(FULL, checkpoint, other).total)
    assert totals == sorted(totals, reverse=True)
    assert len(set(totals)) > 6


def test_no_room_says_how_much_and_what_fits(checkpoint):
    fits = estimate(LORA, checkpoint, replace(SHAPE, batch=2)).total
    with pytest.raises(PreflightError) as raised:
        check_memory(LORA, checkpoint, SHAPE, machine=machine(fits))
    said = str(raised.value)
    assert "is available (a test)" in said
    assert "activations" in said
    assert "--set per_device_train_batch_size=2 --set gradient_accumulation_steps=4 takes about" in said
    assert check_memory(LORA, checkpoint, SHAPE, machine=machine(1 << 40)).total > fits
    with pytest.raises(PreflightError, match="use a machine with more memory"):
        check_memory(LORA, checkpoint, SHAPE, machine=machine(1 << 20))


def test_it_is_told_before_anything_is_written(checkpoint, tmp_path):
    asked = settings(texts_file(tmp_path), tmp_path / "out")
    with pytest.raises(PreflightError):
        finetune(asked, checkpoint.path, machine=machine(1 << 20))
    assert sorted(one.name for one in tmp_path.iterdir()) == ["texts.jsonl"]
