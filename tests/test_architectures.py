"""The rows of generations agree with transformers, with source_code/ and with the files they name."""

import inspect
import json

import gguf
import pytest
import transformers

from gemma_deploy import architectures, paths
from gemma_deploy.architectures import ROWS
from gemma_deploy.checkpoint import ModelConfig, expected_tensors
from gemma_deploy.errors import NotBuiltError
from gemma_deploy.patched import patched_causal, patched_config, patched_stack
from gemma_deploy.testing import TINY_CONFIGS, TINY_ENCODER, TINY_ENCODER2

MODEL_TYPES = [row.model_type for row in ROWS]


def config_of(model_type):
    encoders = {"embedding_gemma": TINY_ENCODER, "embedding_gemma2_text": TINY_ENCODER2}
    return ModelConfig.from_dict({**TINY_CONFIGS, **encoders}[model_type], "config.json")


def stock_class(row):
    """The class that transformers makes of the type: a causal one, or the stack of an encoder that has none."""
    return transformers.AutoModel if row.patched.causal is None else transformers.AutoModelForCausalLM


@pytest.mark.parametrize("row", ROWS, ids=MODEL_TYPES)
def test_transformers_knows_the_type_and_the_class(row):
    raw = {key: value for key, value in config_of(row.model_type).raw.items() if key != "model_type"}
    made = transformers.AutoConfig.for_model(row.transformers_type, **raw)
    assert stock_class(row)._model_mapping[type(made)].__name__ == row.causal_class
    assert row.activation_key in made.to_dict()


@pytest.mark.parametrize("row", ROWS, ids=MODEL_TYPES)
def test_layers_hold_what_the_patched_model_has(row):
    """Names, shapes and order of modules, and which of them read one tensor, by the module tree itself."""
    config = config_of(row.model_type)
    model = patched_causal(config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for layer in config.layers:
        expected = {f"{layer.prefix}{name}": shape for name, shape in layer.tensors().items()}
        assert {name: shape for name, shape in shapes.items() if name.startswith(layer.prefix)} == expected
        module = model.get_submodule(layer.prefix.removesuffix("."))
        for branch in layer.branches:
            assert branch.norm in dict(module.named_children())
            for name in (branch.module, branch.output, *branch.inner):
                module.get_submodule(name)
            assert branch.post_norm is None or branch.post_norm in dict(module.named_children())
        named = [reader for group in layer.groups for reader in group.readers]
        assert sorted(named) == sorted(linear.name for linear in layer.linears)
        assert layer.template.partition(".")[0] == layer.kind
    assert len(patched_stack(config).layers) == config.num_hidden_layers
    assert isinstance(model.config, type(patched_config(config)))


@pytest.mark.parametrize("row", ROWS, ids=MODEL_TYPES)
def test_points_are_what_hooks_see_in_that_order(row):
    """Outputs of the modules in the order in which transformers' own class runs them."""
    import torch

    config = config_of(row.model_type)
    raw = {key: value for key, value in config.raw.items() if key != "model_type"}
    stock = transformers.AutoConfig.for_model(row.transformers_type, **raw)
    model, seen = stock_class(row).from_config(stock, attn_implementation="eager"), []
    layer = getattr(model, "model", model).layers[1]
    wanted = {point.removesuffix(".out") for point in config.layers[1].points() if point.endswith(".out")}
    for name, module in layer.named_modules():
        if name in wanted:
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
    with torch.no_grad():
        model(torch.arange(3, 12)[None])
    own = [point.removesuffix(".out") for point in config.layers[1].points() if point.endswith(".out")]
    assert own == seen


@pytest.mark.parametrize(("row", "layout"), architectures.by_gguf_name().values(), ids=architectures.by_gguf_name())
def test_llama_cpp_has_these_tensors(row, layout):
    """Names are those of gguf-py's own table, both ways; the file of every tensor of the model is read."""
    kind = getattr(gguf.MODEL_ARCH, layout.name.upper())
    known = {gguf.TENSOR_NAMES[one] for one in gguf.MODEL_TENSORS[kind]}
    names = {f"blk.{{bid}}.{part}" for part in layout.blocks}
    names |= {f"blk.{{bid}}.{name.rpartition('.')[0]}" for name in layout.whole}
    names |= {name.removesuffix(".weight") for name in (*layout.outside, *layout.stacked, *layout.said)}
    assert names <= known
    table = gguf.get_tensor_name_map(kind, 64)
    for name in expected_tensors(config_of(row.model_type)):
        if name.startswith(tuple(layout.stacked.values())):
            continue  # tests/checkpoint/test_gguf_gemma3n.py
        said = table.get_name(name if name.endswith(".weight") else f"{name}.weight", try_suffixes=(".weight",))
        assert said is not None, name
        assert layout.hf_name(said) == name


def test_the_table_in_source_code_is_what_staging_adds():
    table = json.loads((paths.source_code_dir() / "config.json").read_text())
    assert table == {row.model_type: row.patched.additions for row in ROWS if row.model_type in table}
    assert table


def test_names_are_found_and_others_refused_with_the_nearest():
    assert architectures.find("gemma3") is None
    assert architectures.text_type("gemma3") == "gemma3_text"
    assert architectures.by_multimodal("gemma3").model_type == "gemma3_text"
    assert architectures.by_multimodal("gemma2") is None
    assert architectures.names() == "Gemma 1, Gemma 2, Gemma 3, Gemma 3n, VaultGemma, Gemma 4 or Gemma 4 12B"
    with pytest.raises(NotBuiltError) as refused:
        architectures.architecture_of("gemma33_text")
    assert "the nearest known one is 'gemma3_text'" in str(refused.value)
    assert "gemma, gemma2, gemma3_text" in str(refused.value)


def test_an_encoder_is_found_by_its_flag():
    """Its own name stands in no config.json."""
    assert architectures.of_config(TINY_ENCODER).model_type == "embedding_gemma"
    assert architectures.of_config({**TINY_ENCODER, "use_bidirectional_attention": False}).model_type == "gemma3_text"
    assert architectures.of_config({"model_type": "embedding_gemma"}) is None
    assert architectures.of_config({"model_type": "gemma2", "use_bidirectional_attention": True}).name == "Gemma 2"
    assert "embedding_gemma" not in architectures.model_types()


def test_what_is_the_same_in_all_generations():
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert architectures.linear_kinds() == kinds
    assert [group.observed for group in architectures.input_groups()] == [
        "self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj",
    ]  # fmt: skip
    assert architectures.inner_modules("mlp") == ("mlp.gate_proj", "mlp.act_fn", "mlp.up_proj")
    assert all(inspect.getdoc(inspect.getmodule(row.read)) for row in ROWS)
