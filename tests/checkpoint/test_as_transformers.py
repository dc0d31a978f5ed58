"""Checkpoints that name or divide their tensors in other ways: what is opened is what transformers loads."""

import json
import os

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.errors import CheckpointError
from gemma_deploy.staging import stage_checkpoint
from gemma_deploy.testing import write_tiny_checkpoint

TABLE, HEAD, INDEX = "model.embed_tokens.weight", "lm_head.weight", "model.safetensors.index.json"
SIZES = {"num_hidden_layers": 2, "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48}


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """(tied) -> config.json's content and the tensors of a tiny Gemma 3 in bfloat16."""

    def get(tied=True):
        path = write_tiny_checkpoint(
            tmp_path_factory.mktemp("stock") / "ck", "gemma3_text", tie_word_embeddings=tied, **SIZES
        )
        return json.loads((path / "config.json").read_text()), load_file(path / "model.safetensors")

    return get


def write(path, config, files):
    """files: name in the checkpoint -> tensors; several get an index."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    for name, tensors in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        save_file({key: value.contiguous() for key, value in tensors.items()}, path / name, {"format": "pt"})
    if list(files) != ["model.safetensors"]:
        weight_map = {key: name for name, tensors in files.items() for key in tensors}
        (path / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return path


def bare(tensors):
    return {name.removeprefix("model."): value for name, value in tensors.items()}


def other_head(tensors, row, dtype=torch.bfloat16):
    """A head that differs from the table in one number of a row; None: in none."""
    head = tensors[TABLE].to(dtype).clone()
    if row is not None:
        head[row, 7] += 1
    return tensors | {HEAD: head}


def without(tensors, *names):
    return {name: value for name, value in tensors.items() if name not in names}


TOWER = {"vision_tower.a.bias": torch.zeros(2), "model.multi_modal_projector.w": torch.zeros(2, 3, dtype=torch.int8)}
SPELLINGS = {
    "as the model's": (True, lambda t: {"model.safetensors": t}),
    "head in the place of the table": (True, lambda t: {"model.safetensors": without(t, TABLE) | {HEAD: t[TABLE]}}),
    "base model": (True, lambda t: {"model.safetensors": bare(t)}),
    "base model and its head": (False, lambda t: {"model.safetensors": bare(t)}),
    "base model, some with the prefix": (
        True, lambda t: {"model.safetensors": bare(without(t, TABLE)) | {TABLE: t[TABLE]}},
    ),
    "base model, head in the place of the table": (
        True, lambda t: {"model.safetensors": bare(without(t, TABLE)) | {HEAD: t[TABLE]}},
    ),
    "shards in folders": (True, lambda t: {"a/1.safetensors": without(t, TABLE), "b/1.safetensors": {TABLE: t[TABLE]}}),
    "shards in a folder of a folder": (
        True, lambda t: {"a/b.c/1.safetensors": without(t, TABLE), "2.safetensors": {TABLE: t[TABLE]}},
    ),
    "leftovers of towers": (True, lambda t: {"model.safetensors": t | TOWER}),
    "a shard of leftovers alone": (True, lambda t: {"1.safetensors": t, "2.safetensors": TOWER}),
    "equal head": (True, lambda t: {"model.safetensors": other_head(t, None)}),
    "equal head in float32": (True, lambda t: {"model.safetensors": other_head(t, None, torch.float32)}),
    "other head, first row": (True, lambda t: {"model.safetensors": other_head(t, 0)}),
    "other head, last row": (True, lambda t: {"model.safetensors": other_head(t, -1)}),
    "other head in float32": (True, lambda t: {"model.safetensors": other_head(t, 50, torch.float32)}),
    "other head in a shard of its own": (
        True, lambda t: {"1.safetensors": t, "2.safetensors": {HEAD: other_head(t, 50)[HEAD]}},
    ),
    "base model with another head": (True, lambda t: {"model.safetensors": bare(other_head(t, 3))}),
}  # fmt: skip


def loaded(path, **kwargs):
    """transformers' own matrices, the head among them."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **kwargs)
    return model.state_dict()


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_tensor_is_the_one_that_transformers_loads(tmp_path, stock, spelling):
    tied, files = SPELLINGS[spelling]
    config, tensors = stock(tied)
    path = write(tmp_path / "ck", config, files(tensors))
    checkpoint, expected = Checkpoint.open(path), loaded(path)
    for name, info in checkpoint.tensors.items():
        np.testing.assert_array_equal(checkpoint.rows(name, 0, info.shape[0]), expected[name].numpy(), err_msg=name)
    head = checkpoint.config.head_weight
    np.testing.assert_array_equal(checkpoint.rows(head, 0, 96), expected[HEAD].numpy())
    apart = not torch.equal(expected[HEAD], expected[TABLE])
    assert checkpoint.config.tie_word_embeddings is not apart
    assert checkpoint.config_dict()["tie_word_embeddings"] is not apart
    assert set(checkpoint.tensors) == set(without(expected, *([] if apart else [HEAD])))


@pytest.mark.parametrize(
    "spelling",
    [
        "head in the place of the table",
        "base model, some with the prefix",
        "shards in folders",
        "a shard of leftovers alone",
        "other head, last row",
    ],
)
def test_what_is_staged_loads_the_same(tmp_path, stock, spelling):
    tied, files = SPELLINGS[spelling]
    config, tensors = stock(tied)
    path = write(tmp_path / "ck", config, files(tensors))
    staged = stage_checkpoint(path, tmp_path / "staged")
    expected, found = loaded(path), loaded(staged, trust_remote_code=True)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert Checkpoint.open(staged).config.tie_word_embeddings is Checkpoint.open(path).config.tie_word_embeddings


def notes(tmp_path, stock, spelling):
    tied, files = SPELLINGS[spelling]
    config, tensors = stock(tied)
    return Checkpoint.open(write(tmp_path / "ck", config, files(tensors))).notes


def test_what_is_read_otherwise_is_said(tmp_path, stock):
    said = notes(tmp_path / "1", stock, "leftovers of towers")
    assert said == (
        "1 tensor(s) of vision_tower are ignored: the text model does not read them",
        "1 tensor(s) of multi_modal_projector are ignored: the text model does not read them",
    )
    assert "the two are kept apart" in notes(tmp_path / "2", stock, "other head, last row")[0]
    assert "equals the token table" in notes(tmp_path / "3", stock, "equal head")[0]
    assert "without the prefix model." in notes(tmp_path / "4", stock, "base model")[0]
    assert "the file has it alone" in notes(tmp_path / "5", stock, "head in the place of the table")[0]
    assert notes(tmp_path / "6", stock, "as the model's") == ()


def test_what_nobody_knows_is_refused(tmp_path, stock):
    config, tensors = stock()
    twice = tensors | {"norm.weight": torch.zeros(32)}
    unknown = {"vision.bias": torch.zeros(2), "towers.vision_tower.bias": torch.zeros(2)}
    path = write(tmp_path / "ck", config, {"model.safetensors": twice | unknown})
    with pytest.raises(CheckpointError) as refused:
        Checkpoint.open(path)
    said = str(refused.value)
    assert "3 tensor(s) do not fit the config" in said
    assert "unexpected: vision.bias [2]" in said
    assert "unexpected: towers.vision_tower.bias [2]" in said
    assert "twice: norm.weight and model.norm.weight are one tensor of the model" in said


def test_a_head_beside_the_table_must_fit(tmp_path, stock):
    config, tensors = stock()
    path = write(tmp_path / "ck", config, {"model.safetensors": tensors | {HEAD: torch.zeros(96, 31)}})
    with pytest.raises(CheckpointError, match=r"wrong shape: lm_head\.weight is \[96, 31\]"):
        Checkpoint.open(path)


def test_comparing_a_head_takes_blocks(tmp_path, stock, monkeypatch):
    from gemma_deploy.checkpoint import checkpoint as module
    from gemma_deploy.checkpoint import source

    monkeypatch.setattr(source, "COMPARED_BYTES", 4 * 32 * 10)
    most, real = [], module.Stored.raw_rows
    monkeypatch.setattr(module.Stored, "raw_rows", lambda self, a, b: most.append(b - a) or real(self, a, b))
    config, tensors = stock()
    assert Checkpoint.open(write(tmp_path / "a", config, {"model.safetensors": other_head(tensors, -1)}))
    assert (max(most), len(most)) == (10, 20)  # of 96 rows, the last block differs
    most.clear()
    assert Checkpoint.open(write(tmp_path / "b", config, {"model.safetensors": other_head(tensors, 12)}))
    assert len(most) == 4


class TestFolders:
    """An index may name files in folders of the checkpoint, and nothing else."""

    @pytest.fixture
    def sharded(self, tmp_path, stock):
        config, tensors = stock()
        return write(tmp_path / "ck", config, SPELLINGS["shards in folders"][1](tensors))

    @pytest.mark.parametrize(
        "name", ["a/../../x.safetensors", "a//1.safetensors", "./a/1.safetensors", "a/", "/a/1.safetensors", "a/\0",
                 "a/..", "a\\1.safetensors", "C:/1.safetensors"],
    )  # fmt: skip
    def test_a_path_that_is_no_plain_way_down(self, sharded, name):
        content = json.loads((sharded / INDEX).read_text())
        content["weight_map"][TABLE] = name
        (sharded / INDEX).write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match="outside its own directory; nothing was opened"):
            Checkpoint.open(sharded)

    def test_a_folder_that_leads_outside(self, sharded, tmp_path):
        (sharded / "b").rename(tmp_path / "elsewhere")
        (sharded / "b").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(CheckpointError, match="outside its own directory; nothing was opened"):
            Checkpoint.open(sharded)

    def test_a_file_in_a_folder_that_leads_outside(self, sharded, tmp_path):
        (sharded / "b/1.safetensors").rename(tmp_path / "elsewhere.safetensors")
        (sharded / "b/1.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
        with pytest.raises(CheckpointError, match="outside its own directory; nothing was opened"):
            Checkpoint.open(sharded)

    def test_links_in_a_circle(self, sharded):
        (sharded / "b/1.safetensors").unlink()
        (sharded / "b/1.safetensors").symlink_to("1.safetensors")
        with pytest.raises(CheckpointError, match="1 of 2 shards are not there"):
            Checkpoint.open(sharded)

    def test_a_link_within_the_checkpoint(self, sharded):
        (sharded / "b").rename(sharded / "c")
        (sharded / "b").symlink_to("c")
        assert TABLE in Checkpoint.open(sharded).tensors

    def test_the_hugging_face_cache(self, sharded, tmp_path):
        cache = tmp_path / "models--x" / "snapshots" / "1"
        (tmp_path / "models--x" / "blobs").mkdir(parents=True)
        for number, file in enumerate(sorted(path for path in sharded.rglob("*") if path.is_file())):
            blob, link = tmp_path / "models--x" / "blobs" / str(number), cache / file.relative_to(sharded)
            file.rename(blob)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
        assert TABLE in Checkpoint.open(cache).tensors

    def test_the_fingerprint_knows_the_folder(self, sharded):
        before = Checkpoint.open(sharded).fingerprint(times=False)
        (sharded / "b").rename(sharded / "c")
        (sharded / INDEX).write_text((sharded / INDEX).read_text().replace("b/1", "c/1"))
        assert Checkpoint.open(sharded).fingerprint(times=False) != before
