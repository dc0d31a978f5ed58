"""Gemma 3n: streams, widths and sparse layers as config.json says them, what a file may hold, and what is refused."""

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from gemma_deploy.architectures.gemma3n import TEXT_DEFAULTS
from gemma_deploy.checkpoint import Checkpoint, ModelConfig, coefficients, expected_tensors
from gemma_deploy.errors import CheckpointError
from gemma_deploy.params import build_plan
from gemma_deploy.schemes import Codes, Storage
from gemma_deploy.testing import TINY_CONFIGS, write_tiny_checkpoint

TINY = TINY_CONFIGS["gemma3n_text"]
SLIDING, FULL = "sliding_attention", "full_attention"
# As published (google/gemma-3n-E2B-it), but for what is said of images and sound.
PUBLISHED = {
    "E2B": {"num_hidden_layers": 30, "num_kv_shared_layers": 10, "intermediate_size": [8192] * 30,
            "activation_sparsity_pattern": [0.95] * 10 + [0.0] * 20},
    "E4B": {"num_hidden_layers": 35, "num_kv_shared_layers": 15, "intermediate_size": [16384] * 35,
            "activation_sparsity_pattern": [0.95] * 10 + [0.0] * 25},
}  # fmt: skip


def parse(raw):
    return ModelConfig.from_dict(raw, "config.json")


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_configs_are_read_as_transformers_reads_them(size):
    text = {**PUBLISHED[size], "model_type": "gemma3n_text", "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0,
            "rope_scaling": None}  # fmt: skip
    raw = {"model_type": "gemma3n", "text_config": text, "eos_token_id": [1, 106]}
    config, stock = parse(raw), transformers.Gemma3nTextConfig(**text)
    assert list(config.layer_types) == stock.layer_types
    assert [layer.intermediate_size for layer in config.layers] == stock.intermediate_size
    assert [layer.sparsity for layer in config.layers] == stock.activation_sparsity_pattern
    assert [layer.cache_from is not None for layer in config.layers] == [
        mode == "reuse" for mode in stock.kv_sharing_modes
    ]
    read = {layer.cache_from for layer in config.layers} - {None}
    assert read == {index for index, mode in enumerate(stock.kv_sharing_modes) if mode == "store"}
    for kind, rope in config.rope.items():
        assert rope.theta == stock.rope_parameters[kind]["rope_theta"]
    assert (config.altup.streams, config.altup.active) == (stock.altup_num_inputs, stock.altup_active_idx)
    assert config.final_logit_softcapping == stock.final_logit_softcapping
    assert (config.per_layer.rows, config.vocab_size) == (262144, 262400)
    assert config.eos_token_ids == (1, 106)
    assert not config.warnings


def test_what_is_left_out_is_the_class_s_default():
    made = transformers.Gemma3nTextConfig()
    said = {key: getattr(made, key) for key in TEXT_DEFAULTS} | {"intermediate_size": made.intermediate_size[0]}
    assert said == TEXT_DEFAULTS
    bare = parse({"model_type": "gemma3n", "text_config": None})
    assert [layer.sparsity for layer in bare.layers] == made.activation_sparsity_pattern
    assert bare.layers == parse({**TEXT_DEFAULTS, "model_type": "gemma3n_text"}).layers


def test_tensors_are_those_of_the_stock_class():
    raw = {key: value for key, value in TINY.items() if key != "model_type"}
    with torch.device("meta"):
        stock = transformers.Gemma3nForCausalLM(transformers.Gemma3nTextConfig(**raw))
    shapes = {name: tuple(value.shape) for name, value in stock.state_dict().items() if name != "lm_head.weight"}
    config = parse(TINY)
    assert expected_tensors(config) == shapes
    assert [layer.cache_from for layer in config.layers] == [None, None, None, None, 2, 2, 3]
    assert len({layer.template for layer in config.layers}) == 7
    assert len(parse({**TINY, **PUBLISHED["E2B"], "layer_types": None}).templates) == 6


def test_small_matrices_stay_float32_and_narrow_ones_keep_8_bits():
    config = parse(TINY)
    four = Storage(Codes(4, 32), Codes(), (), Codes(8, 32))
    plan = {spec.name: spec for spec in build_plan(config, "w8a16", 64, storage=four)}
    small = coefficients(config)
    assert len(small) == 3 * config.num_hidden_layers
    assert {plan[name].dtype for name in small} == {"float32"}
    assert plan["model.layers.0.altup.correct_output_scale"].dtype == "float32"
    for name in ("altup_projections.0", "altup_unembed_projections.2", "layers.0.laurel.linear_right"):
        assert (plan[f"model.{name}.weight"].dtype, len(plan[f"model.{name}.scale"].shape)) == ("int8", 1)
    assert plan["model.layers.0.mlp.up_proj.weight"].dtype == "int4"


def renamed(path, rename, extra):
    file = path / "model.safetensors"
    tensors = load_file(file)
    save_file({rename(name): value for name, value in tensors.items()} | extra, file)
    return tensors


def test_the_text_model_is_read_and_nothing_else(tmp_path):
    """Named as in the published model, which sees and hears as well; keys of layers that share are in the file."""
    path = write_tiny_checkpoint(tmp_path / "ck", "gemma3n_text")
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({"model_type": "gemma3n", "text_config": raw}))
    unread = [f"model.language_model.layers.5.self_attn.{name}.weight" for name in ("k_proj", "v_proj", "k_norm")]
    towers = ("vision_tower.timm_model.x", "audio_tower.conformer.0.y", "embed_vision.z", "embed_audio.z")
    extra = {name: torch.zeros(2) for name in (*unread, *(f"model.{name}" for name in towers))}
    stored = renamed(path, lambda name: name.replace("model.", "model.language_model.", 1), extra)
    checkpoint = Checkpoint.open(path)
    assert checkpoint.config.model_type == "gemma3n_text"
    assert set(checkpoint.tensors) == set(stored)
    for name in ("model.altup_projections.1.weight", "model.layers.3.altup.correct_output_scale"):
        rows = checkpoint.rows(name, 0, len(stored[name]))
        np.testing.assert_array_equal(rows, stored[name].float().numpy())
    notes = " ".join(checkpoint.notes)
    assert all(name in notes for name in unread)
    for tower in ("vision_tower", "audio_tower", "embed_vision", "embed_audio"):
        assert f"1 tensor(s) of {tower} are ignored" in notes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"intermediate_size": [160] * 6}, "or a list of one for each of the 7 layers"),
        ({"intermediate_size": [160] * 6 + [0]}, "or a list of one for each of the 7 layers"),
        ({"activation_sparsity_pattern": [0.5]}, "activation_sparsity_pattern: got [0.5], expected a list of 7 shares"),
        ({"activation_sparsity_pattern": [0.5] * 6 + [1]}, "activation_sparsity_pattern[6]: got 1, expected a share"),
        ({"num_kv_shared_layers": 7}, "num_kv_shared_layers: got 7, expected a whole number from 0 to 6"),
        ({"num_kv_shared_layers": 6}, "no layer before those has keys and values of full_attention"),
        ({"altup_active_idx": 4}, "altup_active_idx: got 4, expected the number of a stream, 0 to 3"),
        ({"altup_num_inputs": 1}, "2 streams or more"),
        ({"altup_correct_scale": False}, "altup_correct_scale: got False, expected true"),
        ({"laurel_rank": 0}, "laurel_rank: got 0"),
        ({"hidden_size": 66}, "hidden_size: got 66, expected a multiple of num_attention_heads"),
    ],
)
def test_what_is_wrong_is_said(changes, words):
    with pytest.raises(CheckpointError) as caught:
        parse(TINY | changes)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("model.embed_tokens_per_layer.weight", lambda w: w[:, :96], "is [480, 96], config.json calls for [480, 224]"),
        ("model.layers.2.self_attn.k_proj.weight", None, "missing: model.layers.2.self_attn.k_proj.weight"),
        ("model.layers.2.mlp.up_proj.weight", lambda w: w[:90], "is [90, 64], config.json calls for [96, 64]"),
        ("model.layers.0.altup.prediction_coefs.weight", lambda w: w[:4], "is [4, 4], config.json calls for [16, 4]"),
        ("model.altup_unembed_projections.2.weight", None, "missing: model.altup_unembed_projections.2.weight"),
    ],
)
def test_a_file_that_contradicts_the_config_is_refused(name, change, words, tmp_path):
    path = write_tiny_checkpoint(tmp_path / "ck", "gemma3n_text")
    tensors = load_file(path / "model.safetensors")
    value = tensors.pop(name)
    save_file(tensors | ({name: change(value).contiguous()} if change else {}), path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path)
    assert words in str(caught.value)
