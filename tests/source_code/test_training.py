"""Training on the patched classes = on the stock class with eager attention: losses, gradients, adapters."""

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForCausalLM

from gemma_deploy.checkpoint import Checkpoint
from tests.source_code.test_modeling import pair

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PACKED = (19, 8, 13)  # tokens of the samples in a row: longer than the window of 8, as long, longer


@pytest.fixture(scope="module")
def batch():
    return torch.randint(3, 500, (2, 40), generator=torch.Generator().manual_seed(3))


def laid_out(ids, how):
    """What a data collator would give: nothing, padding on a side, or samples one behind the other in a row."""
    if how == "packed":
        positions = torch.cat([torch.arange(length) for length in PACKED])
        labels = ids[:1].clone()
        labels[:, [0, PACKED[0], PACKED[0] + PACKED[1]]] = -100
        return {"input_ids": ids[:1], "position_ids": positions[None], "labels": labels, "use_cache": False}
    mask = torch.ones_like(ids)
    if how != "whole":
        mask[0, slice(0, 11) if how == "left" else slice(29, 40)] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def adapted(stock, patched, **settings):
    """A PEFT model of each with the same adapter, whose B is not zero."""
    made = []
    for model in (stock, patched):
        torch.manual_seed(5)
        config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*tie_word_embeddings")  # PEFT's advice about merging
            made.append(get_peft_model(model, config))
    return made


def backward(model, inputs):
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("how", ["whole", "left", "right", "packed"])
def test_loss_and_gradients_of_an_adapter_are_the_stock_ones(checkpoint_dir, staged_dir, batch, how):
    """As prepared by PEFT: frozen base, gradient checkpointing, inputs that require gradients, a cache asked for."""
    inputs = laid_out(batch, how)
    found = []
    for model in adapted(*pair(checkpoint_dir, staged_dir), target_modules=SEVEN, r=4):
        model.enable_input_require_grads()
        model.activation_checkpointing_enable()
        found.append(backward(model.train(), inputs))
    (expected, stock), (got, patched) = found
    assert torch.equal(expected, got)
    layers = {name.split(".layers.")[1].split(".")[0] for name in stock}
    config = Checkpoint.open(checkpoint_dir).config
    assert len(stock) == 2 * sum(len(layer.linears) for layer in config.layers)
    assert len(layers) == config.num_hidden_layers
    assert stock.keys() == patched.keys()
    assert all(float(gradient.abs().max()) > 0 for gradient in stock.values())
    assert [name for name in stock if not torch.equal(stock[name], patched[name])] == []


def test_a_seed_gives_adapters_the_stock_class_s_first_values(checkpoint_dir, staged_dir):
    stock, patched = map(get_peft_model_state_dict, adapted(*pair(checkpoint_dir, staged_dir), target_modules=SEVEN))
    assert list(stock) == list(patched)
    assert [name for name in stock if not torch.equal(stock[name], patched[name])] == []


def test_packed_samples_do_not_see_each_other(checkpoint_dir, staged_dir, batch):
    """Positions that begin anew are samples: logits and loss are those of the samples alone, past the window."""
    stock, patched = pair(checkpoint_dir, staged_dir)
    inputs = laid_out(batch, "packed")
    with torch.no_grad():
        got, expected = patched(**inputs), stock(**inputs)
        alone = [patched(ids, labels=ids, use_cache=False) for ids in batch[:1].split(PACKED, dim=1)]
    assert torch.equal(expected.logits, got.logits)
    assert torch.equal(expected.loss, got.loss)
    logits = torch.cat([one.logits for one in alone], dim=1)
    # 1e-6 of 8 seen: another order of sums
    assert (logits - got.logits).abs().max() <= 1e-5 * logits.abs().max()
    predicted = torch.tensor([length - 1.0 for length in PACKED])
    mean = (torch.stack([one.loss for one in alone]) * predicted).sum() / predicted.sum()
    assert abs(mean - got.loss) <= 1e-5 * mean


def test_with_a_cache_positions_are_not_taken_for_samples(checkpoint_dir, staged_dir, batch):
    """As the stock class: a row is packed only where there is neither a mask nor a cache."""
    inputs = laid_out(batch, "packed") | {"use_cache": True}
    with torch.no_grad():
        expected, got = (model(**inputs) for model in pair(checkpoint_dir, staged_dir))
        packed = pair(checkpoint_dir, staged_dir)[1](**inputs | {"use_cache": False})
    assert torch.equal(expected.logits, got.logits)
    assert not torch.equal(packed.logits, got.logits)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5, 77, 300]}},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["lm_head", "down_proj"], "use_rslora": True},
        {"target_modules": SEVEN, "use_dora": True},
        {"target_modules": "all-linear"},
    ],
    ids=["table", "some-tokens", "saved-both", "saved-table", "head", "dora", "all-linear"],
)
def test_an_adapter_of_the_stock_class_is_the_same_on_the_patched_one(checkpoint_dir, staged_dir, batch, settings):
    stock, patched = adapted(*pair(checkpoint_dir, staged_dir), r=4, **settings)
    with torch.no_grad():  # of every trained value another one, tables and rows of tokens among them
        for name, parameter in stock.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.05)
    state = get_peft_model_state_dict(stock)
    if settings["target_modules"] == "all-linear":  # which leaves table and head alone
        assert {name.split(".lora_")[0].rpartition(".")[2] for name in state} == set(SEVEN)
    assert set_peft_model_state_dict(patched, state).unexpected_keys == []
    inputs = laid_out(batch, "left")
    (expected, stock_gradients), (got, patched_gradients) = (backward(model, inputs) for model in (stock, patched))
    with torch.no_grad(), stock.disable_adapter():
        without = stock(**inputs).loss
    assert abs(expected - without) > 1e-3
    assert torch.equal(expected, got)
    assert stock_gradients.keys() == patched_gradients.keys()
    assert [name for name, value in stock_gradients.items() if not _same(value, patched_gradients[name])] == []


def _same(one, other):
    return one is other is None or torch.equal(one, other)


def test_a_cache_while_training_is_the_stock_class_s(checkpoint_dir, staged_dir, batch):
    """None with gradient checkpointing, whatever is asked for, so that rows may be packed there."""
    found = []
    for model in pair(checkpoint_dir, staged_dir):
        cache = model.train()(batch).past_key_values
        model.activation_checkpointing_enable()
        checkpointed = model(batch, use_cache=True).past_key_values
        found.append((type(cache), cache.get_seq_length(), checkpointed))
    assert found[0] == found[1]
    assert found[1][1:] == (40, None)


def test_training_goes_on_after_generating_in_inference_mode(staged_dir, batch):
    """What a generation leaves behind (the rotary tables) must not be saved for a backward pass."""
    model = AutoModelForCausalLM.from_pretrained(staged_dir, trust_remote_code=True, dtype=torch.float32)
    with torch.inference_mode():
        model.eval().generate(batch, max_new_tokens=2, do_sample=False)
    loss, gradients = backward(model.train(), laid_out(batch, "whole"))
    fresh = AutoModelForCausalLM.from_pretrained(staged_dir, trust_remote_code=True, dtype=torch.float32)
    expected, others = backward(fresh.train(), laid_out(batch, "whole"))
    assert torch.equal(loss, expected)
    assert all(torch.equal(gradients[name], others[name]) for name in others)


def test_the_loss_divides_by_the_items_that_the_trainer_counts(checkpoint_dir, staged_dir, batch):
    """Gradient accumulation: `num_items_in_batch` is of all the micro batches."""
    inputs = laid_out(batch, "right")
    with torch.no_grad():
        counted = [
            model(**inputs, num_items_in_batch=torch.tensor(1000)).loss for model in pair(checkpoint_dir, staged_dir)
        ]
        mean = pair(checkpoint_dir, staged_dir)[1](**inputs).loss
    assert torch.equal(*counted)
    predicted = int((inputs["labels"][:, 1:] != -100).sum())
    assert abs(counted[1] * 1000 - mean * predicted) <= 1e-5 * mean * predicted
