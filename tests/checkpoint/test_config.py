"""ModelConfig: what a config may leave out, both rope spellings, and every refusal with its words."""

import json
import re
from pathlib import Path

import pytest

from gemma_deploy.architectures import DRAFTERS, model_types, multimodal_types
from gemma_deploy.architectures.relatives import RELATIVES
from gemma_deploy.checkpoint import ModelConfig, Rope, expected_tensors
from gemma_deploy.errors import CheckpointError
from tests.checkpoint.make import config

SLIDING, FULL = "sliding_attention", "full_attention"
TANH = "gelu_pytorch_tanh"


def parse(raw):
    return ModelConfig.from_dict(raw, "config.json")


def refusal(raw):
    with pytest.raises(CheckpointError) as caught:
        parse(raw)
    return str(caught.value)


def test_gemma1_has_full_attention_and_scales_by_head_dim():
    parsed = parse(config(hidden_act="gelu", hidden_activation=None))
    assert parsed.layer_types == (FULL,) * 3
    assert parsed.query_pre_attn_scalar == 8
    assert parsed.sliding_window is None
    assert parsed.rope == {FULL: Rope(10000.0)}
    assert parsed.attn_logit_softcapping is None


def test_gemma2_layer_zero_slides_and_caps_are_on():
    parsed = parse(config("gemma2"))
    assert parsed.layer_types == (SLIDING, FULL, SLIDING)
    assert (parsed.attn_logit_softcapping, parsed.final_logit_softcapping) == (50.0, 30.0)
    assert parsed.rope == {FULL: Rope(10000.0), SLIDING: Rope(10000.0)}


def test_gemma3_full_layers_close_each_pattern():
    parsed = parse(config("gemma3_text", num_hidden_layers=13, sliding_window_pattern=6))
    assert [i for i, kind in enumerate(parsed.layer_types) if kind == FULL] == [5, 11]
    assert parsed.rope == {FULL: Rope(1e6), SLIDING: Rope(1e4)}


def test_layer_types_win_over_the_pattern():
    parsed = parse(config("gemma3_text", layer_types=[FULL, SLIDING, SLIDING]))
    assert parsed.layer_types == (FULL, SLIDING, SLIDING)


def test_both_rope_spellings_say_the_same():
    old = config("gemma3_text", rope_scaling={"rope_type": "linear", "factor": 8.0})
    new = config("gemma3_text", rope_theta=None, rope_local_base_freq=None)
    del new["rope_theta"], new["rope_local_base_freq"]
    new["rope_parameters"] = {
        FULL: {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
        SLIDING: {"rope_theta": 1e4, "rope_type": "default"},
    }
    assert parse(old).rope == parse(new).rope == {FULL: Rope(1e6, 8.0), SLIDING: Rope(1e4)}


def test_gemma1_rope_in_the_flat_new_spelling():
    raw = config(rope_parameters={"rope_theta": 500.0, "rope_type": "default"})
    assert parse(raw).rope == {FULL: Rope(500.0)}


@pytest.mark.parametrize("model_type", ["gemma", "gemma2", "gemma3_text"])
def test_agrees_with_transformers(model_type):
    transformers = pytest.importorskip("transformers")
    raw = config(model_type, num_hidden_layers=7)
    classes = {"gemma": "GemmaConfig", "gemma2": "Gemma2Config", "gemma3_text": "Gemma3TextConfig"}
    theirs = getattr(transformers, classes[model_type])(**raw)
    ours = parse(raw)
    assert list(ours.layer_types) == (getattr(theirs, "layer_types", None) or [FULL] * 7)
    for kind, rope in ours.rope.items():
        parameters = theirs.rope_parameters
        assert parameters.get(kind, parameters)["rope_theta"] == rope.theta
    for key in ("attn_logit_softcapping", "final_logit_softcapping", "tie_word_embeddings", "rms_norm_eps"):
        assert getattr(theirs, key, None) == getattr(ours, key)


@pytest.mark.parametrize(
    ("model_type", "changes", "expected"),
    [
        ("gemma", {}, TANH),
        ("gemma", {"hidden_act": "gelu", "hidden_activation": None}, TANH),
        ("gemma", {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu"}, TANH),
        ("gemma2", {"hidden_activation": "gelu"}, "gelu"),
        ("gemma2", {"hidden_activation": TANH, "hidden_act": "gelu"}, TANH),
        ("gemma2", {"hidden_act": "silu"}, TANH),
        ("gemma3_text", {"hidden_activation": "gelu"}, "gelu"),
        ("gemma3_text", {}, TANH),
    ],
)
def test_the_activation_is_the_one_that_transformers_computes(model_type, changes, expected):
    import transformers

    classes = {"gemma": "GemmaConfig", "gemma2": "Gemma2Config", "gemma3_text": "Gemma3TextConfig"}
    theirs = getattr(transformers, classes[model_type])(**config(model_type, **changes))
    assert (theirs.hidden_act if model_type == "gemma" else theirs.hidden_activation) == expected
    assert parse(config(model_type, **changes)).hidden_activation == expected


@pytest.mark.parametrize(("value", "said"), [(None, "got None"), ("silu", "got 'silu'"), (["gelu"], "got ['gelu']")])
@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
def test_another_activation_is_refused_by_its_key(model_type, value, said):
    refused = refusal(config(model_type, hidden_activation=value))
    assert f"hidden_activation: {said}, expected gelu_pytorch_tanh" in refused


def test_every_problem_is_listed_at_once():
    raw = config(num_attention_heads=3, hidden_size="16", rms_norm_eps=-1, attention_bias=True, bos_token_id=40)
    del raw["vocab_size"], raw["head_dim"]
    text = refusal(raw)
    for part in (
        "config.json: 6 wrong or missing key(s)",
        "vocab_size is missing",
        "head_dim is missing",
        "hidden_size: got '16', expected a whole number",
        "num_attention_heads 3 is not divisible by num_key_value_heads 2",
        "rms_norm_eps: got -1, expected a positive number",
        "attention_bias: got True",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": True}, "num_hidden_layers: got True"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: got 1000000000, expected a whole number from 1 to 1024"),
        ({"num_key_value_heads": 0}, "num_key_value_heads: got 0"),
        ({"head_dim": 7}, "head_dim: got 7, expected an even number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: got nan"),
        ({"rope_theta": float("inf")}, "rope_theta: got inf"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type: got 'yarn'"),
        ({"rope_scaling": {"type": "linear"}}, "factor: got None"),
        ({"rope_scaling": 8}, "rope_scaling: got 8, expected an object"),
        ({"rope_scaling": {"factor": 8.0}}, "rope_scaling rope_type: got None, expected linear, beside its factor"),
        ({"rope_parameters": {"factor": 8.0}}, "rope_parameters rope_type: got None, expected linear, beside its"),
        ({"rope_parameters": {FULL: 3}}, "rope_parameters.full_attention: got 3"),
        ({"layer_types": ["full"] * 3}, "layer_types: got ['full'"),
        ({"layer_types": [FULL] * 2}, "layer_types: got '2 entries', expected 3, one per layer"),
        ({"layer_types": [SLIDING] * 3}, "Gemma 1 has no window"),
        ({"layer_types": [[]] * 3}, "layer_types: got"),
        ({"eos_token_id": [1, 99]}, "eos_token_id: got 99, expected a token id from 0 to 39"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings: got 1, expected true or false"),
        ({"hidden_act": "silu"}, "hidden_act: got 'silu', expected gelu_pytorch_tanh"),
        ({"hidden_act": None}, "hidden_act: got None"),
        ({"hidden_act": []}, "hidden_act: got []"),
        ({"quantization_config": {"quant_method": "hqq"}}, "already quantized (hqq)"),
        ({"quantization_config": True}, "quantization_config: got True, expected an object"),
        ({"quantization_config": {"quant_method": "awq", "version": "gemv"}}, "awq codes packed as 'gemv'"),
        (
            {"quantization_config": {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}},
            "compressed-tensors codes packed as 'nvfp4-pack-quantized'",
        ),
        (
            {"quantization_config": {"quant_method": "compressed-tensors", "format": "float-quantized"}},
            "float-quantized (fp8 weights)",
        ),
        ({"use_bidirectional_attention": True}, "only causal models"),
    ],
)
def test_refusals_name_the_key(changes, words):
    assert words in refusal(config(**changes))


def test_gemma3_needs_its_window_and_rope_per_layer_type():
    raw = config("gemma3_text", rope_parameters={"rope_theta": 1e4})
    del raw["sliding_window"]
    text = refusal(raw)
    assert "sliding_window is missing" in text
    assert "rope_parameters: got ['rope_theta'], expected one entry per layer type" in text


@pytest.mark.parametrize(
    ("model_type", "said"),
    [
        ("diffusion_gemma", "DiffusionGemma, which fills blocks of tokens in any order, is not built"),
        ("t5gemma2", "T5Gemma 2, an encoder and a decoder, is not built"),
        ("recurrent_gemma", "RecurrentGemma, whose recurrent layers keep a state in place of keys and values, is not"),
        ("gemma4_vision", "the vision part of Gemma 4, an encoder of images, is not built"),
        ("gemma4_audio", "the audio part of Gemma 4, an encoder of sound, is not built"),
    ],
)
def test_relatives_that_are_not_built_are_refused_by_name(model_type, said):
    for raw in ({"model_type": model_type}, {"model_type": model_type, "text_config": {"model_type": model_type}}):
        assert said in refusal(raw)


def test_every_gemma_of_transformers_is_built_or_told():
    transformers = pytest.importorskip("transformers")
    installed = Path(transformers.__file__).parent / "models"
    kinds = {
        found
        for path in installed.glob("*gemma*/configuration_*.py")
        for found in re.findall(r'^    model_type = "(.+)"$', path.read_text("utf-8"), re.MULTILINE)
    }
    assert len(kinds) > 15
    built = {*model_types(), *multimodal_types(), *(row.model_type for row in DRAFTERS)}
    assert kinds <= built | set(RELATIVES)
    assert not built & set(RELATIVES)


def test_unknown_model_type_suggests_the_nearest():
    assert "unknown model_type 'gema2'; the nearest known one is 'gemma2'" in refusal(config("gema2"))
    assert "unknown model_type 'llama'\n" in refusal(config("llama"))
    assert "model_type is missing" in refusal({})
    assert "unknown model_type ['gemma']" in refusal({"model_type": ["gemma"]})


def test_gemma2_9b_with_224_warns():
    parsed = parse(config("gemma2", hidden_size=3584, head_dim=256, num_attention_heads=16, query_pre_attn_scalar=224))
    assert parsed.query_pre_attn_scalar == 224
    assert "was trained with 256" in parsed.warnings[0]
    assert parse(config("gemma2", hidden_size=3584, head_dim=256, query_pre_attn_scalar=256)).warnings == ()


def test_absent_attention_scalar_warns():
    raw = config("gemma2")
    del raw["query_pre_attn_scalar"]
    assert parse(raw).query_pre_attn_scalar == 256
    assert "Gemma 3 27B 168" in parse(raw).warnings[0]


def test_to_dict_is_plain_json():
    plain = parse(config("gemma3_text")).to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["rope"][FULL] == {"theta": 1e6, "factor": 1.0}
    assert "raw" not in plain


@pytest.mark.parametrize(("model_type", "per_layer"), [("gemma", 9), ("gemma2", 11), ("gemma3_text", 13)])
def test_expected_tensors_are_the_stock_class_own(model_type, per_layer):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    raw = config(model_type, tie_word_embeddings=False)
    classes = {"gemma": "Gemma", "gemma2": "Gemma2", "gemma3_text": "Gemma3"}
    configs = {"gemma": "GemmaConfig", "gemma2": "Gemma2Config", "gemma3_text": "Gemma3TextConfig"}
    with torch.device("meta"):
        model = getattr(transformers, classes[model_type] + "ForCausalLM")(
            getattr(transformers, configs[model_type])(**raw)
        )
    stock = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    ours = expected_tensors(parse(raw))
    assert ours == stock
    assert len(ours) == 3 * per_layer + 3
    assert "lm_head.weight" not in expected_tensors(parse(config(model_type)))
