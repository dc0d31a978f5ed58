"""Preflight counts parameter bytes exactly and refuses what a small machine cannot do."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from math import prod
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from gemma_deploy import machine as machines
from gemma_deploy.checkpoint.config import ModelConfig
from gemma_deploy.checkpoint.expected import expected_tensors
from gemma_deploy.errors import NotBuiltError, PreflightError
from gemma_deploy.job import Job
from gemma_deploy.machine import Machine
from gemma_deploy.names import GIB
from gemma_deploy.preflight import ResourcePlan, duration, make_plan, parameter_bytes, preflight, render
from gemma_deploy.recipe import Recipe

BIG = Machine(ram_bytes=64 * GIB, ram_source="free memory of the machine", disk_free_bytes=10**12, cpus=2)

GEMMA_2B = {
    "model_type": "gemma",
    "vocab_size": 256000,
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "num_hidden_layers": 18,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "max_position_embeddings": 8192,
}
ELEMENTS = 2_506_172_416  # parameters of gemma-2b


def recipe(dtype: str = "int8", workspace: str = "/nowhere/workspace", extra: str = "") -> Recipe:
    return Recipe.from_text(
        "name: g\nfrontend: {checkpoint: demo, shape: {input_ids: [[1024], [2048]]}}\n"
        f"backend: {{dtype: {dtype}}}\nworkspace: {{path: {workspace}}}\n{extra}"
    )


def planned(asked: Recipe, source: SimpleNamespace, **options: object) -> ResourcePlan:
    return make_plan(Job.of(asked, source), **options)


def checkpoint(path: str = "/models/g", **changes: object) -> SimpleNamespace:
    config = ModelConfig.from_dict(GEMMA_2B | changes, "config.json")
    tensors = {
        name: SimpleNamespace(shape=shape, nbytes=2 * prod(shape)) for name, shape in expected_tensors(config).items()
    }
    return SimpleNamespace(
        path=Path(path), config=config, tensors=tensors, notes=(), tokenizer_files=list, quantized={}
    )


def test_parameter_bytes_are_exact():
    tables = 2 * 2048 * 128 * 4
    gains = (2 * 18 + 1) * 2048
    source = checkpoint()
    assert sum(prod(tensor.shape) for tensor in source.tensors.values()) == ELEMENTS
    assert parameter_bytes(Job.of(recipe("fp32"), source)) == 4 * ELEMENTS + tables
    assert parameter_bytes(Job.of(recipe("bf16"), source)) == 2 * ELEMENTS + 2 * gains + tables
    assert parameter_bytes(Job.of(recipe("fp16"), source)) == 2 * ELEMENTS + 2 * gains + tables + 4 * (37 + 18)
    rows = 256000 + 18 * (2048 + 256 + 256 + 2048 + 16384 + 16384 + 2048)
    assert parameter_bytes(Job.of(recipe("int8"), source)) == ELEMENTS + 3 * gains + 4 * rows + tables


def test_a_stored_head_beside_a_tied_table_is_not_counted():
    source = checkpoint()
    before = parameter_bytes(Job.of(recipe(), source))
    source.tensors["lm_head.weight"] = source.tensors["model.embed_tokens.weight"]
    assert parameter_bytes(Job.of(recipe(), source)) == before


def test_memory_before_parity_is_flat_in_model_size():
    small, large = (
        planned(recipe(), checkpoint(num_hidden_layers=layers), machine=BIG, parity=False) for layers in (18, 46)
    )
    assert small.peak_ram_bytes == large.peak_ram_bytes < GIB
    assert large.disk_bytes > small.disk_bytes


def test_parity_asks_for_one_matrix_and_not_for_the_model():
    small, large = (planned(recipe(), checkpoint(num_hidden_layers=layers), machine=BIG) for layers in (18, 46))
    assert small.stages[-1].name == "parity"
    assert small.stages[-1].ram_bytes == large.stages[-1].ram_bytes
    assert large.stages[-1].seconds > 1.5 * small.stages[-1].seconds
    wide = planned(recipe(), checkpoint(intermediate_size=2 * 16384), machine=BIG)
    assert wide.stages[-1].ram_bytes > small.stages[-1].ram_bytes


def test_parity_for_onnx_runtime_asks_for_all_weights_once_whichever_kernels_pack_them():
    def stage(backend):
        job = Recipe.from_text(
            "name: g\nfrontend: {checkpoint: demo, shape: {input_ids: [[1024], [2048]]}}\n"
            f"backend: {{dtype: int8, {backend}}}\n"
        )
        return planned(job, checkpoint(), machine=BIG).stages[-1]

    fast, lean = (stage(f"type: onnxruntime, compile: {{prefill: {name}}}") for name in ("fast", "lean"))
    assert fast == lean == stage("type: onnxruntime")
    assert ELEMENTS < fast.ram_bytes - stage("type: tvm_vacc").ram_bytes < 1.5 * ELEMENTS


def test_quantizing_asks_for_a_layer_and_its_moments():
    def stage(layers, windows=16):
        extra = f"dataset: {{nsamples: {windows}, seqlen: 512}}\n"
        asked = Recipe.from_text(
            "name: g\nfrontend: {checkpoint: demo, shape: {input_ids: [[1024], [2048]]},"
            f" quantize: {{type: w8a16_gptq}}}}\nbackend: {{dtype: int8}}\n{extra}"
        )
        stages = planned(asked, checkpoint(num_hidden_layers=layers), machine=BIG).stages
        return next(stage for stage in stages if stage.name == "quantize")

    moments, layer = 4 * 16384**2, 2048 * (2 * 2048 + 2 * 256 + 3 * 16384)
    assert stage(18).ram_bytes == stage(72).ram_bytes == stage(18, 512).ram_bytes
    assert moments + 4 * layer < stage(18).ram_bytes < 4.1 * GIB  # measured with two threads: 2.8
    # Before and after a layer, and in front of down_proj with its input.
    assert stage(18).disk_bytes == 18 * layer + 4 * 16 * 512 * (3 * 2048 + 16384)
    assert stage(36).seconds == pytest.approx(2 * stage(18).seconds, rel=0.02)


def test_sensitivity_is_estimated_where_it_is_measured():
    def stages(kind, calib_args=""):
        asked = Recipe.from_text(
            "name: g\nfrontend: {checkpoint: demo, shape: {input_ids: [[1024], [2048]]},"
            f" quantize: {{type: {kind}, {calib_args}}}}}\nbackend: {{dtype: int8}}\n"
        )
        return {stage.name: stage for stage in planned(asked, checkpoint(), machine=BIG).stages}

    assert "sensitivity" not in stages("w8a16") | stages("w8a16_gptq", "calib_args: {sensitivity: false}")
    found = stages("w8a16_gptq")["sensitivity"]
    assert 4 * 2048 * (2 * 2048 + 2 * 256 + 3 * 16384) < found.ram_bytes < 2 * GIB
    assert found.disk_bytes == 4 * (18 + 2) * 256 * 2048


def test_an_int8_cache_asks_for_a_pass_where_nothing_else_does():
    def stages(kind):
        asked = Recipe.from_text(
            "name: g\nfrontend: {checkpoint: demo, shape: {input_ids: [[1024], [2048]]},"
            f" quantize: {{type: {kind}}}}}\nbackend: {{dtype: int8}}\ndataset: {{nsamples: 16, seqlen: 512}}\n"
        )
        return {stage.name: stage for stage in planned(asked, checkpoint(), machine=BIG).stages}

    assert "cache" not in stages("w8a16") | stages("w8a16_gptq+kv8")
    found = stages("w8a16+kv8")["cache"]
    layer = 4 * 2048 * (2 * 2048 + 2 * 256 + 3 * 16384)
    assert layer < found.ram_bytes < 4 * layer
    assert found.disk_bytes == 4 * 16 * 512 * 2048


def test_all_shortfalls_are_refused_at_once_in_plain_words():
    tiny = Machine(GIB // 2, "cgroup limit 1.00 GiB", 12_000_000, cpus=1, writable=False)
    with pytest.raises(PreflightError) as caught:
        preflight(Job.of(recipe(extra="parity: {text: /none.txt}\n"), checkpoint()), machine=tiny)
    error = caught.value
    assert error.exit_code == 1
    assert str(error) == (
        "recipe g: this machine cannot do the job as asked\n"
        "  - memory: stage graphs needs about 0.89 GiB, 0.50 GiB is available (cgroup limit 1.00 GiB): free memory\n"
        "  - memory: stage parity needs about 0.82 GiB, 0.50 GiB is available (cgroup limit 1.00 GiB): "
        "compare fewer tokens (parity.prompt_tokens), or free memory\n"
        "  - disk: /nowhere/workspace/g needs 2.51 GB, 12.0 MB is free: "
        "free space, or set workspace.path to another disk\n"
        "  - workspace: / cannot be written: set workspace.path to a directory that can\n"
        "  - file: parity.text '/none.txt' is not a file: correct the path\n"
        "  next: see all stages with `gemma-deploy compile RECIPE --dry-run`"
    )


def test_what_an_interrupted_run_wrote_is_not_asked_for_again(tmp_path):
    job, source = recipe(workspace=str(tmp_path)), checkpoint()
    exact = replace(BIG, disk_free_bytes=planned(job, source, machine=BIG).disk_bytes)
    assert planned(job, source, machine=exact).shortfalls == ()
    short = replace(exact, disk_free_bytes=exact.disk_free_bytes - 1000)
    assert len(planned(job, source, machine=short).shortfalls) == 1
    (tmp_path / "g.partial").mkdir()
    (tmp_path / "g.partial" / "params.safetensors").write_bytes(bytes(1000))
    assert planned(job, source, machine=short).shortfalls == ()


def test_a_gguf_file_is_said_to_be_another_model():
    assert "dequantized" in planned(recipe(), checkpoint("/models/g.gguf"), machine=BIG).notes[0]
    assert planned(recipe(), checkpoint(), machine=BIG).notes == ()


def test_an_unbuilt_recipe_is_refused_before_it_is_estimated():
    asked = Recipe.from_text(
        "name: g\nfrontend: {checkpoint: demo, shape: {input_ids: [[16], [32]], batch: 2},"
        " model_kwargs: {b2s: true}}\n"
        "backend: {dtype: int8}\n"
    )
    with pytest.raises(NotBuiltError):
        Job.open(asked)


def test_the_plan_renders_and_is_plain_json():
    plan = planned(recipe(), checkpoint(), machine=BIG)
    out = io.StringIO()
    Console(file=out, width=140).print(render(plan))
    text = out.getvalue()
    for word in ("Plan for g (w8a16)", "graphs", "parameters", "parity", "64.00 GiB", "this machine can do it"):
        assert word in text
    assert json.loads(json.dumps(plan.to_json()))["parameter_bytes"] == plan.parameter_bytes
    short = planned(recipe(), checkpoint(), machine=replace(BIG, disk_free_bytes=0))
    out = io.StringIO()
    Console(file=out, width=140).print(render(short))
    assert "short: disk:" in out.getvalue()


@pytest.mark.parametrize(("load", "told"), [(0.9, False), (11.9, True)])
def test_times_of_a_busy_machine_are_said_to_be_too_short(load, told):
    plan = planned(recipe(), checkpoint(), machine=replace(BIG, load=load))
    out = io.StringIO()
    Console(file=out, width=140).print(render(plan))
    assert (f"note: the load average is {load}: times above are those of idle cores" in out.getvalue()) == told


def test_this_machine_is_measured(tmp_path):
    here = Machine.measure(tmp_path / "not" / "yet")
    assert here.ram_bytes > 0
    assert here.disk_free_bytes > 0
    assert here.writable
    (tmp_path / "file").write_text("x")
    assert not Machine.measure(tmp_path / "file" / "g").writable


@pytest.mark.parametrize(
    ("membership", "folder", "names"),
    [
        ("0::/job/step\n", "job", ("memory.max", "memory.current", "inactive_file")),
        (
            "4:cpu,memory:/job/step\n0::/\n",
            "memory/job",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
        # Inside a container the path is the host's, the mount only its own root.
        ("0::/host/only\n", ".", ("memory.max", "memory.current", "inactive_file")),
    ],
)
def test_cgroup_limits_above_the_process_count(tmp_path, monkeypatch, membership, folder, names):
    group = tmp_path / "mount" / folder
    group.mkdir(parents=True, exist_ok=True)
    (group / names[0]).write_text("1000000\n")
    (group / names[1]).write_text("600000\n")
    (group / "memory.stat").write_text(f"anon 5\n{names[2]} 100000\n")
    (tmp_path / "cgroup").write_text(membership)
    rooms = list(machines._cgroup_rooms(tmp_path / "cgroup", tmp_path / "mount"))
    assert rooms == [(500000, 1000000)]
    monkeypatch.setattr(machines, "_cgroup_rooms", lambda *_: iter(rooms))
    here = Machine.measure(tmp_path)
    assert (here.ram_bytes, here.ram_source) == (500000, "cgroup limit 0.00 GiB")


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.2, "1 s"), (40, "40 s"), (89.5, "90 s"), (229, "3.9 min"), (600, "10 min"), (4000, "67 min"), (5401, "1.6 h")],
)
def test_times_are_not_rounded_down(seconds, said):
    assert duration(seconds) == said
