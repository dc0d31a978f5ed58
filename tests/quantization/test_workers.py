"""Calibration shared out over threads, processes and a Ray cluster: the same bytes, and nothing left behind.

A shard is three windows here, and the last one has a single window; windows are five times the sliding window long.
"""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

from gemma_deploy.calibration import shards
from gemma_deploy.calibration.executors import Here, open_executor
from gemma_deploy.calibration.ranges import run_layers
from gemma_deploy.calibration.segments import ENTERED
from gemma_deploy.calibration.shards import LayerPass, LayerSetting, Shard, StackTemplate, shards_of
from gemma_deploy.calibration.states import HiddenStates
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.errors import CalibrationError, UsageError
from gemma_deploy.quantization import moments_pass
from gemma_deploy.quantization.layers import quantize_layers
from gemma_deploy.quantization.moments_pass import observe, scratch_of
from gemma_deploy.quantization.solver import Settings
from gemma_deploy.recipe import Recipe
from gemma_deploy.testing import write_tiny_checkpoint

ROOT = Path(__file__).resolve().parents[2]
NSAMPLES, SEQLEN = 7, 40
IDS = np.random.default_rng(5).integers(3, 500, (NSAMPLES, SEQLEN))
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "checkpoint"
    return Checkpoint.open(write_tiny_checkpoint(path, "gemma3_text", num_hidden_layers=3, layer_types=KINDS))


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "SHARD_TOKENS", 3 * SEQLEN)
    assert shards_of(NSAMPLES, SEQLEN) == [range(0, 3), range(3, 6), range(6, 7)]


def quantized(checkpoint, folder, executor, **options):
    """The bytes of all layer files."""
    quantize_layers(checkpoint, IDS, Settings(activations=True), folder=folder, key="k", executor=executor, **options)
    assert not scratch_of(folder).exists() or not list(scratch_of(folder).glob("moments*"))
    files = {file.name: file.read_bytes() for file in sorted(folder.glob("layer-*.safetensors"))}
    assert len(files) == checkpoint.config.num_hidden_layers
    return files


@pytest.fixture(scope="module")
def alone(checkpoint, tmp_path_factory):
    """One process, one thread."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_TOKENS", 3 * SEQLEN)
        return quantized(checkpoint, tmp_path_factory.mktemp("alone") / "q", Here(1))


def children():
    return {child.pid for child in psutil.Process().children()}


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_give_the_same_bytes(checkpoint, tmp_path, alone, threads):
    before = torch.get_num_threads()
    assert quantized(checkpoint, tmp_path / "q", Here(threads)) == alone
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_processes_give_the_same_bytes_ranges_and_errors(checkpoint, tmp_path, alone, processes, monkeypatch):
    before = children()
    with open_executor(tmp_path / "q" / "shards", processes=processes) as executor:
        ticks = []
        assert quantized(checkpoint, tmp_path / "q", executor, progress=lambda *seen: ticks.append(seen)) == alone
        assert ticks == [(done, 3 * 5 * NSAMPLES) for done in range(1, 3 * 5 * NSAMPLES + 1)]
        assert len(children() - before) == processes
        here = run_layers(checkpoint, IDS, scratch=tmp_path)
        there = run_layers(checkpoint, IDS, scratch=tmp_path, executor=executor)
        assert set(here) == set(there)
        for point, seen in here.items():
            assert torch.equal(seen.minimum, there[point].minimum), point
            assert torch.equal(seen.maximum, there[point].maximum), point
            assert seen.count == there[point].count == NSAMPLES * SEQLEN
        damage(monkeypatch)
        with pytest.raises(CalibrationError, match="NaN or infinity in window 0") as caught:
            run_layers(checkpoint, IDS, scratch=tmp_path, executor=executor)
        assert caught.value.where == "model.layers.1"
    assert children() == before
    assert not scratch_of(tmp_path / "q").exists()


def damage(monkeypatch):
    read = Checkpoint.rows

    def damaged(self, name, start, stop):
        rows = read(self, name, start, stop)
        if name == "model.layers.1.mlp.up_proj.weight":
            rows[3, 4] = np.nan
        return rows

    monkeypatch.setattr(Checkpoint, "rows", damaged)


def test_a_killed_worker_is_said_and_another_number_of_workers_continues(checkpoint, tmp_path, alone):
    before, killed = children(), []

    def kill(done, total):
        if done == 5 * NSAMPLES + 3 and not killed:  # within the second layer
            killed.append(min(children() - before))
            os.kill(killed[0], signal.SIGKILL)

    with (
        pytest.raises(CalibrationError, match="was killed or died") as caught,
        open_executor(tmp_path / "q" / "shards", processes=2) as executor,
    ):
        quantized(checkpoint, tmp_path / "q", executor, progress=kill)
    assert killed
    assert caught.value.where == "model.layers.1"
    assert "run the same command again" in caught.value.next_step
    assert caught.value.exit_code == 1
    assert children() == before
    assert not scratch_of(tmp_path / "q").exists()
    assert [file.name for file in (tmp_path / "q").glob("layer*")] == ["layer-000.safetensors"]
    ticks = []
    assert quantized(checkpoint, tmp_path / "q", Here(2), progress=lambda *seen: ticks.append(seen)) == alone
    assert ticks[0][0] == 5 * NSAMPLES + 1  # the first layer was not done again


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
import psutil
from gemma_deploy.calibration import shards
from gemma_deploy.calibration.executors import open_executor
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.quantization.layers import quantize_layers
from gemma_deploy.quantization.solver import Settings

def progress(done, total):
    if done == 43:
        print(*[child.pid for child in psutil.Process().children()], flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    shards.SHARD_TOKENS = 120
    folder, ids = Path(sys.argv[2]), np.random.default_rng(5).integers(3, 500, (7, 40))
    with open_executor(folder / "shards", processes=2) as executor:
        checkpoint, settings = Checkpoint.open(Path(sys.argv[1])), Settings(activations=True)
        quantize_layers(checkpoint, ids, settings, folder=folder, key="k", progress=progress, executor=executor)
"""


def test_a_killed_run_leaves_no_process_and_one_process_continues_it(checkpoint, tmp_path, alone):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    done = subprocess.run(
        [sys.executable, str(script), str(checkpoint.path), str(tmp_path / "q")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL
    workers = [int(pid) for pid in done.stdout.split()]
    assert len(workers) == 2
    waited = time.monotonic() + 30
    while any(map(alive, workers)) and time.monotonic() < waited:
        time.sleep(0.05)
    assert not any(map(alive, workers))
    assert [file.name for file in (tmp_path / "q").glob("layer*")] == ["layer-000.safetensors"]
    assert quantized(checkpoint, tmp_path / "q", Here(1)) == alone
    assert not scratch_of(tmp_path / "q").exists()


def alive(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("seqlen", [SEQLEN, 2 * SEQLEN])
@torch.inference_mode()
def test_moments_are_those_of_all_windows(checkpoint, tmp_path, seqlen):
    """X^T X / tokens of the stock first layer's inputs, in float64; a shard less is 1/3 of it."""
    from transformers import AutoModelForCausalLM

    ids = np.random.default_rng(6).integers(3, 500, (NSAMPLES, seqlen))
    stock = AutoModelForCausalLM.from_pretrained(checkpoint.path, attn_implementation="eager", dtype=torch.float32)
    first, seen, states = stock.eval().model.layers[0], {}, []
    points = ("self_attn.q_proj", "mlp.down_proj")
    for point in points:
        first.get_submodule(point).register_forward_pre_hook(
            lambda module, args, point=point: seen.setdefault(point, []).append(args[0][0].double())
        )
    first.register_forward_pre_hook(lambda module, args: states.append(args[0][0].numpy()))
    for row in ids:
        stock.model(torch.from_numpy(row[None]))
    on_disk = HiddenStates((NSAMPLES, seqlen, 64), tmp_path / "states", 0)
    for window, hidden in enumerate(states):
        on_disk.write(window, hidden)
    layer = LayerPass(StackTemplate(LayerSetting(checkpoint.config, "exact", seqlen, checkpoint.path)), 0)
    layer.module.load_state_dict(first.state_dict(), assign=True)
    ticks = []
    found = observe(Here(2), layer, points, states=on_disk, ticked=lambda: ticks.append(1))
    assert len(ticks) == NSAMPLES
    for point in points:
        x = torch.cat(seen[point])
        expected = x.T @ x / len(x)
        # Of the largest element: rounding of float32 sums 2e-7; of factors to bfloat16 where products are quick, those
        # of the pass before too, 2.2e-3.
        limit = 6e-3 if torch.cpu.get_capabilities().get("amx_bf16") else 2e-6
        torch.testing.assert_close(
            found[point].moments.take().double(), expected, rtol=0, atol=limit * float(expected.abs().max())
        )


def test_a_full_disk_in_a_worker_is_explained(checkpoint, tmp_path):
    states = HiddenStates((NSAMPLES, SEQLEN, 64), tmp_path / "states", 0)
    layer = LayerPass(StackTemplate(LayerSetting(checkpoint.config, "exact", SEQLEN, checkpoint.path)), 0)
    weights = load_file(checkpoint.path / "model.safetensors")
    named = {name: weights[f"model.layers.0.{name}"].float() for name in layer.module.state_dict()}
    layer.module.load_state_dict(named, assign=True)
    shard, file = Shard(range(1), states), Path("/dev/full")
    task = moments_pass._Observation(shard, ("mlp.down_proj",), None, ENTERED, False, None, file)
    with layer.hooked(), pytest.raises(CalibrationError, match="No space left on device") as caught:
        moments_pass._moments(layer, task)
    assert "workspace.workers: 1" in caught.value.next_step


RECIPE = "name: g\nfrontend: {checkpoint: demo, shape: {input_ids: [[16], [32]]}}\nbackend: {dtype: int8}\nworkspace: "


@pytest.mark.parametrize(
    ("workspace", "processes", "cluster"),
    [
        ("{}", 1, None),  # two tensors are written at a time, and one process calibrates
        ("{workers: 1}", 1, None),
        ("{workers: 2}", 2, None),
        ("{cluster: 'auto'}", 1, "auto"),
        ("{workers: 3, cluster: 'ray://head:10001'}", 3, "ray://head:10001"),
    ],
)
def test_what_a_recipe_asks_for(workspace, processes, cluster):
    found = Recipe.from_text(RECIPE + workspace).workspace
    assert (found.processes, found.cluster) == (processes, cluster)


@pytest.mark.parametrize("wrong", ["head", "http://head:1", "head:port", "ray://head"])
def test_a_cluster_that_is_no_address_is_refused(wrong):
    with pytest.raises(UsageError, match=r"workspace.cluster: got '.*', expected auto, HOST:PORT or ray://HOST:PORT"):
        Recipe.from_text(RECIPE + f"{{cluster: '{wrong}'}}")


def test_without_ray_the_command_to_install_it_is_given(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="ray is not installed") as caught, open_executor(tmp_path, cluster="auto"):
        raise AssertionError("connected")
    assert caught.value.next_step == 'pip install "gemma-deploy[ray]"'


def test_nobody_at_the_address(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    for place in ("127.0.0.1:1", "ray://127.0.0.1:1"):
        with (
            pytest.raises(CalibrationError, match="no Ray cluster answers: Connection refused") as caught,
            open_executor(tmp_path, cluster=place),
        ):
            raise AssertionError("connected")
        assert "ray start --head" in caught.value.expected


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of one CPU each; they find this package as the tests do."""
    pytest.importorskip("ray", reason='ray is not installed: pip install -c constraints.txt ".[ray]"')
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        node = {"num_cpus": 1, "object_store_memory": 100 << 20}
        made = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
        made.add_node(**node)
        yield made
        made.shutdown()


@pytest.mark.slow
def test_two_nodes_of_a_ray_cluster_give_the_same_bytes_and_ranges(cluster, checkpoint, tmp_path, alone, monkeypatch):
    import ray

    with open_executor(tmp_path / "q" / "shards", cluster=cluster.address) as executor:
        assert executor.width == 2
        assert len([node for node in ray.nodes() if node["Alive"]]) == 2
        assert quantized(checkpoint, tmp_path / "q", executor) == alone
        here = run_layers(checkpoint, IDS, scratch=tmp_path)
        there = run_layers(checkpoint, IDS, scratch=tmp_path, executor=executor)
        assert all(torch.equal(seen.maximum, there[point].maximum) for point, seen in here.items())
        layer = LayerPass(StackTemplate(LayerSetting(checkpoint.config, "exact", SEQLEN, checkpoint.path)), 0)
        weights = load_file(checkpoint.path / "model.safetensors")
        named = {name: weights[f"model.layers.0.{name}"].float() for name in layer.module.state_dict()}
        layer.module.load_state_dict(named, assign=True)
        nodes = {node["NodeID"] for node in ray.nodes()}
        for _ in range(10):  # of 2 to 4 seconds each: a node whose process starts slowly finds the first items done
            places = set(executor.map(place, layer, range(8)))
            if {node for node, _ in places} == nodes:
                break
        assert {node for node, _ in places} == nodes  # both of them work
        victim = min(pid for _, pid in places)
        ticks = []

        def kill(done, total):
            ticks.append(done)
            if done == NSAMPLES:
                os.kill(victim, signal.SIGKILL)

        assert quantized(checkpoint, tmp_path / "killed", executor, progress=kill) == alone  # done again elsewhere
        assert not psutil.pid_exists(victim)
        damage(monkeypatch)
        with pytest.raises(CalibrationError, match="NaN or infinity in window 0") as caught:
            run_layers(checkpoint, IDS, scratch=tmp_path, executor=executor)
        assert caught.value.where == "model.layers.1"


def place(layer, item):
    """Node and process that do an item."""
    import ray

    time.sleep(0.5)
    return ray.get_runtime_context().get_node_id(), os.getpid()
