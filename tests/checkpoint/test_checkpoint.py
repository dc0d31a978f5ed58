"""Checkpoint.open on directories: what is accepted, what is refused and with which words."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemma_deploy.checkpoint import Checkpoint, resolve_checkpoint
from gemma_deploy.errors import CheckpointError
from tests.checkpoint.make import config, encode, to_bf16, weights, write_checkpoint, write_index, write_safetensors

ROOT = Path(__file__).parents[2]
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def refusal(path):
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path)
    return str(caught.value)


@pytest.mark.parametrize("model_type", ["gemma", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_opens_every_kind(tmp_path, model_type, tied, shards, dtype):
    raw = config(model_type, tie_word_embeddings=tied)
    tensors = write_checkpoint(tmp_path, raw, dtype=dtype, shards=shards)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.notes == ()
    assert set(checkpoint.tensors) == set(tensors)
    assert ("lm_head.weight" in checkpoint.tensors) is not tied
    assert len(checkpoint.weight_files) == shards
    for name, info in checkpoint.tensors.items():
        stored = tensors[name].astype(np.float16) if dtype == "F16" else tensors[name]
        if dtype == "BF16":
            stored = (to_bf16(stored).astype(np.uint32) << 16).view(np.float32)
        assert np.array_equal(checkpoint.rows(name, 0, info.shape[0]), stored.astype(np.float32))
        assert info.nbytes == stored.size * (4 if dtype == "F32" else 2)


def test_missing_unexpected_and_misshaped_at_once(tmp_path):
    raw = config()
    tensors = weights(raw)
    del tensors["model.norm.weight"]
    tensors["model.layers.3.mlp.up_proj.weight"] = np.zeros((24, 16), np.float32)
    tensors[Q_PROJ] = tensors[Q_PROJ].T.copy()
    write_checkpoint(tmp_path, raw, tensors)
    text = refusal(tmp_path)
    assert "3 tensor(s) do not fit the config" in text
    assert "- missing: model.norm.weight [16]" in text
    assert "- unexpected: model.layers.3.mlp.up_proj.weight [24, 16]" in text
    assert f"- wrong shape: {Q_PROJ} is [16, 32], config.json calls for [32, 16]" in text


def test_integer_weights_are_no_weights(tmp_path):
    raw = config()
    header, data = encode(weights(raw), "F16")
    header[Q_PROJ]["dtype"] = "I16"
    write_checkpoint(tmp_path, raw)
    write_safetensors(tmp_path / "model.safetensors", header, data)
    assert f"wrong dtype: {Q_PROJ} is int16" in refusal(tmp_path)


def test_untied_needs_its_head(tmp_path):
    write_checkpoint(tmp_path, config(tie_word_embeddings=False), weights(config()))
    assert "missing: lm_head.weight [40, 16]" in refusal(tmp_path)


def test_harmless_extras_are_noted(tmp_path):
    raw = config()
    tensors = weights(raw)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    tensors["score.weight"] = np.ones((2, 16), np.float32)
    write_checkpoint(tmp_path, raw, tensors)
    checkpoint = Checkpoint.open(tmp_path)
    assert len(checkpoint.notes) == 3
    assert not {"lm_head.weight", "score.weight"} & set(checkpoint.tensors)
    assert "differs from the token table" not in str(checkpoint.notes)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "config.json: is missing"),
        (b"{", "config.json: is not JSON"),
        (b"\xff", "config.json: is not UTF-8 text (byte 0)"),
        (b"[1]", "config.json: holds a list, expected an object"),
        (b'{"a": 1, "a": 2}', "the key 'a' occurs twice"),
        (b"{}", "config.json: model_type is missing"),
    ],
)
def test_bad_config_file(tmp_path, content, words):
    write_checkpoint(tmp_path)
    (tmp_path / "config.json").unlink()
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    assert words in refusal(tmp_path)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "sub/../x.safetensors", "..", "", "C:\\x", "a\0b"])
def test_index_leading_outside_is_refused_unopened(tmp_path, name):
    write_checkpoint(tmp_path, shards=2)
    write_index(tmp_path, {"model.norm.weight": name})
    text = refusal(tmp_path)
    assert "outside its own directory; nothing was opened" in text
    assert repr(name) in text


def test_index_naming_missing_shards(tmp_path):
    write_checkpoint(tmp_path, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    (tmp_path / "model-00003-of-00003.safetensors").unlink()
    text = refusal(tmp_path)
    assert "2 of 3 shards are not there" in text
    assert "- model-00002-of-00003.safetensors\n  - model-00003-of-00003.safetensors" in text


@pytest.mark.parametrize("weight_map", [None, {}, [], {"a": 3}, {"a": None}])
def test_index_without_a_map(tmp_path, weight_map):
    write_checkpoint(tmp_path, shards=2)
    write_index(tmp_path, weight_map)
    assert "weight_map is missing or does not map" in refusal(tmp_path)


def test_index_and_shards_that_disagree(tmp_path):
    write_checkpoint(tmp_path, shards=2)
    path = tmp_path / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    first, second = sorted(set(weight_map.values()))
    moved = next(name for name, file in weight_map.items() if file == first)
    write_index(tmp_path, weight_map | {moved: second, "ghost": first})
    text = refusal(tmp_path)
    assert f"{moved} is in {first}, the index says {second}" in text
    assert f"ghost is not in {first}" in text


def test_a_tensor_in_two_shards(tmp_path):
    raw = config()
    write_checkpoint(tmp_path, raw, shards=2)
    write_safetensors(tmp_path / "model-00002-of-00002.safetensors", *encode(weights(raw)))
    assert "is in both model-00001-of-00002.safetensors and model-00002-of-00002.safetensors" in refusal(tmp_path)


def test_single_file_wins_over_an_index(tmp_path):
    write_checkpoint(tmp_path)
    write_index(tmp_path, {"x": "gone.safetensors"})
    assert "model.safetensors.index.json is ignored" in Checkpoint.open(tmp_path).notes[0]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["pytorch_model.bin"], "only pickled weights (pytorch_model.bin); they can run code"),
        (["a.pt"], "convert them to safetensors"),
        (["model.ckpt", "config.json"], "convert them to safetensors"),
        (["adapter_model.safetensors", "adapter_config.json"], "this is a LoRA adapter"),
        (["model-00001-of-00002.safetensors", "config.json"], "model.safetensors.index.json is missing"),
        (["x.gguf"], "pass the file itself"),
        (["config.json"], "no weights here"),
        (["config.json", "manifest.json", "params.safetensors"], "this is an artifact, not a checkpoint"),
        ([], "no weights here"),
    ],
)
def test_other_formats(tmp_path, files, words):
    for name in files:
        (tmp_path / name).write_bytes(b"{}")
    assert words in refusal(tmp_path)


def test_a_weight_file_instead_of_its_directory(tmp_path):
    write_checkpoint(tmp_path)
    assert "is one weight file" in refusal(tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert "only pickled weights" in refusal(tmp_path / "pytorch_model.bin")


def test_no_such_path(tmp_path):
    assert "there is no such file or directory" in refusal(tmp_path / "gone")


def test_links_the_user_placed_are_followed(tmp_path):
    """The Hugging Face cache is made of links into ../../blobs."""
    write_checkpoint(tmp_path / "blobs")
    cache = tmp_path / "snapshots" / "1"
    cache.mkdir(parents=True)
    for file in (tmp_path / "blobs").iterdir():
        (cache / file.name).symlink_to(os.path.relpath(file, cache))
    assert Checkpoint.open(cache).tensors


def test_stop_tokens_of_generation_config_are_added(tmp_path):
    write_checkpoint(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    assert Checkpoint.open(tmp_path).config.eos_token_ids == (1, 7)


def test_tokenizer_files(tmp_path):
    write_checkpoint(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert Checkpoint.open(tmp_path).tokenizer_files() == []
    (tmp_path / "tokenizer.json").write_text("{}")
    found = Checkpoint.open(tmp_path).tokenizer_files()
    assert [path.name for path in found] == ["tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"])
def test_fingerprint_sees_every_file(tmp_path, file):
    write_checkpoint(tmp_path)
    for name in ("tokenizer.json", "generation_config.json"):
        (tmp_path / name).write_text("{}")
    before = Checkpoint.open(tmp_path).fingerprint()
    assert Checkpoint.open(tmp_path).fingerprint() == before
    content = (tmp_path / file).read_bytes()
    (tmp_path / file).unlink()
    # for the weights a flipped last bit; for JSON a blank
    changed = content[:-1] + bytes([content[-1] ^ 1]) if file.endswith("safetensors") else content + b" "
    (tmp_path / file).write_bytes(changed)
    assert Checkpoint.open(tmp_path).fingerprint() != before


def test_a_tokenizer_that_would_fill_memory_is_refused_before_it_is_read(tmp_path):
    write_checkpoint(tmp_path)
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 42)
    with pytest.raises(CheckpointError, match=f"tokenizer.json: has {1 << 42} bytes; at most"):
        Checkpoint.open(tmp_path).fingerprint()


def test_a_copy_has_the_same_fingerprint_without_times(tmp_path):
    write_checkpoint(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)
    os.utime(tmp_path / "b/model.safetensors", ns=(1, 1))
    one, two = (Checkpoint.open(tmp_path / name) for name in "ab")
    assert one.fingerprint() != two.fingerprint()
    assert one.fingerprint(times=False) == two.fingerprint(times=False)
    (tmp_path / "b/config.json").write_text(json.dumps(config(rms_norm_eps=1e-5)))
    assert one.fingerprint(times=False) != Checkpoint.open(tmp_path / "b").fingerprint(times=False)


def test_fingerprint_sees_a_change_past_the_first_mib(tmp_path):
    write_checkpoint(tmp_path)
    before = Checkpoint.open(tmp_path).fingerprint()
    os.utime(tmp_path / "model.safetensors", ns=(1, 1))
    assert Checkpoint.open(tmp_path).fingerprint() != before


def test_demo_is_a_word_of_its_own():
    assert resolve_checkpoint("demo") == ROOT / "gemma_deploy" / "demo"
    assert resolve_checkpoint("~/x") == Path.home() / "x"


def test_no_torch_at_import():
    script = "import sys, gemma_deploy.checkpoint; print('torch' in sys.modules, 'transformers' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_byte_flip_in_any_json_is_refused_or_opens(tmp_path, data):
    """Never another exception, whatever a damaged config, index or header says."""
    write_checkpoint(tmp_path, config("gemma3_text"), shards=2)
    names = ["config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors"]
    file = tmp_path / data.draw(st.sampled_from(names))
    content = bytearray(file.read_bytes())
    at = data.draw(st.integers(0, min(len(content), 3000) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    file.unlink()
    file.write_bytes(content)
    try:
        checkpoint = Checkpoint.open(tmp_path)
    except CheckpointError:
        return
    assert checkpoint.rows("model.norm.weight", 0, 16).shape == (16,)
