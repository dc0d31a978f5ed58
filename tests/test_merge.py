"""`gemma-deploy merge`: what it writes is what transformers loads, rounded once; whole or not at all."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from gemma_deploy import merge, paths
from gemma_deploy.checkpoint import AdapterRef, Checkpoint
from gemma_deploy.cli import cli, main
from gemma_deploy.errors import CheckpointError, ParamsError, PreflightError, UsageError
from gemma_deploy.testing import write_tiny_checkpoint
from gemma_deploy.text import Tokenizer
from gemma_deploy.workdir import MARK
from tests.calibration.make import write_tokenizer
from tests.checkpoint.adapters.make import PREFIX, pair, write_adapter
from tests.checkpoint.test_gguf import write_gguf
from tests.killing import killer

Q = "model.layers.1.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"
SHAPES = {Q: (128, 64), DOWN: (64, 160)}


@pytest.fixture
def world(tmp_path):
    """A tiny Gemma 2 in bfloat16 with a generation config, and an adapter of two linears."""
    base = write_tiny_checkpoint(tmp_path / "base", "gemma2")
    (base / "generation_config.json").write_text('{"eos_token_id": [1, 107]}')
    tensors = {}
    for seed, (name, shape) in enumerate(SHAPES.items()):
        tensors |= pair(PREFIX + name, shape, seed=seed)
    write_adapter(tmp_path / "adapter", tensors, base_model_name_or_path="base")
    return tmp_path


def test_it_is_rounded_once(world):
    merged = merge(world / "base", world / "adapter", world / "out")
    assert (merged.dtype, merged.shards, merged.path) == ("bfloat16", ("model.safetensors",), world / "out")
    written, own = load_file(world / "out/model.safetensors"), load_file(world / "base/model.safetensors")
    assert written.keys() == own.keys()
    opened = Checkpoint.open(world / "base", world / "adapter")
    for name, tensor in written.items():
        if name.removesuffix(".weight") in SHAPES:
            exact = torch.from_numpy(opened.rows(name, 0, len(tensor)))
            assert torch.equal(tensor, exact.to(torch.bfloat16))
            assert not torch.equal(tensor, own[name])
        else:
            assert torch.equal(tensor, own[name])


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_other_dtypes(world, dtype):
    merge(world / "base", AdapterRef(world / "adapter", 0.5), world / "out", dtype=dtype)
    opened = Checkpoint.open(world / "base", [AdapterRef(world / "adapter", 0.5)])
    kind = {"fp32": torch.float32, "fp16": torch.float16}[dtype]
    for name, tensor in load_file(world / "out/model.safetensors").items():
        assert torch.equal(tensor, torch.from_numpy(opened.rows(name, 0, len(tensor))).to(kind))
    model = AutoModelForCausalLM.from_pretrained(world / "out")
    assert model.dtype == kind
    assert json.loads((world / "out/config.json").read_text())["dtype"] == str(kind).removeprefix("torch.")


def test_shards_are_those_of_transformers(world):
    merged = merge(world / "base", world / "adapter", world / "out", shard_bytes=150_000)
    count = len(merged.shards)
    assert count > 2
    assert merged.shards[0] == f"model-00001-of-{count:05d}.safetensors"
    index = json.loads((world / "out/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(merged.shards)
    assert index["metadata"]["total_size"] == merged.nbytes
    assert all((world / "out" / name).stat().st_size < 170_000 for name in merged.shards)
    model = AutoModelForCausalLM.from_pretrained(world / "out", dtype=torch.float32)
    whole = merge(world / "base", world / "adapter", world / "whole")
    state, one = model.state_dict(), load_file(whole.path / "model.safetensors")
    assert all(torch.equal(state[name], tensor.float()) for name, tensor in one.items())
    assert Checkpoint.open(world / "out").weights_fingerprint() != Checkpoint.open(world / "base").weights_fingerprint()
    saved = model.to(torch.bfloat16)
    saved.save_pretrained(world / "theirs", max_shard_size="150KB")
    theirs = json.loads((world / "theirs/model.safetensors.index.json").read_text())
    assert theirs["weight_map"].keys() == index["weight_map"].keys()
    assert theirs["metadata"].keys() == index["metadata"].keys()


def test_config_generation_config_and_tokenizer_come_along(world):
    demo = paths.demo_checkpoint_dir()
    opened = Checkpoint.open(demo)
    rows, width = opened.tensors[f"{Q}.weight"].shape
    adapter = write_adapter(world / "demo", pair(PREFIX + Q, (rows, width)))
    shutil.copy(demo / "tokenizer_config.json", adapter)
    shutil.copy(demo / "tokenizer.json", adapter)
    (adapter / "chat_template.jinja").write_text("{{ 'mine' }}")
    result = CliRunner().invoke(cli, ["merge", "demo", str(adapter), str(world / "out"), "--dtype", "fp32"])
    assert result.exit_code == 0, result.output
    assert "the tokenizer is the one beside the adapter" in result.output
    assert f"merged  {world / 'out'}" in result.output
    tokenizer = AutoTokenizer.from_pretrained(world / "out")
    assert tokenizer.chat_template == "{{ 'mine' }}"
    assert not any(file.is_symlink() for file in (world / "out").rglob("*"))
    assert sorted(file.name for file in (world / "out").iterdir() if file.suffix in (".journal", ".partial")) == []
    assert Checkpoint.open(world / "out").config.eos_token_ids == opened.config.eos_token_ids


def test_a_head_of_its_own_is_written(world):
    head = np.random.default_rng(0).standard_normal((512, 64), np.float32)
    adapter = write_adapter(world / "head", {f"{PREFIX}lm_head.weight": head}, modules_to_save=["lm_head"])
    merge(world / "base", adapter, world / "out", dtype="fp32")
    model = AutoModelForCausalLM.from_pretrained(world / "out")
    assert model.config.tie_word_embeddings is False
    np.testing.assert_array_equal(model.lm_head.weight.detach().numpy(), head)
    own = Checkpoint.open(world / "base").rows("model.embed_tokens.weight", 0, 512)
    np.testing.assert_array_equal(model.model.embed_tokens.weight.detach().numpy(), own)


def test_it_replaces_nothing(world):
    (world / "out").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        merge(world / "base", world / "adapter", world / "out")
    assert list((world / "out").iterdir()) == []
    with pytest.raises(UsageError, match="there is no dtype 'int8'"):
        merge(world / "base", world / "adapter", world / "other", dtype="int8")


def left(world):
    return sorted(file.name for file in world.iterdir())


def test_what_is_refused_leaves_nothing(world, monkeypatch):
    before = left(world)
    with pytest.raises(CheckpointError, match="no such file"):
        merge(world / "base", world / "nowhere", world / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 0, 10**6))
    with pytest.raises(PreflightError, match="do not fit on the disk"):
        merge(world / "base", world / "adapter", world / "out")
    assert left(world) == before


def test_a_tokenizer_is_built_where_something_depends_on_it(world, monkeypatch):
    """With the vocabulary of a Gemma 3 that takes a second; a token that the model lacks must still be found."""
    built = []
    right = Tokenizer.of
    monkeypatch.setattr(
        Tokenizer, "of", lambda checkpoint: built.append(checkpoint.tokenizer_dir()) or right(checkpoint)
    )
    write_tokenizer(world / "base")
    merge(world / "base", world / "adapter", world / "plain")
    assert built == []
    assert (world / "plain/tokenizer.json").read_bytes() == (world / "base/tokenizer.json").read_bytes()
    write_tokenizer(world / "adapter")
    file = world / "adapter/tokenizer.json"
    content = json.loads(file.read_text())
    plain = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    content["added_tokens"] += [{"id": 400 + at, "content": f"<more{at}>", **plain} for at in range(200)]
    file.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="has tokens that the model lacks: '<more1"):
        merge(world / "base", world / "adapter", world / "out")
    assert built[0] == world / "adapter"
    assert not (world / "out").exists()
    assert not (world / "out.partial").exists()


def test_what_overflows_is_named(world):
    tensors = pair(PREFIX + Q, SHAPES[Q])
    tensors[f"{PREFIX}{Q}.lora_B.weight"][5] = 3e38
    adapter = write_adapter(world / "large", tensors)
    with pytest.raises(ParamsError, match=rf"{Q}.weight: row 5 holds (infinity|NaN)"):
        merge(world / "base", adapter, world / "out")
    assert not (world / "out").exists()


def killed(world, adapter):
    """Leave half of a merge behind."""
    code = (
        "import os, signal, sys\n"
        "from gemma_deploy import merge\n"
        "def tick(done, whole):\n"
        "    if done > whole / 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "merge(*sys.argv[1:], shard_bytes=150_000, workers=1, progress=tick)\n"
    )
    words = [sys.executable, "-c", code, *map(str, (world / "base", adapter, world / "out"))]
    done = subprocess.run(words, env={**os.environ, "PYTHONPATH": ":".join(sys.path)}, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (world / "out").exists()


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_killed_run_is_continued(world):
    expected = merge(world / "base", world / "adapter", world / "expected", shard_bytes=150_000)
    killed(world, world / "adapter")
    written = (world / "out.partial" / expected.shards[0]).stat().st_mtime_ns
    merge(world / "base", world / "adapter", world / "out", shard_bytes=150_000)
    assert (world / "out" / expected.shards[0]).stat().st_mtime_ns == written
    assert not (world / "out.partial").exists()
    assert files(world / "out") == files(world / "expected")


def test_what_another_adapter_left_is_not_continued(world):
    other = write_adapter(world / "other", pair(PREFIX + Q, SHAPES[Q], seed=9))
    killed(world, other)
    merge(world / "base", world / "adapter", world / "out", shard_bytes=150_000)
    merge(world / "base", world / "adapter", world / "expected", shard_bytes=150_000)
    assert files(world / "out") == files(world / "expected")


@pytest.fixture
def with_text(world):
    """The adapter brings a tokenizer, a larger file than the weights."""
    write_tokenizer(world / "adapter")
    file = world / "adapter/tokenizer.json"
    file.write_bytes(file.read_bytes() + b" " * 800_000)
    assert (world / "base/model.safetensors").stat().st_size < 700_000
    return world


@contextmanager
def no_file_above(limit):
    """As a full disk: a write beyond `limit` bytes of a file fails with EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def full_after(count):
    """The disk is full at the n-th write of weights, when some of them are written."""
    left, pwrite = [count], os.pwrite

    def wrapped(fd, data, offset):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(fd, data, offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", wrapped)
        yield


@pytest.mark.parametrize(
    ("full", "named"),
    [
        (lambda: no_file_above(1000), "model.safetensors"),  # no room is reserved
        (lambda: full_after(4), "model.safetensors"),
        (lambda: full_after(20), "model.safetensors"),
        (lambda: no_file_above(700_000), "out.partial/."),  # a file beside the weights, under its temporary name
    ],
    ids=["reserving", "early", "late", "tokenizer"],
)
def test_a_full_disk_is_one_sentence_and_the_same_command_goes_on(with_text, capsys, full, named):
    words = ["merge", *map(str, (with_text / "base", with_text / "adapter", with_text / "out"))]
    with full():
        assert main(words) == 1
    said = capsys.readouterr().err
    sentence = (
        r"error: (\S+): cannot be written: (?:No space left on device|File too large)\n"
        r"  next: make room there and run the same command again: it continues\n"
    )
    (place,) = re.findall(sentence, said)
    assert place.startswith(f"{with_text / 'out.partial'}")
    assert named in place
    assert said.count("\n") == 2 + said.count("\nmerge ") + said.startswith("merge ")  # and lines of progress
    assert not (with_text / "out").exists()
    assert main(words) == 0
    assert not (with_text / "out.partial").exists()
    merge(with_text / "base", with_text / "adapter", with_text / "expected")
    assert files(with_text / "out") == files(with_text / "expected")


def work(world, out):
    """What is killed."""
    merge(Path(world) / "base", Path(world) / "adapter", out, shard_bytes=400_000)


@pytest.mark.slow
def test_killed_at_every_step(with_text):
    """SIGKILL before each sync, rename and deletion: OUT is whole or not there, and the same call makes it."""
    work(with_text, with_text / "expected")
    expected = files(with_text / "expected")
    seen = set()
    with killer("tests.test_merge:work") as run:
        count = run(1_000_000, str(with_text), str(with_text / "first"))
        assert files(with_text / "first") == expected
        for at in range(count):
            out = with_text / f"out{at}"
            assert run(at, str(with_text), str(out)) == 0
            seen.add(out.exists())
            if out.exists():  # the kill came after the last rename; a mark does no harm there
                assert files(out).items() >= expected.items()
                assert files(out).keys() - expected.keys() <= {MARK}
                continue
            work(with_text, out)
            assert files(out) == expected
            assert [file.name for file in with_text.iterdir() if out.name in file.name] == [out.name]
            shutil.rmtree(out)
    assert count > 30
    assert seen == {True, False}


def test_a_gguf_file_gives_its_ids(world):
    """As staging writes them: transformers pads with what the file says, not with the end token."""
    base = json.loads((world / "base" / "config.json").read_text())
    floats = {name: value.float().numpy() for name, value in load_file(world / "base" / "model.safetensors").items()}
    write_gguf(world / "base.gguf", base, floats)
    merge(world / "base.gguf", world / "adapter", world / "out")
    ids = json.loads((world / "out" / "generation_config.json").read_text())
    assert ids == {"bos_token_id": 2, "eos_token_id": [1], "pad_token_id": 0}
