"""The estimate before a pass: what it counts, and that it refuses with every shortfall."""

from dataclasses import replace

import pytest

from gemma_deploy.calibration import pipeline, requirements
from gemma_deploy.calibration.pipeline import Request, calibrate
from gemma_deploy.errors import PreflightError
from gemma_deploy.machine import Machine

MACHINE = Machine(ram_bytes=16 << 30, ram_source="free memory", disk_free_bytes=100 << 30, cpus=2)
GEMMA_2B = {
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 256,
}


@pytest.fixture
def config(checkpoint):
    return replace(checkpoint.config, **GEMMA_2B)


def test_the_estimate_covers_what_was_measured(config):
    assert 1102 << 20 <= requirements.memory_bytes(config, 2, 128) <= 1.3 * (1102 << 20)  # gemma-2b, 2 windows of 128


def test_the_estimate_does_not_depend_on_depth_but_on_the_window(config):
    deep = replace(config, num_hidden_layers=99, layer_types=(config.layer_types * 99)[:99])
    assert requirements.memory_bytes(deep, 2, 128) == requirements.memory_bytes(config, 2, 128)
    assert requirements.memory_bytes(config, 2, 8192) - requirements.memory_bytes(config, 2, 128) > 3 * 8 * 8192**2 * 4


def test_it_names_every_shortfall(config, tmp_path):
    requirements.check_room(config, 128, 1024, workspace=tmp_path, machine=MACHINE)
    small = replace(MACHINE, ram_bytes=1 << 30, disk_free_bytes=1 << 20)
    with pytest.raises(PreflightError, match="128 windows of 1024 tokens do not fit") as caught:
        requirements.check_room(config, 128, 1024, workspace=tmp_path, machine=small)
    memory, disk = caught.value.problems
    assert memory.startswith("memory: 2.")  # two cores, so two windows at a time
    assert memory.endswith("1.00 GiB left (free memory)")
    assert disk == "disk: 1.07 GB needed for hidden states, 1.0 MB free"


def test_hidden_states_that_stay_in_memory_need_no_disk(config, tmp_path):
    requirements.check_room(config, 8, 128, workspace=tmp_path, machine=replace(MACHINE, disk_free_bytes=0))


def test_a_calibration_is_refused_before_the_text_is_read(checkpoint, c4_file, tmp_path, monkeypatch):
    monkeypatch.setattr(requirements.Machine, "measure", lambda out: replace(MACHINE, ram_bytes=1))
    monkeypatch.setattr(pipeline, "make_windows", lambda *args: pytest.fail("read the text"))
    with pytest.raises(PreflightError):
        calibrate(checkpoint, Request("c4", c4_file, 2, 16), tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_every_worker_has_a_shard_and_a_process_its_own_layer_too(config):
    layer = 4 * (3 * 2048 * 16384 + 2 * 2048 * 256 * (8 + 1))
    shard = 4 * 2048 * 16384  # SHARD_TOKENS rows of down_proj's input
    one, two = (requirements.workers_bytes(config, 1024, threads=threads) for threads in (1, 2))
    assert one == (shard, 0)
    assert two[0] - one[0] > shard
    processes = [requirements.workers_bytes(config, 1024, processes=count) for count in (2, 3)]
    memory, disk = (after - before for before, after in zip(*processes, strict=True))
    assert memory > layer + shard + requirements.PROCESS_BYTES
    assert disk == 2 * 16384 * (16384 + 512)  # the upper triangle of x^T x, in blocks of 512 rows
    assert processes[0][1] == layer + 3 * disk
    ranges = requirements.workers_bytes(config, 1024, processes=2, moments=False)
    assert ranges == (processes[0][0] - 2 * shard, layer)  # no moments
    assert (
        requirements.memory_bytes(config, 2, 128, processes=2) > requirements.memory_bytes(config, 2, 128) + 2 * layer
    )
