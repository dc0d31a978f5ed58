"""Gemma 3 4B, 12B and 27B as published: a text model inside a model of text and images."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from gemma_deploy.architectures.gemma3 import TEXT_DEFAULTS
from gemma_deploy.checkpoint import Checkpoint, ModelConfig
from gemma_deploy.compile import compile_recipe
from gemma_deploy.errors import CheckpointError
from gemma_deploy.recipe import Recipe
from gemma_deploy.staging import stage_checkpoint
from tests.calibration.make import write_tokenizer

# What the published files say of their language model; the rest is the class's default.
PUBLISHED = {
    "4b": {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34},
    "12b": {"hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48, "num_attention_heads": 16,
            "num_key_value_heads": 8},
    "27b": {"hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 62, "num_attention_heads": 32,
            "num_key_value_heads": 16, "head_dim": 128, "query_pre_attn_scalar": 168},
}  # fmt: skip
EVERY = {"model_type": "gemma3_text", "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
TEXT = {
    "model_type": "gemma3_text", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 7,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 32, "patch_size": 8}  # fmt: skip
IMAGE = {"mm_tokens_per_image": 4, "image_token_index": 90, "boi_token_index": 91, "eoi_token_index": 92}
SPELLINGS = ("language_model.model.", "model.language_model.")


@pytest.fixture(scope="module")
def model():
    """(tied) -> a Gemma of text and images, bfloat16, every norm weight random."""
    made = {}

    def get(tied=True):
        if tied not in made:
            torch.manual_seed(0)
            config = transformers.Gemma3Config(
                text_config=dict(TEXT), vision_config=dict(VISION), tie_word_embeddings=tied, **IMAGE
            )
            config._attn_implementation = "eager"
            found = transformers.Gemma3ForConditionalGeneration(config)
            with torch.no_grad():
                for name, value in found.named_parameters():
                    if name.endswith("norm.weight"):
                        value.normal_(0, 0.3)
            made[tied] = found.to(torch.bfloat16).eval()
        return made[tied]

    return get


@pytest.fixture
def published(model, tmp_path):
    """(tied, spelling) -> a directory as the published ones are: class defaults left out of config.json."""

    def write(tied=True, spelling=SPELLINGS[0]):
        path = tmp_path / "ck"
        model(tied).save_pretrained(path)
        file = path / "model.safetensors"
        tensors = load_file(file)
        assert any(name.startswith("language_model.model.") for name in tensors)
        renamed = {re.sub(r"^language_model\.model\.", spelling, name): value for name, value in tensors.items()}
        save_file(renamed, file, {"format": "pt"})
        config = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": TEXT,
                  "vision_config": VISION, "torch_dtype": "bfloat16", "eos_token_id": [1, 5], **IMAGE}  # fmt: skip
        (path / "config.json").write_text(json.dumps(config if tied else config | {"tie_word_embeddings": False}))
        write_tokenizer(path)
        return path

    return write


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_configs_are_read_as_transformers_reads_them(size):
    raw = {
        "model_type": "gemma3",
        "text_config": EVERY | PUBLISHED[size],
        "vision_config": {},
        "eos_token_id": [1, 5],
    }
    config = ModelConfig.from_dict(raw, "config.json")
    stock = transformers.AutoConfig.for_model(**raw).text_config
    same = set(TEXT_DEFAULTS) - {"hidden_activation"}
    assert {key: getattr(config, key) for key in same} == {key: getattr(stock, key) for key in same}
    assert list(config.layer_types) == stock.layer_types
    for kind, rope in config.rope.items():
        assert rope.theta == stock.rope_parameters[kind]["rope_theta"]
        assert rope.factor == stock.rope_parameters[kind].get("factor", 1.0)
    assert config.eos_token_ids == (1, 5)
    assert config.tie_word_embeddings
    assert not config.warnings


def test_what_is_left_out_is_the_class_s_default():
    stock = transformers.Gemma3TextConfig()
    assert {key: getattr(stock, key) for key in TEXT_DEFAULTS} == TEXT_DEFAULTS
    assert ModelConfig.from_dict({"model_type": "gemma3"}, "config.json").num_hidden_layers == stock.num_hidden_layers


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("tied", [True, False])
def test_the_language_model_is_read_and_nothing_else(published, model, tied, spelling):
    checkpoint = Checkpoint.open(published(tied, spelling))
    for name, value in model(tied).model.language_model.state_dict().items():
        np.testing.assert_array_equal(checkpoint.rows(f"model.{name}", 0, len(value)), value.float().numpy())
    config = checkpoint.config
    assert (config.model_type, config.tie_word_embeddings) == ("gemma3_text", tied)
    head = model(tied).lm_head.weight.detach().float().numpy()
    np.testing.assert_array_equal(checkpoint.rows(config.head_weight, 0, len(head)), head)
    notes = "\n".join(checkpoint.notes)
    count = len(model(tied).model.language_model.state_dict()) + (not tied)
    assert f"{count} tensors are those of the language model in a model that reads images" in notes
    assert "tensor(s) of vision_tower are ignored" in notes
    assert "tensor(s) of multi_modal_projector are ignored" in notes
    assert not any("vision" in name for name in checkpoint.tensors)


def test_names_of_the_larger_model_in_a_text_model_s_directory(published):
    path = published()
    (path / "config.json").write_text(json.dumps(Checkpoint.open(path).config_dict()))
    assert Checkpoint.open(path).config.model_type == "gemma3_text"


@pytest.mark.parametrize("tied", [True, False])
def test_staged_it_computes_what_the_larger_model_does_with_text(published, tmp_path, tied):
    path = published(tied)
    stock = transformers.Gemma3ForConditionalGeneration.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )
    staged = stage_checkpoint(path, tmp_path / "staged")
    names = load_file(staged / "model.safetensors")
    assert {value.dtype for value in names.values()} == {torch.bfloat16}
    assert not any("vision" in name or "language_model" in name for name in names)
    patched, told = transformers.AutoModelForCausalLM.from_pretrained(
        staged, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
    )
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert type(patched).__module__.endswith("modeling_gemma3_vacc")
    tokens = torch.randint(93, 512, (2, 40))  # five windows of 8
    with torch.inference_mode():
        got = patched(tokens).logits
        wanted = stock(input_ids=tokens, token_type_ids=torch.zeros_like(tokens)).logits
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_it_compiles_proven_to_a_text_artifact(published, tmp_path):
    recipe = {
        "name": "nested",
        "frontend": {"checkpoint": str(published()), "shape": {"input_ids": [[64], [96]]}},
        "backend": {"type": "onnxruntime", "dtype": "fp32"},
        "parity": {"prompt_tokens": 40, "decode_tokens": 8},
        "workspace": {"path": str(tmp_path)},
    }
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))  # JSON is YAML
    result = compile_recipe(Recipe.load(tmp_path / "recipe.json"))
    assert result.parity.passed
    config = json.loads((result.path / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("gemma3_text", ["Gemma3ForCausalLM"])
    assert not {"text_config", "vision_config", "image_token_index"} & set(config)
    assert json.loads((result.path / "manifest.json").read_text())["model"]["eos_token_ids"] == [1, 5]


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (
            {"model_type": "idefics3", "text_config": {"model_type": "gemma"}},
            "of text and images that is not built",
        ),
        ({"model_type": "gemma3_text", "text_config": {}}, "among gemma3"),
        ({"model_type": "gemma3", "text_config": []}, "whose model_type is gemma3_text"),
        (
            {"model_type": "gemma3", "text_config": {"model_type": "gemma2"}},
            "whose model_type is gemma3_text",
        ),
        ({"model_type": "gemma3", "quantization_config": {"quant_method": "hqq"}}, r"already quantized \(hqq\)"),
        ({"model_type": "gemma3", "text_config": {"hidden_size": "x"}}, "hidden_size: got 'x'"),
    ],
)
def test_refusals_say_where(raw, words):
    with pytest.raises(CheckpointError, match=words) as refused:
        ModelConfig.from_dict(raw, "config.json")
    assert "config.json" in str(refused.value)
    assert refused.value.next_step


def test_two_spellings_of_one_tensor_are_refused(published):
    path = published()
    tensors = load_file(path / "model.safetensors")
    tensors["model.language_model.norm.weight"] = tensors["language_model.model.norm.weight"].clone()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="are one tensor of the model"):
        Checkpoint.open(path)


def test_the_config_has_nothing_left_of_the_larger_model(published):
    checkpoint = Checkpoint.open(published())
    assert dataclasses.is_dataclass(checkpoint.config)
    assert ModelConfig.from_dict(checkpoint.config_dict(), "again") == checkpoint.config
