"""Staging: what lands in the directory, what is refused, and that nothing is left half-written."""

import json
import logging
import math
import os

import numpy as np
import pytest

from gemma_deploy import staging
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.errors import CheckpointError, DeployError, UsageError
from gemma_deploy.staging import stage_checkpoint
from gemma_deploy.workdir import MARK
from tests.checkpoint.make import config, weights, write_checkpoint
from tests.checkpoint.test_gguf import raw_config, write_gguf

ADDITIONS = {
    "auto_map": {
        "AutoConfig": "configuration_gemma_vacc.GemmaConfig",
        "AutoModel": "modeling_gemma_vacc.GemmaModel",
        "AutoModelForCausalLM": "modeling_gemma_vacc.GemmaForCausalLM",
        "AutoModelForSequenceClassification": "modeling_gemma_vacc.GemmaForSequenceClassification",
    },
    "iter_num": None,
    "insert_slice": False,
    "embed_scale": "exact",
}
FILES = ("configuration_gemma_vacc.py", "modeling_gemma_vacc.py", "layers_vacc.py")


@pytest.fixture
def source(tmp_path):
    """A stand-in for source_code/, so that these tests do not depend on the modeling."""
    directory = tmp_path / "source_code"
    directory.mkdir()
    for name in FILES:
        (directory / name).write_text(f"# {name}\n")
    return directory


@pytest.fixture
def checkpoint(tmp_path):
    write_checkpoint(tmp_path / "ck", config(note="kept as it is: é"), shards=2)
    (tmp_path / "ck" / "tokenizer.json").write_text("{}")
    (tmp_path / "ck" / "generation_config.json").write_text("{}")
    return tmp_path / "ck"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def left_behind(out):
    return sorted(path.name for path in out.parent.glob("out*"))


def test_staged_directory_is_complete(checkpoint, source, out):
    assert stage_checkpoint(checkpoint, out, source_code=source) == out
    links = {path.name for path in out.iterdir() if path.is_symlink()}
    assert links == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "generation_config.json",
        "tokenizer.json",
    }
    assert {path.name for path in out.iterdir()} - links == {
        "config.json",
        *FILES,
    }
    own = json.loads((checkpoint / "config.json").read_text())
    assert json.loads((out / "config.json").read_text()) == own | ADDITIONS
    assert left_behind(out) == ["out"]
    assert set(Checkpoint.open(out).tensors) == set(Checkpoint.open(checkpoint).tensors)


def test_without_weights_everything_else_is_there(checkpoint, source, out):
    stage_checkpoint(checkpoint, out, source_code=source)
    bare = stage_checkpoint(checkpoint, out.with_name("bare"), source_code=source, weights=False)
    left_out = {file.name for file in out.iterdir()} - {file.name for file in bare.iterdir()}
    assert left_out == {*(file.name for file in checkpoint.glob("*.safetensors")), "model.safetensors.index.json"}


def test_the_checkpoint_itself_is_untouched(checkpoint, source, out):
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    stage_checkpoint(checkpoint, out, source_code=source)
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before


def test_relative_paths_make_links_that_hold(checkpoint, source, out, monkeypatch):
    monkeypatch.chdir(checkpoint.parent)
    stage_checkpoint("ck", "out", source_code=source)
    monkeypatch.chdir("/")
    assert Checkpoint.open(out).config.vocab_size == 40


def test_existing_out_needs_force(checkpoint, source, out):
    stage_checkpoint(checkpoint, out, source_code=source)
    (out / "stale").write_text("")
    with pytest.raises(UsageError, match="exists already"):
        stage_checkpoint(checkpoint, out, source_code=source)
    assert (out / "stale").exists()
    stage_checkpoint(checkpoint, out, force=True, source_code=source)
    assert not (out / "stale").exists()
    assert checkpoint.exists()


def test_force_deletes_nothing_that_stage_did_not_make(checkpoint, source, out):
    out.mkdir()
    (out / "thesis.txt").write_text("")
    for target in (out, checkpoint, checkpoint.parent):
        with pytest.raises(UsageError, match="--force does not delete it"):
            stage_checkpoint(checkpoint, target, force=True, source_code=source)
    assert (out / "thesis.txt").exists()


def test_staged_directory_is_not_staged_over_itself(checkpoint, source, out):
    stage_checkpoint(checkpoint, out, source_code=source)
    with pytest.raises(UsageError):
        stage_checkpoint(out, out, force=True, source_code=source)
    assert Checkpoint.open(out).tensors


def test_leftovers_of_a_killed_run_are_replaced(checkpoint, source, out):
    partial = out.with_name("out.partial")
    partial.mkdir()
    (partial / "old").write_text("")
    (partial / MARK).write_text('{"made_by": "gemma-deploy stage", "key": null, "whole": false}')
    stage_checkpoint(checkpoint, out, source_code=source)
    assert left_behind(out) == ["out"]
    assert not (out / "old").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"), ValueError("bug")])
def test_nothing_half_written(checkpoint, source, out, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(staging, "_write_json", fail)
    kind = CheckpointError if isinstance(error, OSError) else type(error)
    with pytest.raises(kind) as caught:
        stage_checkpoint(checkpoint, out, source_code=source)
    assert left_behind(out) == []
    if kind is CheckpointError:
        assert "cannot be written: No space left on device" in str(caught.value)
        assert "make room" in str(caught.value)


def test_unwritable_place(checkpoint, source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        stage_checkpoint(checkpoint, tmp_path / "file" / "out", source_code=source)


def test_incomplete_installation_is_said_so(checkpoint, source, out):
    (source / "modeling_gemma_vacc.py").unlink()
    with pytest.raises(DeployError, match=r"modeling_gemma_vacc\.py"):
        stage_checkpoint(checkpoint, out, source_code=source)


def test_copies_where_links_are_impossible(checkpoint, source, out, monkeypatch):
    def refuse(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refuse)
    monkeypatch.setattr(os, "link", refuse)
    stage_checkpoint(checkpoint, out, source_code=source)
    assert not any(path.is_symlink() for path in out.iterdir())
    assert set(Checkpoint.open(out).tensors) == set(Checkpoint.open(checkpoint).tensors)


def test_missing_tokenizer_is_only_a_warning(tmp_path, source, out, caplog):
    write_checkpoint(tmp_path / "bare")
    with caplog.at_level(logging.WARNING):
        stage_checkpoint(tmp_path / "bare", out, source_code=source)
    assert "no tokenizer" in caplog.text


def test_a_half_copied_tokenizer_is_copied_again(checkpoint, tmp_path):
    (checkpoint / "tokenizer.json").write_text('{"whole": true}')
    (tmp_path / "tokenizer.json").write_text('{"who')  # of a run that was killed
    staging.write_tokenizer(Checkpoint.open(checkpoint), tmp_path, link=False)
    assert (tmp_path / "tokenizer.json").read_text() == '{"whole": true}'


def test_gguf_becomes_float32_safetensors(tmp_path, source, out, monkeypatch):
    monkeypatch.setattr(staging, "BLOCK_BYTES", 1000)
    raw = raw_config("gemma")
    write_gguf(tmp_path / "m.gguf", raw, weights(raw))
    told = []
    stage_checkpoint(tmp_path / "m.gguf", out, source_code=source, progress=lambda *step: told.append(step))
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1] == sum(4 * math.prod(weight.shape) for weight in weights(raw).values())
    staged, original = Checkpoint.open(out), Checkpoint.open(tmp_path / "m.gguf")
    assert staged.config == original.config
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [1]
    for name, info in original.tensors.items():
        assert staged.tensors[name].dtype == "float32"
        assert np.array_equal(staged.rows(name, 0, info.shape[0]), original.rows(name, 0, info.shape[0]))


@pytest.mark.parametrize("model_type", ["gemma", "gemma3_text"])
@pytest.mark.parametrize("form", ["safetensors", "gguf"])
def test_transformers_loads_it_and_computes_the_stock_numbers(tmp_path, out, model_type, form):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    raw = raw_config(model_type)
    tensors = write_checkpoint(tmp_path / "ck", raw)
    write_gguf(tmp_path / "m.gguf", raw, tensors)
    stage_checkpoint(tmp_path / ("m.gguf" if form == "gguf" else "ck"), out)
    patched = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32)
    stock = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ck", dtype=torch.float32, attn_implementation="eager"
    )
    assert type(patched).__module__.startswith("transformers_modules")
    ids = torch.arange(11)[None]
    with torch.no_grad():
        got, wanted = patched(ids).logits, stock(ids).logits
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()
