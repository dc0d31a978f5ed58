"""GGUF files of Gemma 4, written with gguf-py as llama.cpp's converter does, against the safetensors they come from."""

from unittest.mock import Mock

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from gemma_deploy.architectures.gguf_keys import turned_share
from gemma_deploy.checkpoint import Checkpoint, gguf_reader
from gemma_deploy.checkpoint.mapped import MappedFile
from gemma_deploy.errors import CheckpointError
from gemma_deploy.patched import patched_causal
from gemma_deploy.staging import stage_checkpoint
from gemma_deploy.testing import TINY_EXPERTS, TINY_PER_LAYER, write_tiny_checkpoint
from tests.calibration.make import write_tokenizer
from tests.checkpoint import gguf_make

SLIDING, FULL = gguf_make.SLIDING, gguf_make.FULL
# 36 channels of 96 turn.
ODD_ROPE = {
    "global_head_dim": 96,
    "rope_parameters": {
        SLIDING: {"rope_type": "default", "rope_theta": 5e3},
        FULL: {"rope_type": "proportional", "rope_theta": 3e5, "partial_rotary_factor": 0.375},
    },
}
# transformers reads the number of global layers where keys are values; llama.cpp always, and refuses such a file.
SHARING = {**TINY_PER_LAYER, "num_global_key_value_heads": None}
MODELS = {
    "31b": ("gemma4_text", {}),
    "12b": ("gemma4_unified_text", {}),
    "e2b": ("gemma4_text", SHARING),
    "e4b": ("gemma4_text", {**SHARING, "use_double_wide_mlp": False, "num_kv_shared_layers": 2}),
    "26b": ("gemma4_text", {**TINY_EXPERTS, "num_hidden_layers": 5, "moe_intermediate_size": 64}),
    "odd": ("gemma4_text", {**ODD_ROPE, "num_hidden_layers": 5, "tie_word_embeddings": False}),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Name of a model -> its directory of safetensors, made once."""
    made = {}

    def get(name):
        if name not in made:
            kind, changes = MODELS[name]
            made[name] = write_tiny_checkpoint(tmp_path_factory.mktemp(name) / "ck", kind, **changes)
        return made[name]

    return get


def refusal(path):
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_hugging_face_checkpoint(directory, tmp_path, name):
    theirs, ours = Checkpoint.open(directory(name)), gguf_make.write_gemma4(tmp_path / "m.gguf", directory(name))
    ours = Checkpoint.open(ours)
    assert ours.config.model_type == "gemma4_text"
    assert ours.config.layers == theirs.config.layers
    assert ours.config.per_layer == theirs.config.per_layer
    same = {"tie_word_embeddings", "final_logit_softcapping", "rms_norm_eps", "max_position_embeddings", "vocab_size"}
    assert {key: getattr(ours.config, key) for key in same} == {key: getattr(theirs.config, key) for key in same}
    assert not ours.notes
    assert list(ours.tensors) == list(theirs.tensors)
    for tensor, info in theirs.tensors.items():
        assert np.array_equal(ours.rows(tensor, 0, info.shape[0]), theirs.rows(tensor, 0, info.shape[0])), tensor


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "name", ["12b", "e2b", "26b", *(pytest.param(one, marks=SLOW) for one in ("31b", "e4b", "odd"))]
)
def test_it_computes_what_transformers_computes(directory, tmp_path, name):
    """The patched class with what the file says; and transformers' own with the staged directory. Five windows."""
    ids = torch.randint(3, 500, (1, 40), generator=torch.Generator().manual_seed(5))
    stock = AutoModelForCausalLM.from_pretrained(directory(name), attn_implementation="eager", dtype=torch.float32)
    write_tokenizer(tmp_path)
    checkpoint = Checkpoint.open(gguf_make.write_gemma4(tmp_path / "m.gguf", directory(name)))
    patched = patched_causal(checkpoint.config).to_empty(device="cpu").eval()
    patched.tie_weights()
    patched.load_state_dict(stock.state_dict())
    staged = stage_checkpoint(checkpoint.path, tmp_path / "staged")
    again = AutoModelForCausalLM.from_pretrained(staged, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        right = stock.eval()(ids).logits
        apart = (patched(ids).logits - right).abs().max() / right.abs().max()
        assert apart <= (2e-6 if name == "26b" else 0)  # experts are added in another order: measured 6.6e-7
        assert torch.equal(again.eval()(ids).logits, right)


@pytest.mark.parametrize("head_dim", [32, 96, 100, 512])
def test_every_number_of_pairs_that_turn_is_that_of_transformers(head_dim):
    """Its rule, int(share * head_dim // 2), on the share that is read back."""
    for turned in range(head_dim // 2 + 1):
        meta = Mock(numbers=lambda name, turned=turned: [1.0] * turned + [1e30] * (head_dim // 2 - turned))
        assert int(turned_share(meta, "rope_freqs.weight", head_dim) * head_dim // 2) == turned
        meta.problem.assert_not_called()


@pytest.mark.parametrize("name", ["e2b", "26b"])
@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q5_1"])
def test_blocks_of_every_matrix(directory, tmp_path, name, kind):
    kind = gguf.GGMLQuantizationType[kind]
    theirs = Checkpoint.open(directory(name))
    ours = Checkpoint.open(gguf_make.write_gemma4(tmp_path / "m.gguf", directory(name), kind=kind))
    for tensor, info in theirs.tensors.items():
        right = theirs.rows(tensor, 0, info.shape[0])
        if right.ndim == 2:
            right = gguf.quants.dequantize(gguf.quants.quantize(right, kind), kind)
        assert np.array_equal(ours.rows(tensor, 0, info.shape[0]), right), tensor


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attention__sliding_window_pattern": None}, "gemma4.attention.sliding_window_pattern is missing: expected a "
         "list of 7 booleans, true where a layer has a window"),
        ({"attention__sliding_window_pattern": 6}, "gemma4.attention.sliding_window_pattern: got 6, expected a list"),
        ({"attention__sliding_window_pattern": [True] * 6}, "expected a list of 7 booleans"),
        ({"attention__sliding_window": None}, "gemma4.attention.sliding_window is missing"),
        ({"attention__key_length": None}, "gemma4.attention.key_length is missing"),
        ({"attention__key_length_swa": None}, "gemma4.attention.key_length_swa is missing"),
        ({"attention__value_length": 32}, "gemma4.attention.value_length: got 32, expected 64, as "
         "attention.key_length says"),
        ({"attention__value_length_swa": 16}, "gemma4.attention.value_length_swa: got 16, expected 32"),
        ({"rope__dimension_count_swa": 16}, "gemma4.rope.dimension_count_swa: got 16, expected 32"),
        ({"rope__freq_base": None}, "gemma4.rope.freq_base is missing: expected a positive number"),
        ({"rope__freq_base_swa": None}, "gemma4.rope.freq_base_swa is missing"),
        ({"rope__scaling.type": "linear"}, "gemma4.rope.scaling.type: got 'linear', expected none"),
        ({"attention__shared_kv_layers": 7}, "gemma4.attention.shared_kv_layers: got 7, expected a whole number from 0 "
         "to 6"),
        ({"attention__head_count_kv": [2] * 6}, "gemma4.attention.head_count_kv: got [2, 2, 2, 2, 2, 2], expected a "
         "whole number from 1 on, or a list of one for each of 7 layers"),
        ({"attention__head_count_kv": [2, 1, 2, 2, 2, 1, 1]}, "gemma4.attention.head_count_kv: got [1, 2], expected "
         "one size in all layers sliding_attention"),
        ({"feed_forward_length": [160] * 6 + [320]}, "gemma4.feed_forward_length: got [160, 320], expected one size"),
        ({"embedding_length_per_layer_input": -1}, "gemma4.embedding_length_per_layer_input: got -1, expected a whole"),
        ({"embedding_length_per_layer_input": 32}, "missing: model.embed_tokens_per_layer.weight"),
        ({"expert_count": 8}, "gemma4.expert_used_count is missing: expected a whole number from 1"),
        ({"expert_count": 8, "expert_used_count": 3}, "gemma4.expert_feed_forward_length is missing"),
        ({"block_count": 6}, "gemma4.attention.sliding_window_pattern: got"),
        ({"block_count": 0}, "num_hidden_layers: got 0, expected a whole number from 1"),
        ({"attention__key_length": 128, "attention__value_length": 128, "rope__dimension_count": 128},
         "rope_freqs.weight: got '32 numbers from 1 to 1e+30', expected 64 numbers, 1 for each pair of channels that "
         "turns and 1e+30 behind them"),
        ({"attention__head_count": 8}, "model.layers.0.self_attn.q_proj.weight is [128, 64], the metadata call for "
         "[256, 64]"),
    ],
)  # fmt: skip
def test_missing_or_contradicting_metadata_are_told_by_name(directory, tmp_path, changes, said):
    assert said in refusal(gguf_make.write_gemma4(tmp_path / "m.gguf", directory("31b"), **changes))


def test_a_pattern_of_numbers_is_one_of_booleans(directory, tmp_path):
    """llama.cpp reads both."""
    theirs = Checkpoint.open(directory("31b")).config.layers
    pattern = [int(layer.kind == SLIDING) for layer in theirs]
    file = gguf_make.write_gemma4(tmp_path / "m.gguf", directory("31b"), attention__sliding_window_pattern=pattern)
    assert Checkpoint.open(file).config.layers == theirs


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("31b", lambda all: all.pop("rope_freqs.weight"), "rope_freqs.weight is missing: expected 32 numbers"),
        ("31b", lambda all: all["rope_freqs.weight"].__setitem__(3, 8.0), "rope_freqs.weight: got '32 numbers from 1"),
        ("31b", lambda all: all.pop("blk.4.layer_output_scale.weight"), "missing: model.layers.4.layer_scalar [1]"),
        ("31b", lambda all: all.update({"blk.6.attn_v.weight": np.zeros((64, 64), np.float32)}),
         "blk.5.attn_v.weight is missing: expected one in every layer that sees everything, or in none of them"),
        ("31b", lambda all: all.pop("blk.0.attn_v.weight"), "missing: model.layers.0.self_attn.v_proj.weight"),
        ("e2b", lambda all: all.pop("per_layer_token_embd.weight"), "missing: model.embed_tokens_per_layer.weight"),
        ("e2b", lambda all: all.update({"per_layer_token_embd.weight": np.zeros((512, 192), np.float32)}),
         "model.embed_tokens_per_layer.weight is [512, 192], the metadata call for [512, 224]"),
        ("e2b", lambda all: all.update({"blk.0.attn_k.bias": np.zeros(64, np.float32)}),
         "unexpected: blk.0.attn_k.bias [64]"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_told_by_name(directory, tmp_path, monkeypatch, name, change, said):
    right = gguf_make.write

    def write(path, architecture, metadata, tensors, **options):
        change(tensors)
        return right(path, architecture, metadata, tensors, **options)

    monkeypatch.setattr(gguf_make, "write", write)
    assert said in refusal(gguf_make.write_gemma4(tmp_path / "m.gguf", directory(name)))


def test_more_heads_of_global_layers_than_keys_that_are_values_are_told(directory, tmp_path):
    """Layers with attn_v have as many key heads everywhere, as in transformers."""
    heads = [2, 1, 2, 1, 2, 2, 1]
    said = refusal(gguf_make.write_gemma4(tmp_path / "m.gguf", directory("e2b"), attention__head_count_kv=heads))
    assert "gemma4.attention.head_count_kv: got [2, 1], expected one number for all layers" in said


def test_keys_of_layers_that_share_others_are_listed_and_not_read(directory, tmp_path, monkeypatch):
    """The converter writes what the checkpoint holds."""
    right = gguf_make.write

    def write(path, architecture, metadata, tensors, **options):
        more = {f"blk.5.attn_{one}.weight": np.zeros((64, 64), np.float32) for one in ("k", "v")}
        return right(path, architecture, metadata, {**tensors, **more}, **options)

    monkeypatch.setattr(gguf_make, "write", write)
    checkpoint = Checkpoint.open(gguf_make.write_gemma4(tmp_path / "m.gguf", directory("e2b")))
    assert "model.layers.5.self_attn.k_proj.weight" not in checkpoint.tensors
    assert any(note.startswith("2 tensor(s) of layers that share keys and values") for note in checkpoint.notes)


@pytest.mark.parametrize("model", ["31b", "e2b", "26b", "3n"])
def test_metadata_of_any_type_are_refused_in_a_sentence(directory, tmp_path, monkeypatch, model):
    """Or read, where the value is none that matters."""
    if model == "3n":
        checkpoint = write_tiny_checkpoint(tmp_path / "ck", "gemma3n_text")
        file = gguf_make.write_gemma3n(tmp_path / "m.gguf", checkpoint)
    else:
        file = gguf_make.write_gemma4(tmp_path / "m.gguf", directory(model))
    read, refused = gguf_reader.read_gguf_header, {}
    keys = [key for key in read(MappedFile(file)).metadata if not key.startswith(("general", "tokenizer", "GGUF"))]
    for key in keys:
        for value in ("text", [3, 4], ["a"], ("array", 5000), True, -7, 2.5, float("nan"), float("inf"), [], 1 << 40):

            def changed(mapped, key=key, value=value):
                header = read(mapped)
                header.metadata[key] = value
                return header

            monkeypatch.setattr(gguf_reader, "read_gguf_header", changed)
            try:
                Checkpoint.open(file)
            except CheckpointError as error:
                refused[key] = str(error)
    assert all(str(file) in said for said in refused.values())
    assert len(refused) >= len(keys) - 2, sorted(set(keys) - set(refused))
