"""Gemma 4: two sizes of attention in one model, as published and as transformers writes it, and what is not built."""

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from gemma_deploy.architectures.gemma4 import TEXT_DEFAULTS, UNIFIED_DEFAULTS
from gemma_deploy.checkpoint import Checkpoint, ModelConfig, expected_tensors
from gemma_deploy.errors import CheckpointError
from gemma_deploy.testing import TINY_CONFIGS, TINY_PER_LAYER, write_tiny_checkpoint

SLIDING, FULL = "sliding_attention", "full_attention"
TINY = TINY_CONFIGS["gemma4_text"]
PUBLISHED = {
    "12b": ("gemma4_unified", {"hidden_size": 3840, "num_hidden_layers": 48, "num_attention_heads": 16,
            "num_key_value_heads": 8, "num_global_key_value_heads": 1, "intermediate_size": 15360}),
    "31b": ("gemma4", {"hidden_size": 5376, "num_hidden_layers": 60, "num_attention_heads": 32,
            "num_key_value_heads": 16, "num_global_key_value_heads": 4, "intermediate_size": 21504,
            "sliding_window": 1024, "hidden_size_per_layer_input": 0}),
}  # fmt: skip


def parse(raw):
    return ModelConfig.from_dict(raw, "config.json")


def refusal(**changes):
    with pytest.raises(CheckpointError) as caught:
        parse(TINY | changes)
    return str(caught.value)


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_configs_are_read_as_transformers_reads_them(size):
    kind, text = PUBLISHED[size]
    text = {**text, "model_type": f"{kind}_text", "attention_k_eq_v": True, "final_logit_softcapping": 30.0}
    raw = {"model_type": kind, "text_config": text, "eos_token_id": [1, 106]}
    config = parse(raw)
    stock = transformers.AutoConfig.for_model(**raw).text_config
    assert list(config.layer_types) == stock.layer_types
    for layer, own in zip(config.layers, stock.per_layer_config, strict=True):
        assert (layer.kv_heads, layer.head_dim) == (own.num_key_value_heads, own.head_dim)
        assert layer.heads == stock.num_attention_heads
        assert layer.window == (stock.sliding_window if layer.kind == SLIDING else None)
        assert [one.kind for one in layer.linears].count("v_proj") == (layer.kind == SLIDING)
    for rope_kind, rope in config.rope.items():
        said = stock.rope_parameters[rope_kind]
        assert (rope.theta, rope.rotated) == (said["rope_theta"], said.get("partial_rotary_factor", 1.0))
    assert config.final_logit_softcapping == stock.final_logit_softcapping
    assert config.eos_token_ids == (1, 106)
    assert not config.warnings


@pytest.mark.parametrize(
    ("stock", "defaults"),
    [(transformers.Gemma4TextConfig, TEXT_DEFAULTS), (transformers.Gemma4UnifiedTextConfig, UNIFIED_DEFAULTS)],
)
def test_what_is_left_out_is_the_class_s_default(stock, defaults):
    made = stock()
    said = {key: made.per_layer_config[0].head_dim if key == "head_dim" else getattr(made, key) for key in defaults}
    assert said == defaults


def test_tensors_are_those_of_the_stock_class():
    raw = {key: value for key, value in TINY.items() if key != "model_type"}
    with torch.device("meta"):
        stock = transformers.Gemma4ForCausalLM(transformers.Gemma4TextConfig(**raw))
    shapes = {name: tuple(value.shape) for name, value in stock.state_dict().items() if name != "lm_head.weight"}
    assert expected_tensors(parse(TINY)) == shapes


@pytest.mark.parametrize(("layers", "numbers"), [(7, ["5", "6"]), (12, ["05", "11"])])
def test_what_transformers_saves_is_read_with_its_sizes_by_layer(layers, numbers):
    """`per_layer_config` in the place of the two keys of published files, numbers of one width."""
    tiny = TINY | {"num_hidden_layers": layers}
    raw = {key: value for key, value in tiny.items() if key != "model_type"}
    saved = json.loads(transformers.Gemma4TextConfig(**raw).to_json_string())
    assert "global_head_dim" not in saved
    assert [*saved["per_layer_config"]] == numbers
    assert parse(saved).layers == parse(tiny).layers


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory):
    """The text model inside a Gemma 4 that reads images as well, as transformers saves it."""
    path = tmp_path_factory.mktemp("multimodal")
    torch.manual_seed(0)
    text = {key: value for key, value in TINY.items() if key not in ("model_type", "architectures", "torch_dtype")}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
              "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip
    model = transformers.Gemma4ForConditionalGeneration(
        transformers.Gemma4Config(text_config=text, vision_config=vision, audio_config=None)
    )
    model.to(torch.bfloat16).save_pretrained(path)
    return path, model


def test_the_text_model_is_read_and_nothing_else(multimodal):
    path, model = multimodal
    checkpoint = Checkpoint.open(path)
    assert checkpoint.config.model_type == "gemma4_text"
    inner = model.model.language_model.state_dict()
    assert {f"model.{name}" for name in inner} == set(checkpoint.tensors)
    for name, value in inner.items():
        np.testing.assert_array_equal(checkpoint.rows(f"model.{name}", 0, len(value)), value.float().numpy())
    assert any("vision_tower are ignored: the text model does not read them" in note for note in checkpoint.notes)


def test_a_file_whose_tensors_contradict_the_sizes_is_refused_by_name(tmp_path):
    path = write_tiny_checkpoint(tmp_path / "ck", "gemma4_text", num_hidden_layers=2)
    raw = json.loads((path / "config.json").read_text())
    sizes = {"1": {"head_dim": 32, "num_key_value_heads": 1}}
    (path / "config.json").write_text(json.dumps(raw | {"per_layer_config": sizes}))
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path)
    assert "model.layers.1.self_attn.k_proj.weight is [64, 64], config.json calls for [32, 64]" in str(caught.value)
    assert "model.layers.1.self_attn.q_norm.weight is [64], config.json calls for [32]" in str(caught.value)


def test_a_layer_without_its_number_is_refused(tmp_path):
    path = write_tiny_checkpoint(tmp_path / "ck", "gemma4_text", num_hidden_layers=2)
    file = path / "model.safetensors"
    tensors = {name: value for name, value in load_file(file).items() if name != "model.layers.1.layer_scalar"}
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"missing: model\.layers\.1\.layer_scalar \[1\]"):
        Checkpoint.open(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"enable_moe_block": True}, "num_experts is missing"),
        ({"num_kv_shared_layers": 7}, "num_kv_shared_layers: got 7, expected a whole number from 0 to 6"),
        ({"num_kv_shared_layers": 2}, "no layer before those has keys and values of full_attention"),
        ({"hidden_size_per_layer_input": 16}, "vocab_size_per_layer_input: got 262144, expected 512, as many as"),
        ({"hidden_size_per_layer_input": -1}, "hidden_size_per_layer_input: got -1, expected a whole number"),
        ({"use_bidirectional_attention": "all"}, "only causal models are compiled"),
        ({"num_global_key_value_heads": 3}, "layer 5 (full_attention) has 3 key/value heads of 64: expected a divisor"),
        ({"global_head_dim": 63}, "layer 5 (full_attention) has 1 key/value heads of 63"),
        ({"per_layer_config": {"9": {"head_dim": 64}}}, "per_layer_config.9: got '9', expected the number of a layer"),
        ({"per_layer_config": {"5": {"head_dim": "64"}}}, "per_layer_config.5.head_dim: got '64', expected a whole"),
        ({"per_layer_config": {"5": {"intermediate_size": 5}}}, "per_layer_config.5.intermediate_size: got 5"),
        ({"per_layer_config": {"5": 64}}, "per_layer_config.5: got 64, expected an object"),
        ({"per_layer_config": [64]}, "per_layer_config: got [64], expected an object"),
        ({"per_layer_config": {"5": {"head_dim": 64}}}, "layer 6 (full_attention) has 2 key/value heads of 32"),
        ({"per_layer_config": {"9" * 5000: {}}}, "expected the number of a layer, 0 to 6"),
        ({"per_layer_config": {"07": {}}}, "per_layer_config.07: got '07', expected the number of a layer, 0 to 6"),
        ({"per_layer_config": {"3": {}, "03": {}}}, "per_layer_config.03: got '03', expected each layer once, and 3"),
        ({"per_layer_config": {"": {}}}, "expected the number of a layer, 0 to 6"),
        ({"per_layer_config": {"\u0663": {}}}, "expected the number of a layer, 0 to 6"),
        ({"rope_parameters": {SLIDING: {"rope_theta": 1e4}}}, "rope_parameters.full_attention: got None, expected"),
        (
            {"rope_parameters": {SLIDING: {}, FULL: {"rope_type": "proportional", "partial_rotary_factor": 2}}},
            "partial_rotary_factor: got 2.0, expected a share, 1 at most",
        ),
    ],
)  # fmt: skip
def test_what_is_not_built_or_wrong_is_said(changes, words):
    assert words in refusal(**changes)


def test_a_config_without_the_key_of_per_layer_embeddings_has_them():
    raw = {key: value for key, value in TINY.items() if key != "hidden_size_per_layer_input"}
    table = parse(raw | {"vocab_size_per_layer_input": 512}).per_layer
    assert (table.rows, table.layers, table.size, table.width) == (512, 7, 256, 7 * 256)
    assert parse(TINY).per_layer is None


SHARING = TINY | TINY_PER_LAYER


def test_tensors_of_a_model_that_shares_keys_and_values_are_those_of_the_stock_class():
    raw = {key: value for key, value in SHARING.items() if key != "model_type"}
    with torch.device("meta"):
        stock = transformers.Gemma4ForCausalLM(transformers.Gemma4TextConfig(**raw))
    shapes = {name: tuple(value.shape) for name, value in stock.state_dict().items() if name != "lm_head.weight"}
    config = parse(SHARING)
    assert expected_tensors(config) == shapes
    assert [layer.cache_from for layer in config.layers] == [None, None, None, None, 2, 2, 3]
    assert [layer.intermediate_size for layer in config.layers] == [160] * 4 + [320] * 3


@pytest.mark.parametrize(
    ("layers", "shared", "first", "sources"),
    [(35, 20, 15, {13, 14}), (42, 18, 24, {22, 23})],
    ids=["E2B", "E4B"],
)
def test_published_models_share_the_last_layers_of_each_kind(layers, shared, first, sources):
    pattern = 5 if layers == 35 else 6
    types = [SLIDING if (i + 1) % pattern else FULL for i in range(layers)]
    config = parse(SHARING | {"num_hidden_layers": layers, "num_kv_shared_layers": shared, "layer_types": types})
    assert config.first_sharing == first
    assert {layer.cache_from for layer in config.layers[first:]} == sources
    assert {config.layers[source].kind for source in sources} == {SLIDING, FULL}
    assert all(config.layers[layer.cache_from].kind == layer.kind for layer in config.layers[first:])


def changed(path, change):
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return path


def test_keys_and_values_of_layers_that_share_others_are_listed_and_not_read(tmp_path):
    extra = {f"model.layers.5.self_attn.{name}.weight": torch.zeros(64, 64) for name in ("k_proj", "v_proj")}
    path = write_tiny_checkpoint(tmp_path / "ck", "gemma4_text", **TINY_PER_LAYER)
    checkpoint = Checkpoint.open(changed(path, lambda tensors: tensors.update(extra)))
    assert not set(extra) & set(checkpoint.tensors)
    note = next(note for note in checkpoint.notes if "share keys and values" in note)
    assert note.startswith("2 tensor(s) of layers that share")
    assert all(name in note for name in extra)


def test_a_file_without_the_keys_that_are_shared_is_refused(tmp_path):
    name = "model.layers.3.self_attn.k_proj.weight"
    path = write_tiny_checkpoint(tmp_path / "ck", "gemma4_text", **TINY_PER_LAYER)
    with pytest.raises(CheckpointError, match=rf"missing: {name}"):
        Checkpoint.open(changed(path, lambda tensors: tensors.pop(name)))


def test_a_per_layer_table_of_another_width_is_refused(tmp_path):
    name = "model.embed_tokens_per_layer.weight"
    path = write_tiny_checkpoint(tmp_path / "ck", "gemma4_text", **TINY_PER_LAYER)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(changed(path, lambda tensors: tensors.update({name: tensors[name][:, :96].contiguous()})))
    assert f"{name} is [512, 96], config.json calls for [512, 224]" in str(caught.value)


def test_images_do_not_change_what_text_sees():
    assert parse(TINY | {"use_bidirectional_attention": "vision"}).layers == parse(TINY).layers


def test_the_last_layer_sees_everything_as_in_transformers():
    config = parse(TINY | {"layer_types": [SLIDING] * 7})
    assert config.layer_types == (SLIDING,) * 6 + (FULL,)
    assert "whatever layer_types says" in config.warnings[0]
