"""A compile that looks at text says in its manifest which, and does not take an artifact of other text for its own."""

import hashlib
import json

import pytest
import yaml

from gemma_deploy.calibration.pipeline import make_windows
from gemma_deploy.cli import main
from gemma_deploy.compile import plan_recipe
from gemma_deploy.job import Job
from gemma_deploy.recipe import Recipe
from gemma_deploy.stages.calibration import calibration_request, with_text
from tests.calibration import make


@pytest.fixture
def recipe_file(checkpoint_path, tmp_path):
    content = {
        "name": "x",
        "frontend": {"checkpoint": str(checkpoint_path), "shape": {"input_ids": [[16], [32]]}},
        "dataset": {"name": "c4:64,alpaca:32", "path": f"alpaca={make.write_alpaca(tmp_path / 'alpaca.json')}"},
        "backend": {"dtype": "fp16"},
        "workspace": {"path": str(tmp_path / "w")},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "r.yaml"


def test_the_manifest_holds_the_fingerprint_of_the_text(recipe_file, tmp_path, capsys):
    command = ["compile", str(recipe_file), "--no-parity"]
    assert main(command) == 0, capsys.readouterr().err
    said = json.loads((tmp_path / "w" / "x" / "manifest.json").read_text())["calibration"]
    assert [(one["name"], one["windows"], one["bundled"]) for one in said["sources"]] == [
        ("c4", 2, True),
        ("alpaca", 1, False),
    ]
    text = tmp_path / "alpaca.json"
    assert said["sources"][1]["sha256"] == hashlib.sha256(text.read_bytes()).hexdigest()
    assert said["windows"] == {"nsamples": 3, "seqlen": 32, "seed": 0}
    assert len(said["fingerprint"]) == len(said["tokenizer_sha256"]) == 64
    assert main(command) == 0
    make.write_alpaca(text, make.alpaca_entries(19))
    capsys.readouterr()
    assert main(command) == 1
    assert "holds an artifact of other inputs" in capsys.readouterr().err


def test_missing_text_is_told_before_work(recipe_file, tmp_path, capsys):
    (tmp_path / "alpaca.json").unlink()
    assert main(["compile", str(recipe_file)]) == 1
    assert "alpaca.json: cannot be read: No such file" in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


def test_int8_by_rounding_looks_at_no_text(recipe_file):
    recipe = Recipe.load(recipe_file, ["backend.dtype=int8"])
    assert calibration_request(Job.open(recipe)) is None


@pytest.mark.parametrize("kind", ["w8a16_gptq", "w8a16+kv8"])
def test_a_default_of_more_windows_than_there_are_is_told_as_what_there_is(recipe_file, tmp_path, monkeypatch, kind):
    """128 windows are the default; of a model with few tokens for a text, the bundled sample holds fewer."""
    monkeypatch.setattr("gemma_deploy.paths.calib_dir", lambda: tmp_path)
    make.write_c4(tmp_path / "c4_sample.json.gz")
    content = yaml.safe_load(recipe_file.read_text())
    del content["dataset"]
    content["backend"]["dtype"], content["frontend"]["quantize"] = "int8", {"type": kind}
    recipe_file.write_text(yaml.safe_dump(content))
    recipe = Recipe.load(recipe_file)
    job, request = with_text(Job.open(recipe))
    held = make_windows(job.checkpoint, request).ids.shape
    assert held[0] < recipe.dataset.nsamples == 128
    assert (job.dataset.nsamples, job.dataset.seqlen) == held
    assert (job.record["dataset"]["nsamples"], job.record["dataset"]["seqlen"]) == held  # what the manifest holds
    assert f"{held[0]} windows of {held[1]} tokens" in plan_recipe(recipe, out=tmp_path / "o").stages[0].what


def test_float16_looks_at_as_many_windows_as_its_estimate_says(recipe_file):
    """Two of c4 and one of alpaca, and one of random tokens; the recipe's numbers are those of the quantizer."""
    job, request = with_text(Job.open(Recipe.load(recipe_file)))
    assert job.record["dataset"]["nsamples"] == 96
    told = plan_recipe(Recipe.load(recipe_file)).stages[0].what
    said = f"{request.nsamples} windows of {request.seqlen} tokens"  # in the line about the text, too
    assert told == f"largest activations of {said}, and of one of random tokens"
    assert any(f"calibration text: {said}" in note for note in plan_recipe(Recipe.load(recipe_file)).notes)
