"""Adapters are read as they were written, and what is wrong with one is told, all of it, before any work."""

import json
import re

import numpy as np
import pytest

from gemma_deploy.checkpoint.adapters import Adapter, LowRank, Replaced, TokenRows
from gemma_deploy.checkpoint.adapters.settings import AdapterSettings
from gemma_deploy.errors import CheckpointError
from tests.checkpoint.adapters.make import DOWN, HEAD, PREFIX, TABLE, Q, factors, model, pair, settings, write_adapter
from tests.checkpoint.make import to_bf16

NAME = "model.layers.0.self_attn.q_proj.weight"


def refused(directory, config=None, **names):
    with pytest.raises(CheckpointError) as caught:
        Adapter.open(directory, config or model(), **names)
    return str(caught.value)


def test_factors_are_those_of_the_file(tmp_path):
    tensors = factors()
    adapter = Adapter.open(write_adapter(tmp_path, tensors, r=4, lora_alpha=6), model())
    assert set(adapter.updates) == {NAME, "model.layers.2.mlp.down_proj.weight"}
    update = adapter.updates[NAME]
    assert isinstance(update, LowRank)
    assert (update.r, update.scaling, update.shape) == (4, 1.5, (32, 16))
    np.testing.assert_array_equal(update.a(), tensors[f"{Q}.lora_A.weight"])
    np.testing.assert_array_equal(update.b(), tensors[f"{Q}.lora_B.weight"])
    np.testing.assert_array_equal(update.b_rows(5, 9), tensors[f"{Q}.lora_B.weight"][5:9])
    assert (adapter.settings.r, adapter.settings.lora_alpha, adapter.bases) == (4, 6, {})
    assert adapter.settings.base == "google/gemma-2b"


def test_16_bit_factors_are_read_exactly(tmp_path):
    tensors = factors()
    adapter = Adapter.open(write_adapter(tmp_path, tensors, dtype="BF16"), model())
    expected = (to_bf16(tensors[f"{Q}.lora_A.weight"]).astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(adapter.updates[NAME].a(), expected)


def test_factors_of_an_embedding_are_turned_round(tmp_path):
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal((4, 40), np.float32), rng.standard_normal((16, 4), np.float32)
    tensors = {f"{TABLE}.lora_embedding_A": a, f"{TABLE}.lora_embedding_B": b}
    adapter = Adapter.open(write_adapter(tmp_path, tensors), model())
    update = adapter.updates["model.embed_tokens.weight"]
    assert update.shape == (40, 16)
    np.testing.assert_array_equal(update.b(), a.T)
    np.testing.assert_array_equal(update.b_rows(7, 33), a.T[7:33])
    np.testing.assert_array_equal(update.a(), b.T)


@pytest.mark.parametrize(
    ("fields", "scaling"),
    [
        ({"r": 4, "lora_alpha": 8}, 2.0),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, 4.0),
        ({"r": 9, "rank_pattern": {"q_proj": 4, "down_proj": 4}, "lora_alpha": 8}, 2.0),
        ({"lora_alpha": 8, "alpha_pattern": {r"layers\.0\..*": 2}}, 0.5),
        ({"lora_alpha": 8, "alpha_pattern": {"proj": 2}}, 2.0),  # the end of the path, from a dot on
        ({"lora_alpha": 8, "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 2}}, 0.5),
        ({"lora_alpha": 8, "alpha_pattern": {"^self_attn.q_proj": 2}}, 2.0),
        ({"lora_alpha": 8, "alpha_pattern": {"model.layers.0.self_attn.q_proj": 2, "q_proj": 16}}, 0.5),
    ],
)
def test_scaling(tmp_path, fields, scaling):
    assert Adapter.open(write_adapter(tmp_path, **fields), model()).updates[NAME].scaling == scaling


def test_two_patterns_that_match_one_module_are_told(tmp_path):
    directory = write_adapter(tmp_path, alpha_pattern={"model.layers.0.self_attn.q_proj": 2, "q_proj": 16})
    (note,) = [note for note in Adapter.open(directory, model()).notes if "alpha_pattern" in note]
    assert "'model.layers.0.self_attn.q_proj' and 'q_proj' both match 1 module(s)" in note
    same = write_adapter(tmp_path / "same", alpha_pattern={"model.layers.0.self_attn.q_proj": 2, "q_proj": 2})
    assert not any("alpha_pattern" in note for note in Adapter.open(same, model()).notes)


def test_the_multimodal_class_is_taken_over_and_told(tmp_path):
    inside = {name.replace(".model.layers", ".model.language_model.layers"): one for name, one in factors().items()}
    tower = pair(f"{PREFIX}model.vision_tower.encoder.layers.0.self_attn.q_proj", (8, 8))
    pattern = {"model.language_model.layers.0.self_attn.q_proj": 2}
    directory = write_adapter(tmp_path, inside | tower, alpha_pattern=pattern)
    adapter = Adapter.open(directory, model())
    assert set(adapter.updates) == {NAME, "model.layers.2.mlp.down_proj.weight"}
    assert adapter.updates[NAME].scaling == 0.5  # patterns are about the model that was trained
    assert any("multimodal class" in note for note in adapter.notes)
    assert any("2 tensor(s) of vision_tower" in note for note in adapter.notes)


@pytest.mark.parametrize("inside", ["language_model.model.", "", "model."])
def test_other_names_of_the_text_model(tmp_path, inside):
    named = {name.replace(f"{PREFIX}model.", f"{PREFIX}{inside}"): one for name, one in factors().items()}
    assert NAME in Adapter.open(write_adapter(tmp_path, named), model()).updates


def test_whole_modules_and_rows(tmp_path):
    norm = {f"{PREFIX}model.layers.1.input_layernorm.weight": np.ones(16, np.float32)}
    rows = {f"{TABLE}.token_adapter.trainable_tokens_delta": np.ones((2, 16), np.float32)}
    fields = {"modules_to_save": ["input_layernorm"], "trainable_token_indices": [3, 39]}
    untied = model(tie_word_embeddings=False)
    adapter = Adapter.open(write_adapter(tmp_path, factors() | norm | rows, **fields), untied)
    assert isinstance(adapter.updates["model.layers.1.input_layernorm.weight"], Replaced)
    update = adapter.updates["model.embed_tokens.weight"]
    assert isinstance(update, TokenRows)
    assert update.indices == (3, 39)
    assert "lm_head.weight" not in adapter.updates
    tied = Adapter.open(tmp_path, model())
    assert tied.updates["lm_head.weight"] == tied.updates["model.embed_tokens.weight"]


def test_a_table_under_the_factors_is_no_update(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        f"{TABLE}.base_layer.weight": rng.standard_normal((48, 16), np.float32),
        f"{TABLE}.lora_embedding_A": rng.standard_normal((4, 48), np.float32),
        f"{TABLE}.lora_embedding_B": rng.standard_normal((16, 4), np.float32),
    }
    adapter = Adapter.open(write_adapter(tmp_path, tensors), model())
    assert adapter.bases["model.embed_tokens.weight"].entry.shape == (48, 16)
    assert adapter.updates["model.embed_tokens.weight"].shape == (48, 16)


def test_the_fingerprint_is_of_both_files(tmp_path):
    first = Adapter.open(write_adapter(tmp_path / "a"), model()).fingerprint()
    assert Adapter.open(write_adapter(tmp_path / "b"), model()).fingerprint() == first
    assert Adapter.open(write_adapter(tmp_path / "c", lora_alpha=9), model()).fingerprint() != first
    changed = factors()
    changed[f"{DOWN}.lora_B.weight"][-1, -1] += 1
    assert Adapter.open(write_adapter(tmp_path / "d", changed), model()).fingerprint() != first


REFUSED = {
    "alora_invocation_tokens": [1, 2],
    "arrow_config": {"top_k": 3},
    "kasa_config": {"beta": 1e-4},
    "layer_replication": [[0, 2]],
    "megatron_config": {"tp": 1},
    "monteclora_config": {"num_samples": 8},
    "target_parameters": ["experts.gate_up_proj"],
    "use_bdlora": {"nblocks": 2},
    "use_qalora": True,
    "velora_config": {"num_groups": 64},
}


@pytest.mark.parametrize("field", REFUSED)
def test_fields_that_change_the_maths_are_refused_by_name(tmp_path, field):
    message = refused(write_adapter(tmp_path, **{field: REFUSED[field]}))
    assert f"{field} is set: it" in message or f"{field} is set: its" in message


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "PiSSA", "olora", "corda", "loftq", "lora_ga"])
def test_starts_that_change_the_base_are_refused(tmp_path, start):
    message = refused(write_adapter(tmp_path, init_lora_weights=start))
    assert "changes the base's own weights" in message
    assert "path_initial_model_for_weight_conversion" in message


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_other_starts_pass(tmp_path, start):
    assert NAME in Adapter.open(write_adapter(tmp_path, init_lora_weights=start), model()).updates


def test_unknown_fields_are_refused_where_they_are_set(tmp_path):
    ok = write_adapter(tmp_path / "a", use_new_thing=False, new_config=None, new_list=[])
    assert NAME in Adapter.open(ok, model()).updates
    assert "'use_new_thing' is set to True: this field is not known here" in refused(
        write_adapter(tmp_path / "b", use_new_thing=True)
    )


@pytest.mark.parametrize("kind", ["LOHA", "IA3", "PROMPT_TUNING", "VERA", "TRAINABLE_TOKENS", None, 3])
def test_other_kinds_are_refused(tmp_path, kind):
    assert f"the adapter's peft_type is {kind!r}" in refused(write_adapter(tmp_path, peft_type=kind))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"r": 0}, "r: 0, expected a whole number"),
        ({"r": "8"}, "r: '8', expected a whole number"),
        ({"r": True}, "r: True, expected"),
        ({"lora_alpha": None}, "lora_alpha: None, expected a number"),
        ({"use_dora": "yes"}, "use_dora: 'yes', expected true or false"),
        ({"modules_to_save": "lm_head"}, "modules_to_save: 'lm_head', expected a list of names"),
        ({"rank_pattern": {"q_proj": 1.5}}, "rank_pattern: 1.5 of 'q_proj', expected a whole number"),
        ({"alpha_pattern": [1]}, "alpha_pattern: [1], expected a number for each regular expression"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern: '(' is no regular expression"),
        ({"alpha_pattern": {"(a+)+b": 1}}, "repeats a group"),
        ({"alpha_pattern": {".*" * 20: 1}}, "could take for ever to match"),
        ({"alpha_pattern": {"(.|.)" * 30: 1}}, "could take for ever to match"),
        ({"alpha_pattern": {".?" * 200: 1}}, "could take for ever to match"),
        ({"trainable_token_indices": [1, 1]}, "trainable_token_indices: [1, 1], expected a list of token ids"),
        ({"trainable_token_indices": {"embed_tokens": [-1]}}, "expected a list of token ids"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path: 3, expected a path or a name"),
    ],
)
def test_values_are_checked(tmp_path, fields, said):
    assert said in refused(write_adapter(tmp_path, **fields))


def test_wrong_fields_are_told_together(tmp_path):
    message = refused(write_adapter(tmp_path, r=0, use_qalora=True, init_lora_weights="pissa", something=1))
    assert "4 field(s)" in message
    assert len(re.findall(r"^  - ", message, re.MULTILINE)) == 4


def without(*names):
    return {name: one for name, one in factors().items() if name not in names}


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (without(f"{Q}.lora_B.weight"), f"half of a pair: {Q}.lora_A.weight is there, and no lora_B beside it"),
        (without(f"{Q}.lora_A.weight"), f"half of a pair: {Q}.lora_B.weight is there, and no lora_A beside it"),
        (factors() | {f"{Q}.lora_A.weight": np.ones((3, 16))}, "ranks do not multiply"),
        (factors() | pair(Q, (32, 16), r=3), "is of rank 3, adapter_config.json says 4"),
        (factors() | pair(Q, (32, 20)), "are of a weight [32, 20], model.layers.0.self_attn.q_proj.weight is [32, 16]"),
        (factors() | {f"{Q}.lora_A.weight": np.zeros(0)}, "is empty or no matrix"),
        (factors() | {f"{Q}.lora_A.weight": np.full((4, 16), np.nan)}, f"{Q}.lora_A.weight holds NaN"),
        (factors() | {f"{Q}.lora_B.weight": np.full((32, 4), np.inf)}, f"{Q}.lora_B.weight holds infinity"),
        (pair(f"{PREFIX}model.layers.9.mlp.up_proj", (24, 16)), "unexpected: base_model.model.model.layers.9.mlp.up_p"),
        (pair("model.layers.0.self_attn.q_proj", (32, 16)), "unexpected: model.layers.0.self_attn.q_proj.lora_A"),
        (pair(TABLE, (40, 16)), "model.embed_tokens is an embedding"),
        (pair(f"{PREFIX}model.norm", (16, 16)), "model.norm is no linear"),
        (factors() | {f"{Q}.lora_B.bias": np.ones(32)}, f"{Q}.lora_B.bias is a bias that is not zero: the linears of"),
        (factors() | {f"{Q}.lora_B.bias": np.array(1.0)}, f"{Q}.lora_B.bias is no vector"),
        (factors() | {f"{Q}.base_layer.bias": np.ones(32)}, f"{Q}.base_layer.bias is a bias that is not zero: the lin"),
        (factors() | {f"{Q}.lora_magnitude_vector": np.ones(32)}, "is there, and use_dora is not set"),
        (factors() | {f"{Q}.weight": np.ones((32, 16))}, f"{Q}.weight replaces"),
        (factors() | {f"{PREFIX}model.norm.weight": np.ones(17)}, "wrong shape: base_model.model.model.norm.weight"),
        (factors() | {f"{PREFIX}score.weight": np.ones((2, 16))}, "unexpected: base_model.model.score.weight [2, 16]"),
        (factors() | {f"{PREFIX}model.language_model.layers.2.mlp.down_proj.lora_A.weight": np.ones((4, 24))}, "twice"),
        ({}, "it holds no tensor that changes the model"),
        (
            {f"{TABLE}.lora_embedding_A": np.ones((4, 48)), f"{TABLE}.lora_embedding_B": np.ones((16, 4))},
            "is of 48 tokens, the model has 40, and the file holds no table of its own",
        ),
    ],
)
def test_tensors_are_checked(tmp_path, tensors, said):
    assert said in refused(write_adapter(tmp_path, tensors))


@pytest.mark.parametrize(
    ("fields", "tensors", "said"),
    [
        (
            {"use_dora": True},
            {},
            "half of a pair: use_dora is set, and model.layers.0.self_attn.q_proj has no lora_magn",
        ),
        (
            {"use_dora": True},
            {f"{Q}.lora_magnitude_vector": np.ones(31)},
            "lora_magnitude_vector is [31], expected [32]",
        ),
        ({"modules_to_save": ["lm_head"]}, {}, "modules_to_save names 'lm_head', and the file holds no such module"),
        ({"trainable_token_indices": [1]}, {}, "trainable_token_indices is set, and the file has none of"),
        (
            {"trainable_token_indices": [1, 40]},
            {f"{TABLE}.token_adapter.trainable_tokens_delta": np.ones((2, 16))},
            "row 40 is trained, model.embed_tokens.weight has 40",
        ),
        (
            {"trainable_token_indices": [1]},
            {f"{TABLE}.token_adapter.trainable_tokens_delta": np.ones((2, 16))},
            "is [2, 16], trainable_token_indices calls for [1, 16]",
        ),
        (
            {"modules_to_save": ["embed_tokens"]},
            {f"{TABLE}.weight": np.ones((48, 16))},
            "the token table has 48 rows and the head 40",
        ),
        (
            {},
            {f"{TABLE}.weight": np.ones((40, 16)), f"{HEAD}.weight": np.zeros((40, 16))},
            "differ, and config.json ties table and head",
        ),
    ],
)
def test_fields_and_tensors_go_together(tmp_path, fields, tensors, said):
    assert said in refused(write_adapter(tmp_path, factors() | tensors, **fields))


def test_wrong_tensors_are_told_together(tmp_path):
    tensors = without(f"{Q}.lora_B.weight") | pair(f"{PREFIX}model.layers.0.mlp.up_proj", (24, 20))
    message = refused(write_adapter(tmp_path, tensors))
    assert "2 thing(s)" in message
    for said in ("half of a pair", "[24, 20]", "its base is google/gemma-2b"):
        assert said in message


def test_another_base_is_a_note_where_it_fits(tmp_path):
    directory = write_adapter(tmp_path, base_model_name_or_path="/models/gemma-2b-it/")
    (note,) = Adapter.open(directory, model(), names=("/x/gemma-2b",)).notes
    assert "its base is /models/gemma-2b-it/, and this is /x/gemma-2b" in note
    assert Adapter.open(directory, model(), names=("gemma-2b-it",)).notes == ()
    cached = ("/hub/models--google--gemma-2b-it/snapshots/abc",)
    assert Adapter.open(directory, model(), names=cached).notes == ()
    assert Adapter.open(directory, model(_name_or_path="google/gemma-2b-it"), names=("/x/y",)).notes == ()


def test_other_files_are_named(tmp_path):
    assert "there is no such file or directory" in refused(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "there is no adapter_config.json" in refused(tmp_path / "empty")
    pickled = write_adapter(tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    assert "adapter_model.bin is pickled; it can run code when loaded and is never opened" in refused(pickled)
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "model.safetensors").touch()
    assert "this is a whole model, not an adapter" in refused(whole)
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "adapters.safetensors").touch()
    assert "an adapter of mlx-lm" in refused(tmp_path / "mlx")
    ok = write_adapter(tmp_path / "ok")
    assert "this is a file" in refused(ok / "adapter_model.safetensors")


def test_damaged_files_are_named(tmp_path):
    directory = write_adapter(tmp_path)
    weights = directory / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for size in (0, 5, 100, len(whole) - 1):
        weights.write_bytes(whole[:size])
        assert str(weights) in refused(directory)
    weights.write_bytes(whole)
    (directory / "adapter_config.json").write_text("{")
    assert "adapter_config.json" in refused(directory)
    (directory / "adapter_config.json").write_text("[]")
    assert "adapter_config.json" in refused(directory)


@pytest.mark.parametrize("part", ["lora_B.bias", "base_layer.bias"])
def test_biases_of_zero_change_nothing(tmp_path, part):
    plain = Adapter.open(write_adapter(tmp_path / "plain"), model())
    zeros = factors() | {f"{Q}.{part}": np.zeros(32)}
    adapter = Adapter.open(write_adapter(tmp_path / "zeros", zeros, bias="all", lora_bias=True), model())
    assert adapter.notes == plain.notes
    assert adapter.updates.keys() == plain.updates.keys()
    np.testing.assert_array_equal(adapter.updates[NAME].b(), plain.updates[NAME].b())


def test_fields_without_effect(tmp_path):
    directory = write_adapter(tmp_path, fan_in_fan_out=True, bias="all", lora_bias=False)
    assert any("fan_in_fan_out has no effect" in note for note in Adapter.open(directory, model()).notes)


def test_every_field_of_peft_is_decided_about():
    peft = pytest.importorskip("peft")
    from gemma_deploy.checkpoint.adapters.settings import CARRIED_OUT, NEUTRAL, NOT_CARRIED_OUT

    known = NOT_CARRIED_OUT.keys() | NEUTRAL | CARRIED_OUT
    fields = json.loads(json.dumps(peft.LoraConfig().to_dict(), default=list))
    assert fields.keys() - known == set()
    assert AdapterSettings.from_dict(fields | {"peft_type": "LORA"}, "x").r == 8
    assert AdapterSettings.from_dict(settings(), "x").r == 4
