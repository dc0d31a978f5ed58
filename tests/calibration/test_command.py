"""`gemma-deploy calibrate` from outside: what it prints, where it writes, how it ends."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from gemma_deploy import progress
from gemma_deploy.calibration.mix import MixEntry
from gemma_deploy.calibration.picture import largest
from gemma_deploy.calibration.store import Calibration, Range
from gemma_deploy.cli import cli, main
from gemma_deploy.commands import calibrate as command_file
from tests.calibration import make

RECIPE = """
name: x
frontend:
  checkpoint: {checkpoint}
  shape: {{input_ids: [[16], [32]]}}
  model_kwargs: {{embed_scale: bf16}}
dataset: {{name: alpaca, path: {path}, nsamples: 2, seqlen: 32}}
backend: {{dtype: fp32}}
workspace: {{path: {workspace}}}
"""


def run(*args):
    """Exit code, output, errors and the result's directory."""
    result = CliRunner().invoke(cli, ["calibrate", *map(str, args)], catch_exceptions=False)
    place = re.search(r"^calibration  (.*)$", result.output, re.M)
    return result, Calibration.open(place[1]) if place else None


def test_it_prints_a_table_and_progress_and_says_where_the_result_is(checkpoint_path, c4_file, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "SHORT_SECONDS", 0)
    options = ["--checkpoint", checkpoint_path, "--workspace", tmp_path / "w", "--nsamples", 3, "--seqlen", 24]
    result, made = run("--dataset", "c4", "--path", c4_file, *options)
    assert result.exit_code == 0
    assert made.path.parent == tmp_path / "w" / "calib"
    assert made.samples.shape == (3, 24)
    table = result.stdout
    for kind in ("q_proj.in", "o_proj.in", "gate_proj.in", "down_proj.in", "layers.1.out", "lm_head.in"):
        assert kind in table
    peak = max(made.ranges["model.layers.1.out"].absmax, made.ranges["model.layers.0.out"].absmax)
    assert f"{peak:.3g}" in table
    assert "3 windows of 24 tokens" in table
    lines = result.stderr.splitlines()
    assert lines[:2] == ["calibrate ...", "calibrate   17 %  1 of 6 windows through layers"]
    assert lines[-1] == "calibrate   83 %  5 of 6 windows through layers"
    again, found = run("--dataset", "c4", "--path", c4_file, *options)
    assert "nothing has changed" in again.stdout
    assert again.stderr == "calibrate ...\n"
    assert found.path == made.path
    assert "nothing has changed" not in run("--dataset", "c4", "--path", c4_file, *options, "--force")[0].stdout


@pytest.mark.parametrize("dataset", ["c4", "ceval", "alpaca"])
def test_the_bundled_samples_need_no_further_option(checkpoint_path, dataset, tmp_path):
    result, made = run("--dataset", dataset, "--checkpoint", checkpoint_path, "--workspace", tmp_path)
    assert result.exit_code == 0
    assert made.samples.shape == (32, 128)
    assert made.record["inputs"]["sources"][0]["name"] == dataset


def test_a_recipe_gives_what_the_options_leave_out(checkpoint_path, c4_file, tmp_path):
    alpaca = make.write_alpaca(tmp_path / "alpaca.json")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE.format(checkpoint=checkpoint_path, path=alpaca, workspace=tmp_path / "w"))
    _, made = run("--recipe", recipe)
    assert made.path.parent == tmp_path / "w" / "calib"
    assert made.samples.shape == (2, 32)
    assert made.record["inputs"]["sources"][0]["file"] == "alpaca.json"
    assert made.record["inputs"]["embed_scale"] == "bf16"
    _, made = run("--recipe", recipe, "--dataset", "c4", "--nsamples", 4, "--seed", 7)  # not the recipe's alpaca file
    assert made.record["inputs"]["sources"][0]["file"] == "c4_sample.json.gz"
    assert made.record["inputs"]["windows"] == {"nsamples": 4, "seqlen": 32, "seed": 7}


def test_a_file_gets_the_full_number_of_windows_by_default():
    for context, seqlen in ((8192, 1024), (512, 512)):
        request = command_file._request(None, "c4", "x.json.gz", None, None, 0, context)
        assert request.mix.parts == (MixEntry("c4", None, Path("x.json.gz")),)
        assert (request.nsamples, request.seqlen) == (128, seqlen)


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        ([], 2, "Missing option '--dataset'"),
        (["--dataset", "pile"], 2, "'pile' is not one of"),
        (["--dataset", "c4", "--nsamples", "0"], 2, "0 is not in the range"),
        (["--dataset", "c4", "--checkpoint", "/none"], 1, "there is no such file or directory"),
        (["--dataset", "c4", "--checkpoint", "CHECKPOINT", "--path", "/none"], 1, "/none: cannot be read"),
        (["--dataset", "c4", "--checkpoint", "CHECKPOINT", "--seqlen", "513"], 2, "longer than the model's context"),
        (["--dataset", "c4", "--checkpoint", "CHECKPOINT", "--nsamples", "9999"], 1, "too short"),
    ],
)
def test_it_ends_with_one_message_and_the_right_code(checkpoint_path, tmp_path, capsys, args, code, said):
    args = [str(checkpoint_path) if arg == "CHECKPOINT" else arg for arg in args]
    assert main(["calibrate", *args, "--workspace", str(tmp_path / "w")]) == code
    err = capsys.readouterr().err
    assert said in err
    assert "Traceback" not in err
    assert not list((tmp_path / "w").rglob("*.*"))


def test_help_has_examples():
    result = CliRunner().invoke(cli, ["calibrate", "--help"])
    assert "gemma-deploy calibrate --dataset c4\n" in result.output
    assert "ceval-exam.zip" in result.output


def test_finding_a_result_again_needs_no_torch(checkpoint_path, c4_file, tmp_path):
    args = ["calibrate", "--dataset", "c4", "--path", c4_file, "--checkpoint", checkpoint_path, "--workspace", tmp_path]
    args = [str(arg) for arg in [*args, "--nsamples", 2, "--seqlen", 16]]
    assert main(args) == 0
    code = f"import sys; from gemma_deploy.cli import main; assert main({args}) == 0; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "nothing has changed" in done.stdout


def test_the_table_takes_the_largest_of_each_kind():
    import numpy as np

    def flat(value):
        return Range(np.array([-value, 0, 0], np.float32), np.array([0, 1, 1], np.float32))

    ranges = {f"model.layers.{n}.out": flat(float(10 + n)) for n in range(4)} | {"lm_head.in": flat(65504.0 * 2)}
    rows = largest(ranges, 2)
    assert [row.point for row in rows] == ["model.layers.3.out", "model.layers.2.out", "lm_head.in"]
    assert (rows[0].absmax, rows[0].channel, rows[0].outlier) == (13.0, 0, 13.0)
    assert rows[-1].headroom == 0.5
