"""EmbeddingGemma 2: config.json as published and as transformers writes it, tensors of the stock class, bad input."""

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from gemma_deploy.architectures.embedding_gemma2 import TEXT_DEFAULTS
from gemma_deploy.checkpoint import Checkpoint, ModelConfig, expected_tensors
from gemma_deploy.errors import CheckpointError, NotBuiltError
from gemma_deploy.testing import TINY_ENCODER2, write_tiny_encoder2

SLIDING, FULL = "sliding_attention", "full_attention"


def parse(raw):
    return ModelConfig.from_dict(raw, "config.json")


def refusal(**changes):
    with pytest.raises(CheckpointError) as caught:
        parse(TINY_ENCODER2 | changes)
    return str(caught.value)


@pytest.mark.parametrize("text", [{}, {"layer_types": [SLIDING, FULL] * 6, "num_hidden_layers": 12}])
def test_a_config_is_read_as_transformers_reads_it(text):
    """Nothing said, as defaults have it; and what transformers makes of that and saves."""
    raw = {"model_type": "embedding_gemma2", "text_config": text, "vision_config": None, "audio_config": None}
    stock = transformers.AutoConfig.for_model(**raw).text_config
    for config in (parse(raw), parse({**raw, "text_config": json.loads(stock.to_json_string())})):
        assert list(config.layer_types) == stock.layer_types
        for layer, own in zip(config.layers, stock.per_layer_config, strict=True):
            assert (layer.kv_heads, layer.head_dim) == (own.num_key_value_heads, own.head_dim)
            assert layer.window == (2 * stock.sliding_window + 1 if layer.kind == SLIDING else None)
            assert layer.per_layer.size == stock.hidden_size_per_layer_input
        assert {kind: rope.theta for kind, rope in config.rope.items()} == {SLIDING: 1e4, FULL: 1e6}
        assert (config.hidden_size, config.token_size) == (512, 768)
        assert config.max_position_embeddings == stock.max_position_embeddings
        assert not config.warnings


def test_what_is_left_out_is_the_class_s_default():
    made = transformers.EmbeddingGemma2TextConfig()
    own = made.per_layer_config[0]
    sizes = {"head_dim": own.head_dim, "num_key_value_heads": own.num_key_value_heads}
    assert {key: sizes.get(key) or getattr(made, key) for key in TEXT_DEFAULTS} == TEXT_DEFAULTS


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """As transformers saves the whole model, with a part that reads images; and the model."""
    path = write_tiny_encoder2(tmp_path_factory.mktemp("saved") / "checkpoint")
    torch.manual_seed(0)
    text = {key: value for key, value in TINY_ENCODER2.items() if key not in ("model_type", "architectures")}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
              "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip
    model = transformers.EmbeddingGemma2Model(
        transformers.EmbeddingGemma2Config(text_config=text, vision_config=vision, audio_config=None)
    )
    model.save_pretrained(path)
    return path, model


def test_the_text_model_is_read_and_nothing_else(saved):
    path, model = saved
    checkpoint = Checkpoint.open(path, encoder=True)
    inner = model.language_model.state_dict()
    assert {f"model.{name}" for name in inner} == set(checkpoint.tensors)
    assert expected_tensors(checkpoint.config) == {f"model.{name}": tuple(one.shape) for name, one in inner.items()}
    for name, value in inner.items():
        np.testing.assert_array_equal(checkpoint.rows(f"model.{name}", 0, len(value)), value.float().numpy())
    assert any("vision_tower are ignored: the text model does not read them" in note for note in checkpoint.notes)
    assert checkpoint.config.sentence.dimensions == checkpoint.config.token_size == 160
    assert checkpoint.config.sentence.dense == ()


def test_the_text_model_alone_is_read_as_well(saved, tmp_path):
    path, model = saved
    folder = write_tiny_encoder2(tmp_path / "checkpoint", dense=(64,))
    model.language_model.save_pretrained(folder)
    checkpoint, whole = (Checkpoint.open(one, encoder=True) for one in (folder, path))
    assert checkpoint.config.layers == whole.config.layers
    assert {*checkpoint.tensors} == {*whole.tensors, "2_Dense.linear.weight"}
    assert checkpoint.config.sentence.dimensions == 64


def test_other_commands_say_what_it_is(saved):
    with pytest.raises(NotBuiltError, match=r"is an encoder \(EmbeddingGemma 2\): it makes vectors of texts"):
        Checkpoint.open(saved[0])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size_per_layer_input": 0}, "hidden_size_per_layer_input: got 0, expected a whole number"),
        ({"embedding_dim": None}, "embedding_dim: got None, expected a whole number"),
        ({"num_global_key_value_heads": 3}, "layer 2 (full_attention) has 3 key/value heads of 64: expected a divisor"),
        ({"global_head_dim": 63}, "layer 2 (full_attention) has 1 key/value heads of 63"),
        ({"per_layer_config": {"2": {"head_dim": 64}}}, "layer 5 (full_attention) has 2 key/value heads of 32"),
        ({"per_layer_config": {"7": {}}}, "per_layer_config.7: got '7', expected the number of a layer, 0 to 6"),
        ({"sliding_window": 0}, "sliding_window: got 0"),
        ({"sliding_window_pattern": 0}, "sliding_window_pattern: got 0, expected a whole number from 1"),
        ({"rope_parameters": {SLIDING: {"rope_theta": 1e4}}}, "rope_parameters.full_attention: got None, expected"),
        ({"rope_parameters": {SLIDING: {}, FULL: {"rope_type": "yarn"}}}, "rope_type: got 'yarn'"),
        ({"attention_bias": True}, "attention_bias: got True"),
    ],
)
def test_what_is_not_built_or_wrong_is_said(changes, words):
    assert words in refusal(**changes)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("language_model.layers.3.layer_scalar", r"missing: model\.layers\.3\.layer_scalar \[1\]"),
        ("language_model.embedding_projection.weight", r"missing: model\.embedding_projection\.weight \[160, 64\]"),
        (
            "language_model.ple.per_layer_model_projection.weight",
            r"missing: model\.ple\.per_layer_model_projection\.weight \[672, 64\]",
        ),
    ],
)
def test_a_missing_tensor_is_named(tmp_path, name, said):
    path = write_tiny_encoder2(tmp_path / "checkpoint")
    file = path / "model.safetensors"
    save_file({one: value for one, value in load_file(file).items() if one != name}, file)
    with pytest.raises(CheckpointError, match=said):
        Checkpoint.open(path, encoder=True)


def test_pooling_of_another_width_than_the_projection_is_refused(tmp_path):
    path = write_tiny_encoder2(tmp_path / "checkpoint")
    (path / "1_Pooling/config.json").write_text('{"embedding_dimension": 64, "pooling_mode": "mean"}')
    with pytest.raises(CheckpointError, match="pools 64 channels, the encoder has 160"):
        Checkpoint.open(path, encoder=True)
