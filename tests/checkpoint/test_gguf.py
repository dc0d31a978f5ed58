"""GGUF files: names, norm weights without their 1, config from metadata, and damage of every kind."""

import os
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemma_deploy.checkpoint import Checkpoint, ModelConfig, gguf_reader
from gemma_deploy.errors import CheckpointError
from tests.checkpoint.make import config, to_bf16, weights

ARCHITECTURES = {"gemma": "gemma", "gemma2": "gemma2", "gemma3_text": "gemma3"}
REAL_GGUF = Path(os.environ.get("GEMMA_270M_GGUF", "not given"))
REAL_HF = Path(os.environ.get("GEMMA_270M", "not given"))


def raw_config(model_type, **changes):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 7}
    if model_type == "gemma3_text":
        changes = {"sliding_window_pattern": 6} | changes
    return config(model_type, **sizes | changes)


# As llama.cpp's converter names them (gguf.constants.TENSOR_NAMES).
OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
BLOCKS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
TWO_NORMS = {"post_attention_layernorm": "ffn_norm"}
FOUR_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def llama_name(name, model_type):
    """Hugging Face name -> llama.cpp's."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    blocks = BLOCKS | (TWO_NORMS if model_type == "gemma" else FOUR_NORMS)
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{blocks[rest.removesuffix('.weight')]}.weight"


def write_gguf(path, raw, tensors, *, arch=None, quantize=None, metadata=()):
    """A file as llama.cpp's converter writes it: norms plus one, reversed dims."""
    model_type = raw["model_type"]
    writer = gguf.GGUFWriter(path, arch or ARCHITECTURES[model_type])
    writer.add_context_length(raw["max_position_embeddings"])
    writer.add_embedding_length(raw["hidden_size"])
    writer.add_block_count(raw["num_hidden_layers"])
    writer.add_feed_forward_length(raw["intermediate_size"])
    writer.add_head_count(raw["num_attention_heads"])
    writer.add_head_count_kv(raw["num_key_value_heads"])
    writer.add_key_length(raw["head_dim"])
    writer.add_layer_norm_rms_eps(raw["rms_norm_eps"])
    if model_type != "gemma":
        writer.add_sliding_window(raw["sliding_window"])
    if model_type == "gemma3_text":
        writer.add_rope_freq_base(raw["rope_theta"])
    writer.add_token_list([f"t{i}" for i in range(raw["vocab_size"])])
    writer.add_array("tokenizer.ggml.scores", [float(i) for i in range(5000)])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
    for key, value in metadata:
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    for name, value in tensors.items():
        stored = value + np.float32(1) if name.endswith("norm.weight") else value
        if quantize is not None and value.ndim == 2:
            data = gguf.quants.quantize(stored, quantize)
            writer.add_tensor(llama_name(name, model_type), data, raw_dtype=quantize)
        else:
            writer.add_tensor(llama_name(name, model_type), stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.gguf"


def refusal(path):
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("model_type", ["gemma", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("tied", [True, False])
def test_equals_the_hugging_face_checkpoint(file, model_type, tied):
    raw = raw_config(model_type, tie_word_embeddings=tied)
    tensors = weights(raw)
    write_gguf(file, raw, tensors)
    checkpoint = Checkpoint.open(file)
    assert checkpoint.config == ModelConfig.from_dict(raw, "config.json")
    assert set(checkpoint.tensors) == set(tensors)
    for name, info in checkpoint.tensors.items():
        ours = checkpoint.rows(name, 0, info.shape[0])
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, tensors[name], rtol=0, atol=2e-7 if "norm" in name else 0)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q5_1"])
def test_blocks_equal_the_whole_dequantized(file, kind, monkeypatch):
    monkeypatch.setattr("gemma_deploy.checkpoint.gguf_reader.DEQUANTIZE_BYTES", 4 * 32 * 3)
    kind = gguf.GGMLQuantizationType[kind]
    raw = raw_config("gemma")
    tensors = weights(raw)
    write_gguf(file, raw, tensors, quantize=kind)
    checkpoint = Checkpoint.open(file)
    name = "model.embed_tokens.weight"
    whole = gguf.quants.dequantize(gguf.quants.quantize(tensors[name], kind), kind)
    assert checkpoint.tensors[name].dtype == kind.name
    assert np.array_equal(checkpoint.rows(name, 0, 40), whole)
    assert np.array_equal(checkpoint.rows(name, 7, 18), whole[7:18])
    assert checkpoint.raw_rows(name, 7, 18).nbytes == checkpoint.tensors[name].nbytes // 40 * 11
    with pytest.raises(IndexError):
        checkpoint.rows(name, 0, 41)


NUMBERS = {
    "context_length": "max_position_embeddings", "embedding_length": "hidden_size", "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads", "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps", "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta", "attn_logit_softcapping": "attn_logit_softcapping",
    "tokenizer.ggml.bos_token_id": "bos_token_id", "tokenizer.ggml.eos_token_id": "eos_token_id",
    "tokenizer.ggml.eot_token_id": "eos_token_id",
}  # fmt: skip


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize(
    "value", ["text", [3, 4], ["a"], [0] * 5000, True, -7], ids=["text", "numbers", "texts", "long", "true", "-7"]
)
def test_metadata_of_another_type_are_refused_by_the_keys_they_become(file, monkeypatch, key, value):
    raw = raw_config("gemma2")
    write_gguf(file, raw, weights(raw))
    full = key if key.startswith("tokenizer") else f"gemma2.{key}"
    read = gguf_reader.read_gguf_header

    def changed(mapped):
        header = read(mapped)
        header.metadata[full] = ("array", 5000) if value == [0] * 5000 else value
        return header

    monkeypatch.setattr(gguf_reader, "read_gguf_header", changed)
    assert f"{NUMBERS[key]}: got " in refusal(file)


@pytest.mark.parametrize("heads", ["text", [3, 4], ("array", 5000), True, 0, -1, 2.5])
def test_the_attention_scalar_of_the_largest_is_asked_of_numbers_alone(file, monkeypatch, heads):
    raw = raw_config("gemma2")
    write_gguf(file, raw, weights(raw))
    opened = gguf_reader.GgufFile(file)
    opened.metadata |= {"gemma2.block_count": 46, "gemma2.embedding_length": 4608, "gemma2.attention.head_count": heads}
    assert opened.config_dict()["num_attention_heads"] == heads
    opened.metadata["gemma2.attention.head_count"] = 32
    assert opened.config_dict()["query_pre_attn_scalar"] == 144


def test_metadata_of_larger_gemmas(file):
    raw = raw_config("gemma3_text")
    scaling = [("gemma3.rope.scaling.type", "linear"), ("gemma3.rope.scaling.factor", 8.0)]
    write_gguf(file, raw, weights(raw), metadata=scaling)
    rope = Checkpoint.open(file).config.rope
    assert (rope["full_attention"].factor, rope["sliding_attention"].factor) == (8.0, 1.0)


def test_other_architecture_names_the_nearest(file):
    raw = raw_config("gemma3_text")
    write_gguf(file, raw, weights(raw), arch="gemma3m")
    text = refusal(file)
    assert "holds a model of architecture 'gemma3m'; the nearest known one is 'gemma3'" in text
    assert "one of gemma, gemma2, gemma3" in text
    assert "pass the GGUF file of Gemma 1, Gemma 2, Gemma 3, Gemma 3n or Gemma 4, or the directory of" in text


def test_one_part_of_several(file):
    raw = raw_config("gemma")
    write_gguf(file, raw, weights(raw), metadata=[("split.count", 3)])
    assert "is one of 3 parts of a split GGUF" in refusal(file)


def test_missing_tensors_and_keys(file):
    raw = raw_config("gemma")
    tensors = weights(raw)
    del tensors["model.norm.weight"]
    write_gguf(file, raw, tensors)
    assert "- missing: model.norm.weight [32]" in refusal(file)


def test_not_gguf(file):
    file.write_bytes(b"GGML" + bytes(100))
    assert "is no GGUF file" in refusal(file)
    file.unlink()
    file.write_bytes(b"GGUF" + b"\x01" + bytes(100))
    assert "is GGUF version 1" in refusal(file)


def test_every_cut_is_refused(file, tmp_path):
    raw = raw_config("gemma", num_hidden_layers=1)
    write_gguf(file, raw, weights(raw))
    content = file.read_bytes()
    for index, cut in enumerate(range(0, len(content) - 1, 997)):
        part = tmp_path / f"{index}.gguf"
        part.write_bytes(content[:cut])
        text = refusal(part)
        assert any(word in text for word in ("cut short", "empty", "is no GGUF file")), text


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_byte_flip_is_refused_or_opens(file, data):
    raw = raw_config("gemma", num_hidden_layers=1)
    file.unlink(missing_ok=True)
    write_gguf(file, raw, weights(raw))
    content = bytearray(file.read_bytes())
    scores = content.index(b"tokenizer.ggml.scores")
    start = data.draw(st.sampled_from([0, scores, content.index(b"blk.0.")]))
    at = min(start + data.draw(st.integers(0, 1200)), len(content) - 1)
    content[at] ^= data.draw(st.integers(1, 255))
    file.unlink()
    file.write_bytes(content)
    try:
        checkpoint = Checkpoint.open(file)
    except CheckpointError:
        return
    assert checkpoint.rows("model.norm.weight", 0, 32).shape == (32,)


@pytest.mark.real
@pytest.mark.skipif(not REAL_GGUF.exists() or not REAL_HF.exists(), reason="needs GEMMA_270M and GEMMA_270M_GGUF")
def test_real_270m_rounds_to_its_bf16_checkpoint():
    ours, theirs = Checkpoint.open(REAL_GGUF), Checkpoint.open(REAL_HF)
    assert ours.config == theirs.config
    for name, info in theirs.tensors.items():
        for start in range(0, info.shape[0], 8192):
            stop = min(start + 8192, info.shape[0])
            assert np.array_equal(to_bf16(ours.rows(name, start, stop)), theirs.raw_rows(name, start, stop)), name
