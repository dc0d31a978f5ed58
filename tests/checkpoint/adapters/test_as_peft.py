"""Merged weights give the logits of peft's own model, which merges nothing: for every field that is carried out."""

import json
import shutil
import warnings

import numpy as np
import pytest

pytest.importorskip("peft")
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gemma_deploy.checkpoint import AdapterRef, Checkpoint
from gemma_deploy.errors import CheckpointError
from gemma_deploy.testing import write_tiny_checkpoint
from tests.checkpoint.adapters.peft_models import SEVEN, base_model, distance, logits, save_adapter, unmerged

SIZES = {"vocab_size": 128, "hidden_size": 48, "intermediate_size": 64, "head_dim": 16}
LAYERS = {"gemma": 2, "gemma2": 2, "gemma3_text": 6}
# Measured at most 1.0e-6 (largest of all tests here; 9.9e-7 for table and head of an untied model).
CLOSE = 5e-6


@pytest.fixture(scope="session")
def base(once):
    """(model type, tied) -> a tiny checkpoint in bfloat16."""

    def get(model_type="gemma2", tied=True):
        def make(root):
            layers = LAYERS[model_type]
            write_tiny_checkpoint(root, model_type, tie_word_embeddings=tied, num_hidden_layers=layers, seed=4, **SIZES)

        return once(f"adapted-{model_type}-{tied}", make)

    return get


def merged_model(checkpoint, adapter):
    """transformers' class with the merged weights, and the config that the merged checkpoint states."""
    opened = Checkpoint.open(checkpoint, adapter)
    config = AutoConfig.for_model(**opened.config_dict())
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    tensors = {name: torch.from_numpy(opened.rows(name, 0, info.shape[0])) for name, info in opened.tensors.items()}
    absent, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert absent == (["lm_head.weight"] if opened.config.tie_word_embeddings else [])
    return opened, model.eval()


def check(checkpoint, adapters, *, vocabulary=None):
    """Compare, and see that the adapter changes something."""
    refs = [AdapterRef(path, weight) for path, weight in adapters]
    opened, model = merged_model(checkpoint, refs)
    expected = logits(unmerged(checkpoint, *adapters, vocabulary=vocabulary), 128)
    assert distance(logits(model, 128), expected) < CLOSE
    without = logits(base_model(checkpoint, vocabulary), 128)
    assert distance(without, expected) > 1e-2
    return opened


CASES = {
    "seven linears": {},
    "rslora": {"use_rslora": True, "r": 6},
    "patterns": {"rank_pattern": {"q_proj": 2, r"layers\.1\..*\.up_proj": 6}, "alpha_pattern": {"o_proj": 3}},
    "overlapping patterns": {"alpha_pattern": {"q_proj": 16, "model.layers.0.self_attn.q_proj": 2}},
    "dora": {"use_dora": True},
    "dora with rslora": {"use_dora": True, "use_rslora": True},
    "fan in fan out": {"fan_in_fan_out": True},
    "bias all": {"bias": "all"},
    "norms": {"modules_to_save": ["input_layernorm", "norm"]},
    "a whole mlp": {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]},
    "factors of the table": {"target_modules": ["q_proj", "embed_tokens"]},
    "dora of the table": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "the table": {"modules_to_save": ["embed_tokens"]},
    "the head": {"modules_to_save": ["lm_head"]},
    "table and head": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "factors of the head": {"target_modules": ["q_proj", "lm_head"]},
    "factors of both": {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
    "rows": {"trainable_token_indices": [5, 127, 3]},
    "rows, and factors of the head": {"target_modules": ["q_proj", "lm_head"], "trainable_token_indices": [5, 127]},
    "rows of the head": {"trainable_token_indices": {"lm_head": [5, 6]}},
    "other rows of both": {"trainable_token_indices": {"embed_tokens": [5, 6], "lm_head": [7]}},
    "mica": {"init_lora_weights": "mica"},
}
TIED_TOO = {
    "factors of the table, tied": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "factors of the table, tied, other alpha of the head": {
        "target_modules": ["q_proj", "embed_tokens"],
        "ensure_weight_tying": True,
        "alpha_pattern": {"lm_head": 3},
    },
    "dora of the table, tied": {
        "target_modules": ["q_proj", "embed_tokens"],
        "ensure_weight_tying": True,
        "use_dora": True,
    },
    "the table, tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "rows, tied": {"trainable_token_indices": [5, 6], "ensure_weight_tying": True},
    "the same rows of both": {"trainable_token_indices": {"embed_tokens": [5, 6], "lm_head": [5, 6]}},
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_every_field(base, tmp_path, case, tied):
    checkpoint = base(tied=tied)
    check(checkpoint, [(save_adapter(checkpoint, tmp_path / "a", **CASES[case]), 1.0)])


@pytest.mark.parametrize("case", TIED_TOO)
def test_what_stays_tied(base, tmp_path, case):
    checkpoint = base()
    opened = check(checkpoint, [(save_adapter(checkpoint, tmp_path / "a", **TIED_TOO[case]), 1.0)])
    assert opened.config.tie_word_embeddings == ("other alpha" not in case and "dora" not in case)


@pytest.mark.parametrize("model_type", ["gemma", "gemma3_text"])
def test_other_generations(base, tmp_path, model_type):
    checkpoint = base(model_type)
    fields = {"target_modules": [*SEVEN, "embed_tokens"], "modules_to_save": ["norm"], "use_dora": True}
    check(checkpoint, [(save_adapter(checkpoint, tmp_path / "a", **fields), 1.0)])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"trainable_token_indices": [130, 3]},
    ],
)
def test_a_resized_vocabulary(base, tmp_path, fields, tied):
    checkpoint = base(tied=tied)
    adapter = save_adapter(checkpoint, tmp_path / "a", vocabulary=136, **fields)
    opened = check(checkpoint, [(adapter, 1.0)], vocabulary=136)
    assert opened.config.vocab_size == opened.config_dict()["vocab_size"] == 136


def test_a_resized_table_with_factors(base, tmp_path):
    """peft saves the table under the factors, and of an untied model no head: its new rows are nowhere."""
    fields = {"target_modules": ["q_proj", "embed_tokens"], "vocabulary": 136}
    adapter = save_adapter(base(), tmp_path / "a", **fields)
    check(base(), [(adapter, 1.0)], vocabulary=136)
    untied = save_adapter(base(tied=False), tmp_path / "b", **fields)
    with pytest.raises(CheckpointError, match="the token table has 136 rows and the head 128: save both"):
        Checkpoint.open(base(tied=False), untied)


def test_rows_of_a_tied_head_with_a_magnitude(base, tmp_path):
    """peft makes and saves such an adapter, and cannot compute with it."""
    fields = {"target_modules": ["q_proj", "lm_head"], "trainable_token_indices": [5, 127], "use_dora": True}
    adapter = save_adapter(base(), tmp_path / "a", **fields)
    with pytest.raises(AttributeError, match="'TrainableTokensWrapper' object has no attribute 'bias'"):
        logits(unmerged(base(), (adapter, 1.0)), 128)
    with pytest.raises(CheckpointError, match=r"the head has a magnitude \(DoRA\): peft itself cannot compute it"):
        Checkpoint.open(base(), adapter)


@pytest.mark.parametrize(
    ("tied", "saved", "said"),
    [
        (True, ["embed_tokens"], "rows of model.embed_tokens are trained, and modules_to_save names it too"),
        (False, ["embed_tokens"], "rows of model.embed_tokens are trained, and modules_to_save names it too"),
        (True, ["lm_head"], "rows of lm_head are trained, and modules_to_save names it too"),
    ],
)
def test_rows_of_what_is_saved_whole(base, tmp_path, tied, saved, said):
    """peft makes and saves such an adapter, and cannot compute with it."""
    checkpoint = base(tied=tied)
    adapter = save_adapter(checkpoint, tmp_path / "a", modules_to_save=saved, trainable_token_indices=[5, 127])
    with pytest.raises(ValueError, match="TrainableTokensLayer wraps an unknown layer type"):
        logits(unmerged(checkpoint, (adapter, 1.0)), 128)
    with pytest.raises(CheckpointError, match=said):
        Checkpoint.open(checkpoint, adapter)


@pytest.mark.parametrize("dora", [(False, False), (True, False), (False, True), (True, True)])
def test_several_adapters(base, tmp_path, dora):
    checkpoint = base()
    first = save_adapter(checkpoint, tmp_path / "a", use_dora=dora[0])
    fields = {"seed": 1, "r": 3, "lora_alpha": 5, "use_dora": dora[1], "target_modules": ["q_proj", "down_proj"]}
    second = save_adapter(checkpoint, tmp_path / "b", modules_to_save=["norm"], **fields)
    opened = check(checkpoint, [(first, 0.7), (second, -1.5)])
    assert [one.weight for one in opened.adapters] == [0.7, -1.5]


def with_biases(adapter, factor):
    """Multiply what `lora_bias=True` added."""
    from safetensors.torch import load_file, save_file

    weights = load_file(adapter / "adapter_model.safetensors")
    biases = [name for name in weights if name.endswith(".lora_B.bias")]
    assert len(biases) == 7 * LAYERS["gemma2"]
    changed = weights | {name: factor * weights[name] for name in biases}
    save_file(changed, adapter / "adapter_model.safetensors", {"format": "pt"})
    return biases


def test_biases_that_count_are_refused_as_peft_s_merge_does(base, tmp_path):
    """Unmerged they change the logits, and without a bias in the base peft does not merge them either."""
    checkpoint = base()
    adapter = save_adapter(checkpoint, tmp_path / "a", lora_bias=True)
    model = unmerged(checkpoint, (adapter, 1.0))
    expected = logits(model, 128)
    with pytest.raises(RuntimeError, match="Impossible to merge LoRA with `lora_bias=True` because the base layer has"):
        model.merge_and_unload()
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(checkpoint, adapter)
    (problem,) = caught.value.problems
    (first, *others) = with_biases(adapter, 0)
    assert problem == (
        f"{first} is a bias that is not zero, and so are {len(others)} more biases of lora_B: the linears of a Gemma "
        "have no bias: no merged checkpoint can hold it, and peft's merge refuses it for the same reason"
    )
    assert caught.value.next_step == "train the adapter without biases"
    check(checkpoint, [(adapter, 1.0)])  # zeros are the adapter without them
    assert distance(logits(merged_model(checkpoint, adapter)[1], 128), expected) > 1e-2


def test_trained_biases_of_a_base_that_has_them(base, tmp_path):
    """peft merges onto transformers' class with `attention_bias`; no Gemma is that, and neither part is taken here."""
    other = tmp_path / "other"
    shutil.copytree(base(), other)
    config = json.loads((other / "config.json").read_text()) | {"attention_bias": True}
    (other / "config.json").write_text(json.dumps(config))
    adapter = save_adapter(other, tmp_path / "a", bias="all")
    model = unmerged(other, (adapter, 1.0))
    expected = logits(model, 128)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = model.merge_and_unload()
    assert merged.model.layers[0].self_attn.q_proj.bias.abs().max() > 0.05
    assert distance(logits(merged, 128), expected) < CLOSE
    with pytest.raises(CheckpointError, match="attention_bias: got True, expected false: no Gemma has attention bia"):
        Checkpoint.open(other, adapter)
    said = r"k_proj.base_layer.bias is a bias that is not zero, and so are 7 more biases of a base: .*attention_bias"
    with pytest.raises(CheckpointError, match=said):
        Checkpoint.open(base(), adapter)


def test_16_bit_factors(base, tmp_path):
    from safetensors.torch import load_file, save_file

    checkpoint = base()
    adapter = save_adapter(checkpoint, tmp_path / "a")
    weights = load_file(adapter / "adapter_model.safetensors")
    halves = {name: one.to(torch.bfloat16) for name, one in weights.items()}
    save_file(halves, adapter / "adapter_model.safetensors", {"format": "pt"})
    check(checkpoint, [(adapter, 1.0)])


def test_the_multimodal_class_is_taken_over(base, tmp_path):
    """Names as of the multimodal class; the numbers are those of the same adapter with names of the text class."""
    from safetensors.torch import load_file, save_file

    checkpoint = base()
    adapter = save_adapter(checkpoint, tmp_path / "a", alpha_pattern={"q_proj": 3})
    expected = logits(merged_model(checkpoint, adapter)[1], 128)
    weights = load_file(adapter / "adapter_model.safetensors")
    inside = {name.replace(".model.layers", ".model.language_model.layers"): one for name, one in weights.items()}
    save_file(inside, adapter / "adapter_model.safetensors", {"format": "pt"})
    assert torch.equal(logits(merged_model(checkpoint, adapter)[1], 128), expected)


def test_its_own_merge_of_a_tied_table_counts_twice(base, tmp_path):
    """Why peft's merge is no reference here: with `ensure_weight_tying` it adds the product to one matrix twice."""
    checkpoint = base()
    fields = TIED_TOO["factors of the table, tied"]
    adapter = save_adapter(checkpoint, tmp_path / "a", **fields)
    model = unmerged(checkpoint, (adapter, 1.0))
    expected = logits(model, 128)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twice = model.merge_and_unload()
    assert distance(logits(twice, 128), expected) > 1e-2
    assert distance(logits(merged_model(checkpoint, adapter)[1], 128), expected) < CLOSE


def test_the_config_says_what_is_merged(base, tmp_path):
    checkpoint = base()
    adapter = save_adapter(checkpoint, tmp_path / "a", modules_to_save=["lm_head"])
    opened = Checkpoint.open(checkpoint, adapter)
    assert opened.config_dict()["tie_word_embeddings"] is False
    assert list(opened.tensors)[-1] == "lm_head.weight"
    assert any("no longer tied" in note for note in opened.notes)
    own = Checkpoint.open(checkpoint)
    assert json.loads((checkpoint / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in own.tensors
    np.testing.assert_array_equal(
        opened.rows("model.embed_tokens.weight", 0, 128), own.rows("model.embed_tokens.weight", 0, 128)
    )
