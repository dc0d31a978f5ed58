"""`gemma-deploy run` on an artifact as `compile` leaves it."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml

from gemma_deploy.backends.tvm_vacc.runner import StaticRunner
from gemma_deploy.cli import main
from gemma_deploy.compile import compile_recipe
from gemma_deploy.recipe import Recipe
from gemma_deploy.runtime import Tokenizer
from gemma_deploy.testing import write_tiny_checkpoint
from tests.runtime.make import write_tokenizer


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    checkpoint = write_tiny_checkpoint(root / "checkpoint", "gemma")
    write_tokenizer(checkpoint)
    recipe = {
        "name": "tiny",
        "frontend": {"checkpoint": str(checkpoint), "shape": {"input_ids": [[32], [64]]}},
        "parity": {"prompt_tokens": 8, "decode_tokens": 4},
        "backend": {"dtype": "int8"},
        "workspace": {"path": str(root / "workspace")},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return compile_recipe(Recipe.load(root / "recipe.yaml"), parity=False).path


def run(capfd, *arguments):
    code = main(["run", *map(str, arguments)])
    out, err = capfd.readouterr()
    return code, out, err


def test_text_goes_to_stdout_and_statistics_to_stderr(artifact, capfd):
    code, out, err = run(capfd, artifact, "-p", "the list", "--max-new-tokens", 9, "--threads", 1, "--stats")
    assert (code, out[:8], out[-1]) == (0, "the list", "\n")
    assert "prompt tokens in" in err
    assert "9 tokens at" in err
    assert err.endswith("--max-new-tokens is reached\n")
    again = run(capfd, artifact, "-p", "the list", "-n", 9, "--threads", 1)
    assert again == (0, out, "")


def test_strict_and_seeded_runs(artifact, capfd):
    arguments = [artifact, "-p", "the", "-n", 12, "--threads", 1, "--temperature", 1.5, "--top-k", 50, "--top-p", 0.95]
    texts = [run(capfd, *arguments, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    code, out, _ = run(capfd, *arguments, "--seed", 1, "--strict")
    assert code == 0
    assert out.startswith("the")


def test_prompt_from_standard_input(artifact):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "gemma_deploy.cli", "run", str(artifact), "-p", "-", "-n", "4", "--threads", "1"]
    done = subprocess.run(command, input="the list\n", capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout[:8], done.stderr) == (0, "the list", "")


def test_chat_answers_without_repeating_the_prompt(artifact, capfd, monkeypatch):
    prompts = []
    prefill = StaticRunner.prefill
    monkeypatch.setattr(StaticRunner, "prefill", lambda self, ids: prompts.append(ids) or prefill(self, ids))
    code, out, err = run(capfd, artifact, "--chat", "-p", "user", "-n", 3, "--threads", 1)
    assert (code, "user" in out, err) == (0, False, "")
    assert prompts == [[Tokenizer(artifact).encode_chat([{"role": "user", "content": "user"}])]]


def test_chat_needs_a_template(artifact, capfd, tmp_path):
    copy = shutil.copytree(artifact, tmp_path / "copy")
    (copy / "chat_template.jinja").unlink()
    code, out, err = run(capfd, copy, "--chat", "-p", "the")
    assert (code, out, "has no chat template" in err) == (2, "", True)


def test_ctrl_c_ends_the_line_and_the_program(artifact, capfd, monkeypatch):
    steps = StaticRunner.step

    def interrupted(runner, tokens):
        if runner.position == 35:
            raise KeyboardInterrupt
        return steps(runner, tokens)

    monkeypatch.setattr(StaticRunner, "step", interrupted)
    code, out, err = run(capfd, artifact, "-p", "the", "--threads", 1, "--stats")
    assert (code, out[:3], out[-1]) == (130, "the", "\n")
    assert "; 4 tokens at" in err
    assert err.endswith("; interrupted\n")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["-p", "x" * 40], 2, "the prompt has 41 tokens, this artifact takes 32 at most"),
        (["-p", "x", "--top-p", "2", "--temperature", "-1"], 2, "  - top_p 2.0: above 0, up to 1 (all tokens)"),
        (["-p", "x", "-n", "0"], 2, "Invalid value for '-n'"),
        ([], 2, "Missing option '-p'"),
    ],
)
def test_bad_requests(artifact, capfd, arguments, code, message):
    got, out, err = run(capfd, artifact, *arguments)
    assert (got, out, message in err, "Traceback" in err) == (code, "", True, False), err


def test_damaged_artifacts(artifact, capfd, tmp_path):
    copy = shutil.copytree(artifact, tmp_path / "copy")

    def error(expected=1):
        code, out, err = run(capfd, copy, "-p", "x")
        assert (code, out, "Traceback" in err) == (expected, "", False)
        return err

    (copy / "tokenizer.json").unlink()
    assert "tokenizer.json: the tokenizer is missing" in error()
    shutil.copy(artifact / "tokenizer.json", copy)
    (copy / "params.safetensors").unlink()
    assert "params.safetensors: is missing" in error()
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "format_version": 99}))
    assert "format_version is 99" in error()
    shutil.rmtree(copy)
    assert "there is no such directory" in error(2)


def test_help_has_examples(capfd):
    code, out, _ = run(capfd, "--help")
    assert code == 0
    assert 'gemma-deploy run workspace/NAME --chat -p "Why is the sky blue?" --stats' in out
