"""Checkpoints for vLLM: what transformers, compressed-tensors and vLLM read of them, read here with NumPy."""

import json
import os
import shlex
import shutil
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.artifact.weights import ArtifactWeights
from gemma_deploy.backends.vllm.source import ENGINE, VARIABLE, VllmSource
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.cli import main
from gemma_deploy.engine import open_engine
from gemma_deploy.errors import DeployError, UsageError
from gemma_deploy.runtime.generate import GenerationStats
from gemma_deploy.testing import write_tiny_checkpoint
from tests.calibration.make import write_tokenizer

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(scheme, generation) -> an artifact for vLLM, unproven, and its checkpoint."""
    known = {}

    def make(scheme, generation="gemma3_text", **keys):
        if (scheme, generation) not in known:
            root = tmp_path_factory.mktemp(scheme)
            write_tokenizer(write_tiny_checkpoint(root / "ck", generation, num_hidden_layers=2))
            quantize = {} if scheme in ("bf16", "fp32") else {"quantize": {"type": scheme, **keys}}
            recipe = {
                "name": scheme,
                "frontend": {"checkpoint": str(root / "ck"), "shape": {"input_ids": [[32], [64]]}, **quantize},
                "backend": {"type": "vllm", "dtype": "int8" if quantize else scheme},
                "workspace": {"path": str(root)},
            }
            file = root / "recipe.yaml"
            file.write_text(json.dumps(recipe))
            assert main(["compile", str(file), "--no-parity"]) == 0
            known[scheme, generation] = root / scheme, root / "ck"
        return known[scheme, generation]

    return make


def stored(artifact):
    """Every tensor that safetensors finds, by the index: name -> array; bfloat16 as float32."""
    index = json.loads((artifact / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index.values()) == {"params.safetensors"}
    with safe_open(artifact / "params.safetensors", "pt") as file:
        assert set(file.keys()) == set(index)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return {name: (one.float() if one.is_floating_point() else one).numpy() for name, one in tensors.items()}


def unpacked(words, bits):
    """Codes of int32 words, the first in the lowest bits, their zero in the middle: [rows, columns]."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    codes = (words.view(np.uint32)[..., None] >> shifts) & np.uint32(2**bits - 1)
    return codes.reshape(len(words), -1).astype(np.int32) - 2 ** (bits - 1)


@pytest.mark.parametrize(
    ("scheme", "bits", "generation"),
    [("w8a16", 8, "gemma"), ("w8a16", 8, "gemma3_text"), ("w4a16_rtn", 4, "gemma2"), ("w8a8", 8, "gemma3_text")],
)
def test_codes_and_scales_are_what_the_checkpoint_rounds_to(made, scheme, bits, generation):
    artifact, checkpoint = made(scheme, generation)
    tensors, source = stored(artifact), Checkpoint.open(checkpoint)
    opened = Artifact.open(artifact)
    weights = ArtifactWeights(opened_config(checkpoint), artifact, opened.manifest)
    group = json.loads((artifact / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    for layer in range(2):
        for kind in LINEARS:
            part = "self_attn" if kind in LINEARS[:4] else "mlp"
            module = f"model.layers.{layer}.{part}.{kind}"
            rows, columns = source.tensors[f"{module}.weight"].shape
            scales = tensors[f"{module}.weight_scale"]
            if scheme == "w8a8":
                codes = tensors[f"{module}.weight"].astype(np.int32)
                assert tensors[f"{module}.weight"].dtype == np.int8
            else:
                codes = unpacked(tensors[f"{module}.weight_packed"], bits)
                assert tuple(tensors[f"{module}.weight_shape"]) == (rows, columns)
            assert codes.shape == (rows, columns)
            size = group["weights"]["group_size"] or columns
            assert scales.shape == (rows, columns // size)
            made_again = codes * np.repeat(scales, size, axis=1)
            np.testing.assert_array_equal(made_again, weights.rows(f"{module}.weight", 0, rows))
            if scheme in ("w8a16", "w4a16_rtn"):  # nothing is folded
                original = source.rows(f"{module}.weight", 0, rows)
                assert np.abs(made_again - original).max() <= scales.max() * (0.51 if bits == 8 else 4)
    table = "model.embed_tokens.weight"
    np.testing.assert_array_equal(tensors[table], source.rows(table, 0, len(tensors[table])))
    assert not [name for name in tensors if "rotary" in name or name.endswith(".scale")]


def opened_config(checkpoint):
    return Checkpoint.open(checkpoint).config


def test_config_says_how_codes_lie(made):
    said = json.loads((made("w4a16_rtn", "gemma2")[0] / "config.json").read_text())
    assert said["architectures"] == ["Gemma2ForCausalLM"]
    claim = said["quantization_config"]
    assert (claim["quant_method"], claim["format"], claim["ignore"]) == (
        "compressed-tensors", "pack-quantized", ["lm_head"],
    )  # fmt: skip
    weights = claim["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["strategy"], weights["group_size"]) == (4, "group", 32)
    said = json.loads((made("w8a8")[0] / "config.json").read_text())["quantization_config"]
    assert said["format"] == "int-quantized"
    assert said["config_groups"]["group_0"]["input_activations"]["strategy"] == "token"


def test_it_is_a_checkpoint_that_this_program_reads_too(made, tmp_path):
    artifact, _ = made("w4a16_rtn", "gemma2")
    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy)
    for own in ("manifest.json", "report.html"):
        (copy / own).unlink()
    read, opened = Checkpoint.open(copy), Artifact.open(artifact)
    weights = ArtifactWeights(read.config, artifact, opened.manifest)
    for name in ("model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.k_proj.weight", "model.norm.weight"):
        rows = read.tensors[name].shape[0]
        np.testing.assert_array_equal(read.rows(name, 0, rows), weights.rows(name, 0, rows))


def test_floats_are_the_checkpoints_own(made):
    artifact, checkpoint = made("bf16", "gemma")
    tensors, source = stored(artifact), Checkpoint.open(checkpoint)
    assert set(tensors) == set(source.tensors)
    for name, info in source.tensors.items():
        np.testing.assert_array_equal(tensors[name], source.rows(name, 0, info.shape[0]).reshape(tensors[name].shape))
    assert "quantization_config" not in json.loads((artifact / "config.json").read_text())


def test_verify_sees_a_bit_that_changed(made, tmp_path, capsys):
    artifact, _ = made("w8a16", "gemma3_text")
    assert main(["verify", str(artifact)]) == 0
    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy)
    content = bytearray((copy / "params.safetensors").read_bytes())
    at = content.index(b"weight_packed")
    content[at] ^= 1
    (copy / "params.safetensors").write_bytes(content)
    assert main(["verify", str(copy)]) == 1
    assert "the header differs" in capsys.readouterr().err


def test_it_is_served_by_vllm(made, capsys):
    artifact, _ = made("w8a16", "gemma3_text")
    capsys.readouterr()
    assert main(["serve-command", str(artifact), "--tensor-parallel-size", "2", "--ray", "--port", "8000"]) == 0
    words = capsys.readouterr().out.split()
    assert words[:3] == ["vllm", "serve", str(artifact)]
    assert words[words.index("--max-model-len") + 1] == "64"
    assert words[words.index("--tensor-parallel-size") + 1] == "2"
    assert "ray" in words
    assert main(["run", str(artifact), "-p", "x"]) == 2
    told = capsys.readouterr().err
    assert "no kernel for weights of 8 bits alone" in told
    assert "serve-command" in told


def test_on_processors_each_device_is_told_which_are_its_own(made, capsys, monkeypatch):
    artifact, _ = made("w8a16", "gemma3_text")
    capsys.readouterr()
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1, 2, 3, 8})
    monkeypatch.setenv(VARIABLE, "/where/python")
    asked = ["serve-command", str(artifact), "--cpu"]
    assert main([*asked, "--tensor-parallel-size", "2"]) == 0
    words = shlex.split(capsys.readouterr().out)
    assert words[:3] == ["env", "VLLM_CPU_KVCACHE_SPACE=4", "VLLM_CPU_OMP_THREADS_BIND=0,1|2,3"]
    assert words[3:7] == ["/where/python", "-m", "vllm.entrypoints.openai.api_server", "--model"]
    assert words[7] == str(artifact)
    assert main(asked) == 0
    assert "THREADS" not in capsys.readouterr().out  # one worker finds its processors itself
    int4, _ = made("w4a16_rtn", "gemma2")
    capsys.readouterr()
    assert main(["serve-command", str(int4), "--cpu"]) == 0
    assert "VLLM_CPU_INT4_W4A8=0" in capsys.readouterr().out.split()  # inputs stay as they are, as in the proof
    assert main([*asked, "--tensor-parallel-size", "2", "--pipeline-parallel-size", "3"]) == 2
    assert "6 devices on 5 processors" in capsys.readouterr().err
    assert main([*asked, "--ray"]) == 2
    assert "no Ray on processors" in capsys.readouterr().err


@pytest.mark.skipif(not os.environ.get(VARIABLE), reason=f"{VARIABLE} names no Python with vLLM")
def test_run_says_in_vllm_what_transformers_says(made):
    """Soft caps, and more tokens than a window; then a text that is set back."""
    artifact, checkpoint = made("fp32", "gemma2")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    ids = [2, 9, 40, 77, 8, 300, 5, 61, 33, 12]
    wanted = model.generate(torch.tensor([ids]), max_new_tokens=24, min_new_tokens=24, do_sample=False)[0].tolist()
    engine = open_engine(artifact)
    session, stats = engine.session(endless=True), GenerationStats()
    assert list(session.reply(ids, max_new_tokens=24, stats=stats))
    assert stats.tokens == wanted[len(ids) :]
    sequence = engine.session(endless=True)._decider.sequence(40)
    sequence.read(wanted)
    sequence.length = 4
    again = sequence.read(ids[4:])[0]
    with torch.inference_mode():
        exact = model(torch.tensor([ids])).logits[0, -1].numpy()
    np.testing.assert_allclose(again, exact, atol=1e-4)
    assert engine.apart_bytes > 1 << 20


def test_others_are_served_here_by_one_process(demo_artifact, capsys):
    assert main(["serve-command", str(demo_artifact)]) == 0
    assert capsys.readouterr().out.split()[:2] == ["gemma-deploy", "serve"]
    for option in (["--tensor-parallel-size", "2"], ["--cpu"]):
        assert main(["serve-command", str(demo_artifact), *option]) == 2
        assert "backend.type vllm" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("keys", "backend", "says"),
    [
        ({"type": "w8a16", "table": "int8"}, {}, "no codes of a token table"),
        ({"type": "w4a16_rtn", "calib_args": {"keep_w8": ["v_proj"]}}, {}, "q_proj, k_proj, v_proj in one matrix"),
        ({"type": "w8a16+kv8"}, {}, "scales of a cache"),
        (None, {"dtype": "fp16"}, "fp16 is not built for vllm"),
    ],
)
def test_what_vllm_cannot_hold_is_refused_before_any_work(made, tmp_path, capsys, keys, backend, says):
    _, checkpoint = made("w8a16", "gemma3_text")
    quantize = {} if keys is None else {"quantize": keys}
    recipe = {
        "name": "x",
        "frontend": {"checkpoint": str(checkpoint), "shape": {"input_ids": [[32], [64]]}, **quantize},
        "backend": {"type": "vllm", "dtype": "int8", **backend},
        "workspace": {"path": str(tmp_path / "w")},
    }
    file = tmp_path / "r.yaml"
    file.write_text(json.dumps(recipe))
    assert main(["compile", str(file)]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


def test_without_vllm_the_proof_says_where_to_get_it(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="vLLM is not installed here") as told:
        ENGINE.python()
    assert VARIABLE in str(told.value.next_step)
    monkeypatch.setenv(VARIABLE, "/nowhere/python")
    with pytest.raises(UsageError, match="names no program"):
        ENGINE.python()


def test_what_the_other_python_said_last_is_told(made, monkeypatch):
    artifact, _ = made("w8a16", "gemma3_text")
    monkeypatch.setenv(VARIABLE, sys.executable)  # which has no vLLM
    source = VllmSource(artifact, "vllm", dtype="float32", longest=8)
    with pytest.raises(DeployError, match="ended before it answered") as told:
        source.head(np.zeros((1, 8), np.float32))
    assert any("No module named" in line for line in told.value.problems)
