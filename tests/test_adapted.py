"""A compile with `frontend.adapter`: what is compiled, proven and evaluated is the merged model."""

import json

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.checkpoint import AdapterRef, Checkpoint
from gemma_deploy.cli import cli, main
from gemma_deploy.errors import CheckpointError
from gemma_deploy.job import Job
from gemma_deploy.recipe import Recipe
from gemma_deploy.stages.keys import stage_keys
from gemma_deploy.testing import write_tiny_checkpoint
from tests.calibration.make import write_tokenizer
from tests.checkpoint.adapters.make import PREFIX, TABLE, pair, write_adapter

Q, UP = f"{PREFIX}model.layers.1.self_attn.q_proj", f"{PREFIX}model.layers.0.mlp.up_proj"


def factors(seed=0):
    return pair(Q, (128, 64), seed=seed) | pair(UP, (160, 64), seed=seed + 1)


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A tiny Gemma with a tokenizer, an adapter of it, and a recipe that names both."""
    write_tokenizer(write_tiny_checkpoint(tmp_path / "base", "gemma", num_hidden_layers=2))
    write_adapter(tmp_path / "a", factors(), base_model_name_or_path="base")
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path)
    return tmp_path


def write_recipe(world, backend=None, **frontend):
    content = {
        "name": "x",
        "frontend": {"checkpoint": "base", "adapter": "a", "shape": {"input_ids": [[16], [32]]}} | frontend,
        "backend": backend or {"type": "tvm_vacc", "dtype": "fp32"},
        "parity": {"prompt_tokens": 16, "decode_tokens": 4},
        "workspace": {"path": "workspace"},
    }
    (world / "recipe.yaml").write_text(yaml.safe_dump(content))


def keys(**options):
    return stage_keys(Job.open(Recipe.load("recipe.yaml", **options)), None)


def test_keys_follow_the_adapter(world):
    first = keys()
    assert keys() == first
    own = keys(overrides=["frontend.adapter=null"])
    halved = keys(adapters=[AdapterRef("a", 0.5)])
    write_adapter(world / "a", factors(seed=5), base_model_name_or_path="base")
    other = keys()
    for found in (own, halved, other):
        assert found.parameters != first.parameters
        assert found.gate != first.gate
        assert (found.graphs, found.files) == (first.graphs, first.files)


def test_a_head_of_its_own_changes_graphs_too(world):
    first = keys()
    head = np.ones((512, 64), np.float32)
    write_adapter(world / "a", factors() | {f"{PREFIX}lm_head.weight": head}, modules_to_save=["lm_head"])
    assert keys().graphs != first.graphs


def test_notes_are_told(world, caplog):
    write_adapter(world / "a", factors(), base_model_name_or_path="google/gemma-7b", fan_in_fan_out=True)
    Job.open(Recipe.load("recipe.yaml"))
    assert "its base is google/gemma-7b, and this is base" in caplog.text
    assert "fan_in_fan_out has no effect" in caplog.text


def test_tokens_without_a_table_are_refused(world):
    """A chat template's tokens were added and the table resized, but the larger table was not saved."""
    tokenizer = json.loads((world / "base/tokenizer.json").read_text())
    size = len(tokenizer["model"]["vocab"])
    write_tiny_checkpoint(world / "base", "gemma", num_hidden_layers=2, vocab_size=size)
    added = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokenizer["added_tokens"].append({"id": size, "content": "<|im_end|>", **added})
    (world / "a/tokenizer.json").write_text(json.dumps(tokenizer))
    (world / "a/tokenizer_config.json").write_bytes((world / "base/tokenizer_config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"lacks: '<\|im_end\|>'"):
        Job.open(Recipe.load("recipe.yaml"))
    table = np.ones((size + 1, 64), np.float32)
    write_adapter(
        world / "a", factors() | {f"{PREFIX}model.embed_tokens.weight": table}, base_model_name_or_path="base"
    )
    assert Job.open(Recipe.load("recipe.yaml")).config.vocab_size == size + 1
    write_adapter(world / "a", factors(), base_model_name_or_path="base")
    (world / "base/tokenizer.json").write_text(json.dumps(tokenizer))  # the base has the token outside, too
    assert Job.open(Recipe.load("recipe.yaml")).config.vocab_size == size


def test_a_dry_run_reads_the_adapter(world, capsys):
    assert main(["compile", "recipe.yaml", "--dry-run"]) == 0
    assert main(["compile", "recipe.yaml", "--dry-run", "--adapter", "nowhere"]) == 1
    assert "nowhere: there is no such file or directory" in capsys.readouterr().err
    assert not (world / "workspace").exists()


def test_inspect_shows_the_merged_model(world):
    said = CliRunner().invoke(cli, ["inspect", "base", "--adapter", "a:0.5", "--json", "--params"]).output
    facts = json.loads(said)
    assert facts["checkpoint"]["adapter"].startswith("a, weight 0.5, ")
    dtypes = {row["name"]: row["dtype"] for row in facts["params"]}
    assert [name for name, dtype in dtypes.items() if dtype == "float32"] == [
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
    ]


def test_staged_and_divided_models_are_the_merged_one(world):
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    merged = Checkpoint.open("base", "a")
    assert main(["stage", "base", "staged", "--adapter", "a"]) == 0
    model = AutoModelForCausalLM.from_pretrained("staged", trust_remote_code=True)
    assert model.dtype == torch.float32
    state = model.state_dict()
    for name, info in merged.tensors.items():
        np.testing.assert_array_equal(state[name].numpy(), merged.rows(name, 0, info.shape[0]))
    assert main(["split", "base", "parts", "--points", "1", "--adapter", "a"]) == 0
    part = load_file("parts/bottom/model.safetensors")
    name = next(name for name in part if name.endswith("0.mlp.up_proj.weight"))
    exact = torch.from_numpy(merged.rows("model.layers.0.mlp.up_proj.weight", 0, 160))
    assert torch.equal(part[name], exact.to(torch.bfloat16))


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend",
    [{"type": "tvm_vacc", "dtype": "fp32"}, {"type": "onnxruntime", "dtype": "fp32"}],
    ids=lambda b: b["type"],
)
def test_it_compiles_proven(world, backend, capsys):
    """The gate compares with transformers on the merged weights; without the adapter the artifact is another."""
    write_recipe(world, backend)
    rng = np.random.default_rng(0)
    table = {
        f"{TABLE}.lora_embedding_A": 0.05 * rng.standard_normal((4, 512)).astype(np.float32),
        f"{TABLE}.lora_embedding_B": rng.standard_normal((64, 4)).astype(np.float32),
    }
    modules = ["layers.1.self_attn.q_proj", "layers.0.mlp.up_proj", "embed_tokens"]  # those PEFT is to read
    write_adapter(world / "a", factors() | table, base_model_name_or_path="base", target_modules=modules)
    assert main(["compile", "recipe.yaml"]) == 0
    artifact = Artifact.open("workspace/x")
    (record,) = artifact.manifest.checkpoint.adapters
    assert (record.path, record.weight) == ("a", 1.0)
    assert record.fingerprint == Checkpoint.open("base", "a").adapters[0].adapter.fingerprint()
    assert artifact.manifest.parity.passed
    assert artifact.manifest.model.tie_word_embeddings is False
    assert main(["parity", "workspace/x"]) == 0
    (world / "a").rename(world / "moved")
    assert main(["parity", "workspace/x"]) == 2
    assert "its adapter a is not there" in capsys.readouterr().err
    assert main(["parity", "workspace/x", "--adapter", "moved"]) == 0
    assert main(["parity", "workspace/x", "--adapter", "moved:0.5"]) == 2
    assert "is not the checkpoint and adapter this artifact was made from" in capsys.readouterr().err
    (world / "text").write_text("a text " * 400)
    ppl = ["--task", "ppl", "--text", "text", "--windows", "2", "--seqlen", "16", "--no-record", "--json"]
    assert main(["eval", "workspace/x", *ppl, "ofartifact", "--adapter", "moved", "--against", "hf"]) == 0
    assert main(["eval", "base", *ppl, "merged", "--adapter", "moved"]) == 0
    assert main(["eval", "base", *ppl, "own"]) == 0
    found = {name: json.loads((world / name).read_text()) for name in ("ofartifact", "merged", "own")}
    assert found["ofartifact"]["perplexity"] == pytest.approx(found["merged"]["perplexity"], rel=1e-5)
    assert abs(found["own"]["perplexity"] / found["merged"]["perplexity"] - 1) > 1e-3
