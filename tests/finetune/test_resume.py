"""A run that was stopped goes on, from whole checkpoints alone, to the same result."""

import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

pytest.importorskip("trl")

from gemma_deploy.errors import UsageError
from gemma_deploy.finetune.checkpoints import WHOLE, is_whole, newest_whole, whole_checkpoints
from gemma_deploy.finetune.run import finetune
from tests.finetune.make import adapter_of, losses, settings, texts_file, tiny

LORA = {"r": 4, "alpha": 8, "dropout": 0.1}  # dropout draws random numbers at every step


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    root = tmp_path_factory.mktemp("base") / "gemma3"
    return tiny(root, "gemma3_text", num_hidden_layers=3, sliding_window_pattern=3)


def asked(folder, out, **sft):
    return settings(texts_file(folder), out, lora=LORA, sft={"max_steps": 6, "save_steps": 2, **sft}, validation=2)


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return finetune(asked(folder, folder / "out"), base)


def stop_at(step):
    def tick(done, total):
        if done == step:
            raise KeyboardInterrupt

    return tick


def interrupted(base, folder, step):
    with pytest.raises(KeyboardInterrupt):
        finetune(asked(folder, folder / "out"), base, progress=stop_at(step))
    return folder / "out.partial" / "checkpoints"


def same(result, whole):
    assert losses(result.outcome.log) == losses(whole.outcome.log)
    found, expected = adapter_of(result.adapter), adapter_of(whole.adapter)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    assert result.outcome.loss_before == whole.outcome.loss_before
    assert result.outcome.loss_after == whole.outcome.loss_after


def test_it_goes_on_to_the_same_result(base, whole, tmp_path):
    checkpoints = interrupted(base, tmp_path, 5)
    assert [one.name for one in whole_checkpoints(checkpoints)] == ["checkpoint-2", "checkpoint-4"]
    assert not (tmp_path / "out").exists()
    result = finetune(asked(tmp_path, tmp_path / "out"), base)
    assert result.outcome.resumed == 4
    same(result, whole)


def test_a_checkpoint_that_is_not_whole_is_passed_over(base, whole, tmp_path):
    checkpoints = interrupted(base, tmp_path, 5)
    file = checkpoints / "checkpoint-4" / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:100])
    result = finetune(asked(tmp_path, tmp_path / "out"), base)
    assert result.outcome.resumed == 2
    same(result, whole)


def test_other_settings_are_refused_with_what_differs(base, tmp_path):
    interrupted(base, tmp_path, 3)
    with pytest.raises(UsageError) as raised:
        finetune(asked(tmp_path, tmp_path / "out", learning_rate=2e-2, max_steps=8), base)
    assert "an unfinished run with other settings is in the way" in raised.value.what
    assert sorted(raised.value.problems) == [
        "sft.learning_rate: it was begun with 0.01, now it is 0.02",
        "sft.max_steps: it was begun with 6, now it is 8",
    ]
    assert (tmp_path / "out.partial" / "checkpoints" / "checkpoint-2").is_dir()


def test_what_is_whole(tmp_path):
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    (folder / "a").write_bytes(b"12")
    assert not is_whole(folder)
    (folder / WHOLE).write_text('{"a": 2}')
    assert is_whole(folder)
    (folder / "a").write_bytes(b"1")
    assert not is_whole(folder)
    assert newest_whole(tmp_path) is None
    assert not folder.exists()


PROGRAM = """
import resource, sys
from gemma_deploy.cli import main
if sys.argv[1] != "-":
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.exit(main(sys.argv[2:]))
"""


def start(base, folder, limit="-"):
    words = [
        *("finetune", "--checkpoint", str(base), "--data", str(texts_file(folder)), "--out", str(folder / "out")),
        *("--steps", "6", "--batch", "2", "--learning-rate", "0.01", "--r", "4", "--alpha", "8", "--dropout", "0.1"),
        *("--validation", "2", "--set", "save_steps=2", "--set", "use_cpu=true"),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, limit, *words], env=environment, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_kill_9_at_any_moment(base, whole, tmp_path):
    """Killed in the middle of each checkpoint, and in between; the same command ends in the same adapter."""
    checkpoints = tmp_path / "out.partial" / "checkpoints"
    for sign in ("checkpoint-2", "checkpoint-4/trainer_state.json", "checkpoint-6/adapter_model.safetensors"):
        process = start(base, tmp_path)
        while not (checkpoints / sign).exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "out").exists()
    assert start(base, tmp_path).wait() == 0
    found, expected = adapter_of(tmp_path / "out" / "adapter"), adapter_of(whole.adapter)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_a_disk_that_refuses_a_checkpoint_is_a_sentence(base, tmp_path):
    """A limit of file sizes stands for a full disk: the optimizer's states do not fit."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    process = start(base, tmp_path, "60000")
    said = process.communicate()[1]
    assert process.returncode == 1
    assert "the checkpoint of step 2 cannot be written" in said
    assert "Traceback" not in said
    assert not list((tmp_path / "out.partial" / "checkpoints").glob("checkpoint-*"))
    assert start(base, tmp_path).wait() == 0
