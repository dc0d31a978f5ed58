"""Every bad input a user can bring, end to end: one message that names the file, key or tensor and the next step, the
exit code that was promised, no traceback, and nothing half-written."""

import csv
import errno
import gzip
import io
import json
import os
import shutil
import struct
import zipfile

import numpy as np
import pytest
import yaml

from gemma_deploy.cli import main
from tests.checkpoint.make import config, encode, weights, write_checkpoint, write_index, write_safetensors

RUN_FAILED, USAGE = 1, 2


class World:
    """A folder with a checkpoint, a recipe and a workspace that is not there yet."""

    def __init__(self, root, capsys):
        self.root, self.capsys = root, capsys
        self.checkpoint, self.workspace = root / "model", root / "workspace"
        self.content = {
            "name": "bad",
            "frontend": {"checkpoint": str(self.checkpoint), "shape": {"input_ids": [[16], [32]]}},
            "backend": {"dtype": "int8"},
            "workspace": {"path": str(self.workspace)},
        }
        self.recipe_text = None
        write_checkpoint(self.checkpoint)

    @property
    def weights(self):
        return self.checkpoint / "model.safetensors"

    def change_config(self, **changes):
        file = self.checkpoint / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    def run(self, *arguments):
        """Exit code and everything said on standard error."""
        code = main([str(argument) for argument in arguments])
        return code, self.capsys.readouterr().err

    def compile(self):
        recipe = self.root / "recipe.yaml"
        recipe.write_text(self.recipe_text or yaml.safe_dump(self.content))
        return self.run("compile", recipe, "--no-parity")


@pytest.fixture
def world(tmp_path, capsys):
    return World(tmp_path, capsys)


def is_a_good_message(code, said, expected_code, *parts):
    assert code == expected_code, said
    assert "Traceback" not in said
    assert said.count("error:") + said.count("Error:") == 1, said
    flat = " ".join(said.split())
    for part in parts:
        assert part in flat, f"{part!r} is not in:\n{said}"


# --- checkpoints: (how to break it, what must be said) ---------------------------------------------------------------


def truncated(world):
    data = world.weights.read_bytes()
    world.weights.write_bytes(data[: len(data) - 100])


def header_longer_than_the_file(world):
    world.weights.write_bytes(struct.pack("<Q", 1 << 40) + world.weights.read_bytes()[8:])


def offsets_outside(world):
    header, data = encode(weights(config()))
    header["model.norm.weight"]["data_offsets"] = [len(data) + 10, len(data) + 74]
    write_safetensors(world.weights, header, data)


def sharded(world):
    shutil.rmtree(world.checkpoint)
    return write_checkpoint(world.checkpoint, shards=2)


def missing_shard(world):
    sharded(world)
    (world.checkpoint / "model-00002-of-00002.safetensors").unlink()


def outside(world):
    names = list(sharded(world))
    write_index(world.checkpoint, dict.fromkeys(names, "../elsewhere.safetensors"))


def absolute(world):
    names = list(sharded(world))
    write_index(world.checkpoint, dict.fromkeys(names, "/etc/passwd"))


def pickle_only(world):
    world.weights.unlink()
    (world.checkpoint / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")


def wrong_tensors(world):
    tensors = weights(config())
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.9.stranger.weight"] = np.zeros(3, np.float32)
    tensors["model.layers.0.self_attn.q_proj.weight"] = np.zeros((16, 16), np.float32)
    write_checkpoint(world.checkpoint, tensors=tensors)


def not_a_number(world):
    tensors = weights(config())
    tensors["model.layers.2.mlp.down_proj.weight"][3, 5] = np.nan
    write_checkpoint(world.checkpoint, tensors=tensors)


def infinite(world):
    tensors = weights(config())
    tensors["model.layers.0.input_layernorm.weight"][2] = np.inf
    write_checkpoint(world.checkpoint, tensors=tensors)


def no_config(world):
    (world.checkpoint / "config.json").unlink()


def config_is_no_json(world):
    (world.checkpoint / "config.json").write_text('{"model_type": "gemma",')


def unknown_model(world):
    world.change_config(model_type="llama")


def heads_do_not_divide(world):
    world.change_config(num_key_value_heads=3)


def gguf(world, data):
    shutil.rmtree(world.checkpoint)
    file = world.checkpoint.with_suffix(".gguf")
    file.write_bytes(data)
    world.content["frontend"]["checkpoint"] = str(file)
    world.content["frontend"]["type"] = "gguf"


def gguf_bytes(architecture):
    from tempfile import TemporaryDirectory

    import gguf

    with TemporaryDirectory() as folder:
        writer = gguf.GGUFWriter(f"{folder}/x.gguf", architecture)
        writer.add_block_count(1)
        writer.add_tensor("output_norm.weight", np.ones(64, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with open(f"{folder}/x.gguf", "rb") as file:
            return file.read()


def gguf_cut_short(world):
    gguf(world, gguf_bytes("gemma3")[:-128])


def gguf_of_another_architecture(world):
    gguf(world, gguf_bytes("qwen2"))


def no_checkpoint(world):
    world.content["frontend"]["checkpoint"] = str(world.root / "nowhere")


CHECKPOINTS = [
    (truncated, ("model.safetensors", "next:")),
    (header_longer_than_the_file, ("model.safetensors", "header", "next:")),
    (offsets_outside, ("model.safetensors", "model.norm.weight", "next:")),
    (missing_shard, ("model-00002-of-00002.safetensors", "next:")),
    (outside, ("../elsewhere.safetensors", "model.safetensors.index.json", "next:")),
    (absolute, ("/etc/passwd", "model.safetensors.index.json", "next:")),
    (pickle_only, ("pytorch_model.bin", "safetensors", "next:")),
    (
        wrong_tensors,
        (
            "model.layers.1.mlp.up_proj.weight",
            "model.layers.9.stranger.weight",
            "model.layers.0.self_attn.q_proj.weight",
            "[16, 16]",
            "[32, 16]",
        ),
    ),
    (no_config, ("config.json", "next:")),
    (config_is_no_json, ("config.json", "JSON", "line 1", "next:")),
    (unknown_model, ("config.json", "llama", "gemma3_text")),
    (heads_do_not_divide, ("config.json", "num_attention_heads", "num_key_value_heads", "3")),
    (gguf_cut_short, ("model.gguf", "next:")),
    (gguf_of_another_architecture, ("model.gguf", "qwen2", "gemma3")),
    (no_checkpoint, ("nowhere", "next:")),
]


@pytest.mark.parametrize(("how", "parts"), CHECKPOINTS, ids=[how.__name__ for how, _ in CHECKPOINTS])
def test_a_bad_checkpoint_is_refused_before_any_work(world, how, parts):
    how(world)
    is_a_good_message(*world.compile(), RUN_FAILED, *parts)
    assert not world.workspace.exists()


@pytest.mark.parametrize(
    ("how", "tensor"),
    [
        (not_a_number, "model.layers.2.mlp.down_proj.weight"),
        (infinite, "model.layers.0.input_layernorm.weight"),
    ],
)
def test_a_weight_that_is_no_number_names_its_tensor_and_leaves_no_artifact(world, how, tensor):
    how(world)
    is_a_good_message(*world.compile(), RUN_FAILED, tensor, "next:")
    assert [entry.name for entry in world.workspace.iterdir()] == ["bad.partial"]


def test_gemma_2_9b_with_the_older_scalar_is_a_warning(tmp_path, capsys, caplog):
    raw = config(
        "gemma2", num_hidden_layers=42, hidden_size=3584, num_attention_heads=16, num_key_value_heads=8, head_dim=256,
        query_pre_attn_scalar=224,
    )  # fmt: skip
    from gemma_deploy.checkpoint import ModelConfig

    (warning,) = ModelConfig.from_dict(raw, "config.json").warnings
    assert "query_pre_attn_scalar" in warning
    assert "224" in warning
    assert "256" in warning


# --- recipes -------------------------------------------------------------------------------------------------------


def changed(**sections):
    def change(world):
        for section, keys in sections.items():
            if isinstance(keys, dict):
                world.content[section] = world.content.get(section, {}) | keys
            else:
                world.content[section] = keys

    return change


def text(content):
    def change(world):
        world.recipe_text = content

    return change


PYTHON_TAG = "name: x\nfrontend: !!python/object/apply:os.system ['touch /tmp/owned']\nbackend: {dtype: fp32}\n"
RECIPES = {
    "typo": (changed(backend={"dytpe": "int8"}), ("backend.dytpe", "dtype", "line")),
    "wrong type": (changed(frontend={"shape": {"input_ids": [["many"], [32]]}}), ("frontend.shape.input_ids", "line")),
    "odd length": (changed(frontend={"shape": {"input_ids": [[20], [32]]}}), ("20", "multiple of 16")),
    "context below prefill": (changed(frontend={"shape": {"input_ids": [[64], [32]]}}), ("64", "32")),
    "contradiction": (
        changed(backend={"dtype": "fp16"}, frontend={"quantize": {"type": "w8a16"}}),
        ("backend.dtype", "fp16", "w8a16"),
    ),
    "python tag": (text(PYTHON_TAG), ("python", "line 2")),
    "no YAML": (text("name: [x\nfrontend: 3"), ("recipe.yaml", "line")),
    "missing keys": (text("name: x\n"), ("frontend", "backend")),
    "not built": (changed(frontend={"model_kwargs": {"tp": 4, "align_qkv": True}}), ("tp", "4", "not built yet")),
    "undefined variable": (changed(frontend={"checkpoint": "${NOWHERE_SET}"}), ("NOWHERE_SET",)),
    "context longer than the model": (
        changed(frontend={"shape": {"input_ids": [[64], [128]]}}),
        ("128", "max_position_embeddings", "64"),
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_bad_recipe_is_refused_before_any_work(world, name):
    how, parts = RECIPES[name]
    frontend = world.content["frontend"]
    how(world)
    if world.recipe_text is None:
        world.content["frontend"] = frontend | world.content["frontend"]
    is_a_good_message(*world.compile(), USAGE, *parts, "next:")
    assert not world.workspace.exists()
    assert not os.path.exists("/tmp/owned")


def test_all_offenders_of_a_recipe_are_told_at_once(world):
    world.content["backend"] = {"dytpe": "int8"}
    world.content["frontend"]["shape"] = {"input_ids": [[20], [10]]}
    world.content["wrokspace"] = {}
    is_a_good_message(*world.compile(), USAGE, "backend.dytpe", "20", "wrokspace", "workspace")


def test_a_recipe_that_is_not_there(world):
    is_a_good_message(*world.run("compile", world.root / "none.yaml"), USAGE, "none.yaml", "next:")


# --- disk ----------------------------------------------------------------------------------------------------------


def test_a_full_disk(world, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    is_a_good_message(*world.compile(), RUN_FAILED, "the disk is full", str(world.workspace), "next:")
    assert not (world.workspace / "bad").exists()


def test_too_little_disk_is_known_before_any_work(world, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    is_a_good_message(*world.compile(), RUN_FAILED, "disk", str(world.workspace), "next:")
    assert not world.workspace.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_workspace_that_may_not_be_written_to(world):
    world.workspace.mkdir(mode=0o500)
    is_a_good_message(*world.compile(), RUN_FAILED, "cannot write", str(world.workspace), "workspace.path")


def test_a_read_only_file_system(world, monkeypatch):
    real = os.mkdir

    def refuse(path, *args, **kwargs):
        if str(path).startswith(str(world.workspace)):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", refuse)
    is_a_good_message(*world.compile(), RUN_FAILED, "Read-only file system", str(world.workspace), "workspace.path")


def test_a_file_where_the_workspace_should_be(world):
    world.workspace.write_text("a file")
    is_a_good_message(*world.compile(), RUN_FAILED, str(world.workspace), "next:")
    assert world.workspace.read_text() == "a file"


# --- artifacts -----------------------------------------------------------------------------------------------------


def flipped(artifact):
    params = artifact / "params.safetensors"
    data = bytearray(params.read_bytes())
    data[-1] ^= 1
    params.write_bytes(data)


def without(name):
    return lambda artifact: (artifact / name).unlink()


def another_version(artifact):
    file = artifact / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": 7}))


def graph_cut_short(artifact):
    file = artifact / "iter1.onnx"
    file.write_bytes(file.read_bytes()[:2000])


RUN = ("run", "-p", "Return the", "-n", "2")
ARTIFACTS = {
    "flipped bit, verify": (flipped, ("verify",), ("sha256", "next:")),
    "missing graph, verify": (without("iter1.onnx"), ("verify",), ("iter1.onnx is missing", "next:")),
    "missing graph, run": (without("iter1.onnx"), RUN, ("iter1.onnx", "next:")),
    "missing graph, parity": (without("iter1.onnx"), ("parity",), ("iter1.onnx", "next:")),
    "graph cut short, parity": (graph_cut_short, ("parity",), ("iter1.onnx", "next:")),
    "missing parameters, parity": (without("params.safetensors"), ("parity",), ("params.safetensors", "next:")),
    "missing parameters, run": (without("params.safetensors"), RUN, ("params.safetensors", "next:")),
    "graph cut short, run": (graph_cut_short, RUN, ("iter1.onnx", "next:")),
    "other version, verify": (another_version, ("verify",), ("manifest.json", "format_version is 7", "expected: 1")),
    "other version, run": (another_version, RUN, ("manifest.json", "format_version is 7", "next:")),
    "other version, parity": (another_version, ("parity",), ("manifest.json", "format_version is 7", "next:")),
    "other version, inspect": (another_version, ("inspect",), ("manifest.json", "format_version is 7", "next:")),
    "no manifest, run": (without("manifest.json"), RUN, ("manifest.json is missing", "next:")),
    "no tokenizer, run": (without("tokenizer.json"), RUN, ("tokenizer.json", "next:")),
}


@pytest.mark.parametrize("name", ARTIFACTS)
def test_a_bad_artifact(world, demo_copy, name):
    how, (command, *options), parts = ARTIFACTS[name]
    how(demo_copy)
    is_a_good_message(*world.run(command, demo_copy, *options), RUN_FAILED, str(demo_copy), *parts)


def test_a_prompt_longer_than_the_artifact_takes(world, demo_artifact):
    code, said = world.run("run", demo_artifact, "-p", "list " * 400)
    is_a_good_message(code, said, USAGE, "128", "frontend.shape.input_ids", "next:")


def test_parity_without_any_artifact(world):
    world.workspace.mkdir()
    is_a_good_message(*world.run("parity", "--workspace", world.workspace), USAGE, str(world.workspace), "next:")


# --- calibration data ----------------------------------------------------------------------------------------------


def write_gzip(path, lines):
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def too_short(path):
    write_gzip(path, [{"text": "A few words."}])


def cut_gzip(path):
    write_gzip(path, [{"text": "words " * 200 + str(i)} for i in range(50)])
    path.write_bytes(path.read_bytes()[:-200])


def wrong_header(path):
    table = io.StringIO()
    csv.writer(table).writerows([["id", "frage", "A", "B", "C", "D", "answer"], [0, "x", "a", "b", "c", "d", "A"]])
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("val/physics_val.csv", table.getvalue())


CALIBRATION = {
    "empty": ("c4", "c4.json.gz", lambda path: path.write_bytes(b""), ("c4.json.gz", "empty", "next:")),
    "too short": ("c4", "c4.json.gz", too_short, ("c4.json.gz", "tokens", "next:")),
    "truncated": ("c4", "c4.json.gz", cut_gzip, ("c4.json.gz", "next:")),
    "no gzip": ("c4", "c4.json.gz", lambda path: path.write_bytes(b"PK plain"), ("c4.json.gz", "gzip", "next:")),
    "wrong header": ("ceval", "ceval.zip", wrong_header, ("physics_val.csv", "question", "frage", "next:")),
    "no zip": ("ceval", "ceval.zip", lambda path: path.write_bytes(b"nothing"), ("ceval.zip", "zip", "next:")),
    "no JSON": ("alpaca", "alpaca.json", lambda path: path.write_text("[{]"), ("alpaca.json", "JSON", "next:")),
    "wrong keys": (
        "alpaca", "alpaca.json", lambda path: path.write_text('[{"prompt": "x"}]'),
        ("alpaca.json", "instruction", "prompt", "next:"),
    ),
    "not there": ("c4", "none.json.gz", lambda path: None, ("none.json.gz", "next:")),
}  # fmt: skip


@pytest.mark.parametrize("name", CALIBRATION)
def test_bad_calibration_data(world, name):
    dataset, file, how, parts = CALIBRATION[name]
    path = world.root / file
    how(path)
    arguments = ["calibrate", "--dataset", dataset, "--path", path, "--workspace", world.workspace]
    is_a_good_message(*world.run(*arguments, "--nsamples", 8, "--seqlen", 64), RUN_FAILED, *parts)
    assert not list(world.root.glob("workspace/calib/*"))


def test_calibration_needs_a_tokenizer(world):
    arguments = ["calibrate", "--dataset", "c4", "--checkpoint", world.checkpoint, "--workspace", world.workspace]
    is_a_good_message(*world.run(*arguments), RUN_FAILED, "tokenizer", str(world.checkpoint), "next:")


# --- interrupted ---------------------------------------------------------------------------------------------------


def test_ctrl_c_is_one_line_and_130(world, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("gemma_deploy.compile.stream_params", interrupted)
    code, said = world.compile()
    assert code == 130
    assert said.strip() == "interrupted; run the same command again to continue where it stopped"
    assert not (world.workspace / "bad").exists()
