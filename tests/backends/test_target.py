"""`backend.type: onnxruntime` as a user compiles it: what is in the artifact, what a kill leaves, what genai reads."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import onnx
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from gemma_deploy import compile as compiler
from gemma_deploy.artifact.manifest import Manifest
from gemma_deploy.backends import backend, backend_of
from gemma_deploy.backends.genai_config import genai_config
from gemma_deploy.backends.onnxruntime.backend import OnnxRuntime, chosen_kernels
from gemma_deploy.backends.onnxruntime.decoder import linears_of
from gemma_deploy.backends.onnxruntime.genai import GenaiModel
from gemma_deploy.backends.onnxruntime.options import CANDIDATES, Kernels
from gemma_deploy.backends.onnxruntime.source import bfloat16_line
from gemma_deploy.checkpoint import ModelConfig
from gemma_deploy.cli import main
from gemma_deploy.errors import ArtifactError
from gemma_deploy.provenance import Code
from gemma_deploy.recipe import Recipe
from gemma_deploy.schemes import CodeForm
from gemma_deploy.stages.graphs import Graphs
from gemma_deploy.testing import TINY_CONFIGS, write_tiny_checkpoint
from gemma_deploy.verifying import verify
from tests.calibration.make import write_tokenizer

LAYERS = {
    "gemma": {"num_hidden_layers": 2},
    "gemma2": {"num_hidden_layers": 2},
    "gemma3_text": {"num_hidden_layers": 3, "sliding_window_pattern": 3},
}
BLOCK = Kernels().block
FILES = {
    "manifest.json", "model.onnx", "params.safetensors", "config.json", "generation_config.json", "genai_config.json",
    "report.html", "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip


def ledger_of(manifest):
    found = Manifest.of(manifest)
    return [asdict(entry) for entry in backend_of(found).ledger(found)]


def write_recipe(folder, checkpoint, dtype="int8", quantize=None, compile_keys=None, context=64):
    frontend = {"checkpoint": str(checkpoint), "shape": {"input_ids": [[32], [context]]}}
    content = {
        "name": "x",
        "frontend": frontend | ({"quantize": quantize} if quantize else {}),
        "backend": {"type": "onnxruntime", "dtype": dtype, "compile": compile_keys or {}},
        "dataset": {"name": "c4:4", "seqlen": 64},
        "parity": {"prompt_tokens": 32, "decode_tokens": 12},
        "workspace": {"path": str(folder / "workspace")},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return folder / "recipe.yaml"


def compile_tiny(folder, kind, dtype="int8", **options):
    """A checkpoint, its recipe (`write_recipe`) and proven artifact."""
    checkpoint = write_tiny_checkpoint(folder / "checkpoint", kind, **LAYERS[kind])
    write_tokenizer(checkpoint)
    assert main(["compile", str(write_recipe(folder, checkpoint, dtype, **options))]) == 0


@pytest.fixture(scope="session")
def compiled(once):
    """(generation, scheme) -> folder with checkpoint, recipe and proven artifact; read only."""

    def get(kind, scheme):
        def make(folder):
            calibrated = {"type": scheme, "calib_args": {"sensitivity": False}} if scheme.startswith("w") else None
            compile_tiny(folder, kind, "int8" if calibrated else scheme, quantize=calibrated)

        return once(f"onnxruntime-target-{kind}-{scheme}", make)

    return get


def manifest_of(folder):
    return json.loads((folder / "workspace/x/manifest.json").read_text())


SCHEMES = [("gemma3_text", "w8a8"), ("gemma2", "w4a16"), ("gemma", "fp32")]
RARER = [pytest.param("gemma2", "w8a16_gptq", marks=pytest.mark.slow),
         pytest.param("gemma3_text", "w4a16_gptq", marks=pytest.mark.slow)]  # fmt: skip


@pytest.mark.parametrize(("kind", "scheme"), [*SCHEMES, *RARER])
def test_an_artifact_is_proven_whole_and_says_what_it_is(compiled, kind, scheme):
    folder = compiled(kind, scheme)
    manifest = manifest_of(folder)
    assert {file.name for file in (folder / "workspace/x").iterdir()} == FILES
    assert manifest["parity"]["passed"] is True
    compared = {line["comparison"] for line in manifest["parity"]["lines"]}
    same_weights = "patched" if scheme == "fp32" else f"patched {scheme}"
    assert {f"{same_weights} = strict", "hf = shipped", "shipped = its parts after a prompt"} <= compared
    assert list(manifest["contract"]["graphs"]) == ["model"]
    checked = verify(folder / "workspace/x")
    assert sum("model.onnx: full check" in line for line in checked) == 1
    dtypes = {row["dtype"] for row in manifest["params"]}
    linears = {"fp32": set(), "w4a16": {"uint4", "uint8"}, "w4a16_gptq": {"uint4", "uint8"}}.get(scheme, {"int8"})
    assert dtypes == {"float32"} | linears | ({"uint8"} if linears else set())


def test_a_bfloat16_graph_is_proven_widened_and_by_its_types(compiled, tmp_path):
    """A CPU cannot run it: its arithmetic is proven in float32, and a gain that stayed float32 is found."""
    artifact = compiled("gemma2", "bf16") / "workspace/x"
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert {line["comparison"] for line in manifest["parity"]["lines"]} == {
        "hf bf16 = patched bf16", "patched bf16 = strict", "hf bf16 = strict",
        "products, norms and caches in bfloat16, logits in float32", "checkpoint = stored weights",
    }  # fmt: skip
    assert any("no such kernels for a CPU" in note for note in manifest["parity"]["notes"])
    assert {row["dtype"] for row in manifest["params"]} == {"float32", "bfloat16"}
    ports = {port["name"]: port["dtype"] for port in manifest["contract"]["graphs"]["model"]["outputs"]}
    assert (ports["logits"], ports["present.0.key"]) == ("float32", "bfloat16")
    assert bfloat16_line(artifact).passed
    copy = shutil.copytree(artifact, tmp_path / "x")
    model = onnx.load(copy / "model.onnx", load_external_data=False)
    cast = next(node for node in model.graph.node if node.output[0] == "model.layers.1.input_layernorm.gain")
    cast.attribute[0].i = onnx.TensorProto.FLOAT
    onnx.save(model, copy / "model.onnx")
    assert (bfloat16_line(copy).value, bfloat16_line(copy).passed) == (1, False)
    with pytest.raises(ArtifactError) as refused:
        GenaiModel(artifact)
    assert "onnxruntime-genai-cuda" in str(refused.value)


def test_the_kernels_are_listed_in_the_manifest_and_the_ledger(compiled):
    """Activations of 8 bits are an entry with what they cost, and a line more where linears are integer products."""
    fast, lean, floats = (compiled(*which) for which in SCHEMES)
    kernels = manifest_of(fast)["kernels"]
    assert (kernels["block"], kernels["integer"]) == (BLOCK, True)
    assert kernels["wide"], "a quarter of the linears gets 14 bits"
    assert set(kernels["wide"]) < linears_of(ModelConfig.from_dict(TINY_CONFIGS["gemma3_text"], "config.json"))
    assert manifest_of(lean)["kernels"] == {"block": BLOCK, "integer": False, "wide": [], "candidates": 0,
                                         "windowed": False, "logits": "last"}  # fmt: skip
    assert manifest_of(floats)["kernels"] is None
    for folder, count in ((fast, 2), (lean, 1), (floats, 0)):
        entries = [one for one in manifest_of(folder)["ledger"] if one["what"].startswith("activations rounded to 8")]
        assert len(entries) == count
        for entry in entries:
            assert entry["effect"]["case"] == "text"
            assert 0 < entry["effect"]["kl_mean"] < 0.02
            assert entry["effect"]["top1"] > 0.8
            assert 0 <= entry["effect"]["overturned"] < 1
        lines = [one for one in manifest_of(folder)["parity"]["lines"] if "lead overturned" in str(one)]
        assert [line["comparison"] for line in lines] == ["strict = shipped"] * (count > 0)

    def where(folder):
        return [one["where"] for one in manifest_of(folder)["ledger"] if one["what"].startswith("activations rounded")]

    assert where(fast) == ["MatMulNBits of the LM head", "MatMulIntegerToFloat of every linear"]
    assert where(lean) == ["MatMulNBits of every linear and of the LM head"]
    wide: dict = {"kernels": kernels | {"wide": ["model.layers.0.mlp.down_proj"]}}
    said = "".join(one["what"] for one in ledger_of(manifest_of(fast) | wide))
    assert "8 bits with a scale per token; to 14 bits before 1 linears (model.layers.0.mlp.down_proj)" in said
    every = sorted(linears_of(ModelConfig.from_dict(manifest_of(fast)["model"], "config.json")))
    said = [one["what"] for one in ledger_of(manifest_of(fast) | {"kernels": kernels | {"wide": every}})]
    assert "activations rounded to 14 bits with a scale per token" in said
    assert not any("iter" in str(entry) for entry in manifest_of(fast)["ledger"])


def test_inspect_shows_the_one_graph(compiled, capsys):
    artifact = compiled("gemma3_text", "w8a8") / "workspace/x"
    manifest = json.loads((artifact / "manifest.json").read_text())
    census, layers = manifest["op_census"]["model"], manifest["model"]["num_hidden_layers"]
    assert "If" not in census
    assert census["com.microsoft::GroupQueryAttention"] == layers
    assert census["com.microsoft::MatMulIntegerToFloat"] == 7 * layers
    assert main(["inspect", str(artifact), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["artifact"]["scheme"] == "w8a8"
    assert facts["artifact"]["parity"].startswith("passed")
    assert {port["graph"] for port in facts["graphs"]} == {"model"}
    assert main(["inspect", str(artifact)]) == 0
    said = capsys.readouterr().out
    for word in ("past_key_values.0.key", "total_sequence", "GatherBlockQuantized", "uint8"):
        assert word in said, word


@pytest.mark.parametrize("damage", ["code", "graph", "missing"])
def test_verify_names_what_is_damaged(compiled, tmp_path, capsys, damage):
    artifact = shutil.copytree(compiled("gemma2", "w4a16") / "workspace/x", tmp_path / "x")
    name = "model.layers.1.mlp.down_proj.weight"
    row = next(row for row in json.loads((artifact / "manifest.json").read_text())["params"] if row["name"] == name)
    if damage == "missing":
        (artifact / "genai_config.json").unlink()
    else:
        file = artifact / ("params.safetensors" if damage == "code" else "model.onnx")
        data = bytearray(file.read_bytes())
        data[row["offset"] + 7 if damage == "code" else len(data) // 2] ^= 0x10
        file.write_bytes(data)
    assert main(["verify", str(artifact)]) == 1
    expected = {"code": f"{name}: sha256", "graph": "model.onnx: sha256", "missing": "genai_config.json is missing"}
    assert expected[damage] in capsys.readouterr().err


def test_a_second_run_writes_nothing_and_other_kernels_are_another_artifact(compiled, tmp_path, capsys):
    folder = compiled("gemma", "fp32")
    shutil.copytree(folder / "workspace", tmp_path / "workspace")
    recipe = write_recipe(tmp_path, folder / "checkpoint", "fp32")
    before = (tmp_path / "workspace/x/manifest.json").stat().st_mtime_ns
    assert main(["compile", str(recipe)]) == 0
    assert "nothing has changed" in capsys.readouterr().out
    assert (tmp_path / "workspace/x/manifest.json").stat().st_mtime_ns == before
    recipe = write_recipe(tmp_path, folder / "checkpoint", "fp32", compile_keys={"block": 64})
    assert main(["compile", str(recipe)]) == 1
    assert "artifact of other inputs" in capsys.readouterr().err


# Forks a child for every moment, which dies when a function is called for the n-th time, before it has done anything.
DRIVER = """
import importlib, json, os, signal, sys
import torch
from gemma_deploy.cli import main
from gemma_deploy.provenance import Code
Code.sha256 = "this"
for (module, name, count), recipe in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        left, owner = [count], importlib.import_module(module)
        *path, last = name.split(".")
        for part in path:
            owner = getattr(owner, part)
        call = getattr(owner, last)
        def dying(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)
        setattr(owner, last, dying)
        os._exit(main(["compile", recipe, "--no-parity"]))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
MOMENTS = {  # and whether the graph is made again
    ("os", "pwrite", 20): True,
    ("gemma_deploy.graph.external", "write_graph", 1): True,
    ("gemma_deploy.compile", "write_model_files", 1): False,
    ("gemma_deploy.artifact.commit", "ArtifactDir.publish", 1): False,
}


def contents(artifact):
    """Bytes of every file, times and paths left out."""
    found = {file.name: file.read_bytes() for file in artifact.iterdir() if file.name != "report.html"}
    manifest = json.loads(found.pop("manifest.json"))
    for key in ("stages", "ledger", "parity"):
        manifest.pop(key)
    manifest["files"].pop("report.html")
    manifest["recipe"].pop("workspace")
    return found, manifest


@pytest.mark.parametrize(("moment", "again"), [((Graphs, "write"), True), ((compiler, "write_model_files"), False)])
def test_an_interrupted_run_is_continued(tmp_path, monkeypatch, capsys, moment, again):
    checkpoint = write_tiny_checkpoint(tmp_path / "checkpoint", "gemma2", num_hidden_layers=2)
    recipe = str(write_recipe(tmp_path, checkpoint))
    assert main(["compile", recipe, "--no-parity", "--out", str(tmp_path / "whole")]) == 0

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        owner, name = moment
        patch.setattr(owner, name, stop)
        assert main(["compile", recipe, "--no-parity"]) == 130
    workspace = tmp_path / "workspace"
    assert [entry.name for entry in workspace.iterdir() if not entry.name.startswith(".")] == ["x.partial"]
    written = (workspace / "x.partial/params.safetensors").stat().st_mtime_ns
    exported, export = [], OnnxRuntime.export
    monkeypatch.setattr(OnnxRuntime, "export", lambda self, job: exported.append(1) or export(self, job))
    assert main(["compile", recipe, "--no-parity"]) == 0
    assert contents(workspace / "x") == contents(tmp_path / "whole")
    assert bool(exported) == again
    assert (workspace / "x/params.safetensors").stat().st_mtime_ns == written


@pytest.mark.slow
def test_kill_9_at_any_moment_and_run_again(tmp_path, monkeypatch):
    checkpoint = write_tiny_checkpoint(tmp_path / "checkpoint", "gemma2", num_hidden_layers=2)
    monkeypatch.setattr(Code, "sha256", "this")
    recipes = []
    for number in range(len(MOMENTS) + 1):
        (tmp_path / str(number)).mkdir()
        recipes.append(str(write_recipe(tmp_path / str(number), checkpoint)))
    plan = json.dumps(list(zip(MOMENTS, recipes, strict=False)))
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, plan], capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert [line for line in done.stdout.split("\n") if line == str(-signal.SIGKILL)] == [str(-signal.SIGKILL)] * 4
    assert main(["compile", recipes[-1], "--no-parity"]) == 0
    whole = contents(tmp_path / str(len(MOMENTS)) / "workspace/x")
    exported, export = [], OnnxRuntime.export
    monkeypatch.setattr(OnnxRuntime, "export", lambda self, job: exported.append(1) or export(self, job))
    for (moment, again), recipe in zip(MOMENTS.items(), recipes, strict=False):
        workspace = (tmp_path / recipe).parent / "workspace"
        assert [entry.name for entry in workspace.iterdir() if not entry.name.startswith(".")] == ["x.partial"]
        exported.clear()
        assert main(["compile", recipe, "--no-parity"]) == 0
        assert contents(workspace / "x") == whole, moment
        assert bool(exported) == again, moment


# Recipe -> kernels

CONFIG = ModelConfig.from_dict(TINY_CONFIGS["gemma3_text"], "config.json")
EVERY = linears_of(CONFIG)
KEPT = frozenset({"model.layers.0.mlp.down_proj", "model.layers.6.mlp.down_proj"})


def loaded(*overrides):
    text = "name: x\nfrontend: {checkpoint: demo, shape: {input_ids: [[64], [128]]}}\nbackend: {dtype: int8}\n"
    return Recipe.from_text(text, ["backend.type=onnxruntime", *overrides], {})


@pytest.mark.parametrize(
    ("overrides", "kernels"),
    [
        ([], Kernels(BLOCK, True, EVERY)),
        (["backend.compile.prefill=fast"], Kernels(BLOCK, True, EVERY)),
        (["backend.compile={prefill: null, head: null, block: null, cache: null}"], Kernels(BLOCK, True, EVERY)),
        (["backend.compile={prefill: lean, block: 32}"], Kernels(32, False)),
        (["backend.compile.head=screened"], Kernels(BLOCK, True, EVERY, CANDIDATES)),
        (["backend.compile.cache=window"], Kernels(BLOCK, True, EVERY, windowed=True)),
        (["backend.compile.cache=full"], Kernels(BLOCK, True, EVERY)),
        (["backend.compile.logits=last"], Kernels(BLOCK, True, EVERY)),
        (["backend.compile.logits=all"], Kernels(BLOCK, True, EVERY, logits="all")),
        (["backend.compile={prefill: lean, head: whole}"], Kernels(BLOCK, False)),
        (["frontend.quantize.type=w4a16"], Kernels(BLOCK, False)),
        (["frontend.quantize.type=w8a8"], Kernels(BLOCK, True, KEPT)),
        (["frontend.quantize.type=w8a16_gptq"], Kernels(BLOCK, True, EVERY)),
        (["frontend.quantize={type: w8a16_gptq, calib_args: {groupsize: 32}}"], Kernels(BLOCK, False)),
        (["frontend.quantize.type=w8a8", "backend.compile.prefill=lean"], Kernels(BLOCK, False)),
        (["frontend.quantize.type=w8a8", "backend.compile={prefill: fast, block: 64}"],
         Kernels(64, True, KEPT)),
    ],
)  # fmt: skip
def test_kernels_follow_the_recipe(overrides, kernels):
    """14 bits have those that calibration kept out of 8 bits, or all; and codes are stored as kernels want them."""
    recipe = loaded(*overrides)
    spec = recipe.spec
    kept = list(KEPT) if spec.scheme.rounds_activations else None
    assert chosen_kernels(spec, CONFIG, kept) == kernels
    assert backend("onnxruntime").codes(spec) == CodeForm(
        unsigned=True, transposed=kernels.integer, experts_transposed=True
    )
    listed = backend("onnxruntime").kernels(spec, CONFIG, kept)
    assert listed == {"block": kernels.block, "integer": kernels.integer, "wide": sorted(kernels.in_14_bits),
                      "candidates": kernels.candidates, "windowed": kernels.windowed,
                      "logits": kernels.logits}  # fmt: skip
    search = backend("onnxruntime").files(spec, CONFIG)["genai_config.json"]["search"]
    chunk = 512 if kernels.integer else 256
    assert search.get("chunk_size") == (None if kernels.logits == "all" else chunk)
    assert recipe.vendor_keys() == {}


def test_linears_are_all_seven_of_every_layer():
    names = {f"model.layers.{i}.self_attn.{part}_proj" for i in range(7) for part in "qkvo"}
    names |= {f"model.layers.{i}.mlp.{part}_proj" for i in range(7) for part in ("gate", "up", "down")}
    assert names == EVERY


def test_widths_that_the_block_kernel_would_pad_are_refused(tmp_path, capsys):
    checkpoint = write_tiny_checkpoint(tmp_path / "checkpoint", "gemma", hidden_size=40, num_hidden_layers=1)
    assert main(["compile", str(write_recipe(tmp_path, checkpoint))]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "wants multiples of 16 input channels in int8, got q_proj, k_proj, v_proj, gate_proj, up_proj (40)" in said
    assert not (tmp_path / "workspace").exists()


def test_what_genai_reads():
    raw = {**TINY_CONFIGS["gemma3_text"], "eos_token_id": [1, 106], "pad_token_id": None}
    found = genai_config(ModelConfig.from_dict(raw, "config.json"), 4096)
    model, decoder = found["model"], found["model"]["decoder"]
    expected = {"bos_token_id": 2, "eos_token_id": [1, 106], "pad_token_id": 0, "context_length": 4096,
                "vocab_size": 512, "type": "gemma3_text"}  # fmt: skip
    assert {key: model[key] for key in expected} == expected
    sizes = {"hidden_size": 64, "head_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
             "num_hidden_layers": 7, "filename": "model.onnx"}  # fmt: skip
    assert {key: decoder[key] for key in sizes} == sizes
    assert decoder["session_options"] == {
        "log_id": "onnxruntime-genai",
        "provider_options": [],
        "intra_op_num_threads": 0,
    }
    assert (found["search"]["max_length"], found["search"]["past_present_share_buffer"]) == (4096, True)


@pytest.mark.parametrize(("kind", "scheme", "agree"), [("gemma", "fp32", 12), ("gemma3_text", "w8a8", 1)])
def test_genai_runs_the_artifact_as_it_is(compiled, kind, scheme, agree):
    """Its own cache, sampler and session; prompts past the window. On float32 every greedy token is the model's."""
    og = pytest.importorskip("onnxruntime_genai")
    folder = compiled(kind, scheme)
    prompt = [2, *map(int, np.random.default_rng(9).integers(3, 500, 29))]
    model = og.Model(str(folder / "workspace/x"))
    options = og.GeneratorParams(model)
    options.set_search_options(max_length=len(prompt) + 12, do_sample=False, min_length=len(prompt) + 12)
    generator = og.Generator(model, options)
    generator.append_tokens(np.array([prompt], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    found = list(map(int, generator.get_sequence(0)))[len(prompt) :]
    stock = AutoModelForCausalLM.from_pretrained(
        folder / "checkpoint", attn_implementation="eager", dtype=torch.float32
    ).eval()
    given = torch.tensor([prompt])
    expected = stock.generate(given, max_new_tokens=12, min_new_tokens=12, do_sample=False)[0, len(prompt) :].tolist()
    assert found[:agree] == expected[:agree]
    assert len(found) == 12
