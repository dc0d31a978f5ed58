import json
from dataclasses import replace

import pytest
import torch

from gemma_deploy.checkpoint import ModelConfig, expected_tensors
from gemma_deploy.params import build_plan
from gemma_deploy.params.constants import rotary_rows
from gemma_deploy.params.layout import lay_out
from gemma_deploy.schemes import CodeForm, Codes, Storage, storage_of
from gemma_deploy.testing import TINY_CONFIGS


def config(model_type="gemma", **changes):
    return ModelConfig.from_dict({**TINY_CONFIGS[model_type], **changes}, "config.json")


def by_name(plan):
    assert len({spec.name for spec in plan}) == len(plan)
    return {spec.name: spec for spec in plan}


@pytest.mark.parametrize(
    ("scheme", "matrix", "rotary"),
    [
        ("fp32", "float32", "float32"),
        ("bf16", "bfloat16", "float32"),
        ("fp16", "float16", "float32"),
        ("w8a16", "int8", "float32"),
    ],
)
def test_dtypes_of_a_scheme(scheme, matrix, rotary):
    plan = by_name(build_plan(config("gemma3_text"), scheme, 64))
    for name, spec in plan.items():
        if "norm" in name or name.endswith((".scale", ".scaling")):
            assert spec.dtype == "float32", name
        elif "rotary" in name:
            assert (spec.dtype, spec.shape) == (rotary, (64, 16)), name
        else:
            assert spec.dtype == matrix, name


@pytest.mark.parametrize("model_type", ["gemma", "gemma3_text"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_of_the_model_once(model_type, tied):
    cfg = config(model_type, tie_word_embeddings=tied)
    for scheme in ("fp32", "w8a16"):
        plan = by_name(build_plan(cfg, scheme, 32))
        weights = {name: spec.shape for name, spec in plan.items() if spec.kind in ("cast", "int8_per_channel")}
        assert weights == expected_tensors(cfg)
        assert ("lm_head.weight" in plan) is not tied
        scales = {name for name, spec in plan.items() if spec.kind == "scale"}
        matrices = {n.removesuffix("weight") + "scale" for n, shape in weights.items() if len(shape) == 2}
        assert scales == (matrices if scheme == "w8a16" else set())


def test_rotary_tables_of_the_kinds_that_occur():
    def tables(cfg):
        return {spec.name for spec in build_plan(cfg, "fp32", 32) if spec.kind == "constant"}

    full = {f"model.rotary_emb.full_attention.{t}" for t in ("cos", "sin")}
    sliding = {f"model.rotary_emb.sliding_attention.{t}" for t in ("cos", "sin")}
    assert tables(config("gemma")) == full
    assert tables(config("gemma3_text")) == full | sliding
    assert tables(config("gemma3_text", num_hidden_layers=2)) == sliding


def _spec(cfg, layer_type, table, context):
    name = f"model.rotary_emb.{layer_type}.{table}"
    return by_name(build_plan(cfg, "fp32", context))[name]


def _check_rotary(cfg, layer_type, cos, sin):
    half = cfg.head_dim // 2
    for table, expected in (("cos", cos), ("sin", sin)):
        spec = _spec(cfg, layer_type, table, 2048)
        whole = rotary_rows(spec, 0, 2048)
        assert torch.equal(whole, expected[0, :, :half])
        assert torch.equal(torch.cat([rotary_rows(spec, 0, 777), rotary_rows(spec, 777, 2048)]), whole)


@pytest.mark.parametrize("head_dim", [32, 256])
def test_rotary_equals_transformers_gemma(head_dim):
    from transformers import GemmaConfig
    from transformers.models.gemma.modeling_gemma import GemmaRotaryEmbedding

    raw = {**TINY_CONFIGS["gemma"], "head_dim": head_dim}
    module = GemmaRotaryEmbedding(GemmaConfig(**raw))
    cos, sin = module(torch.zeros(1), torch.arange(2048)[None])
    _check_rotary(config(head_dim=head_dim), "full_attention", cos, sin)


@pytest.mark.parametrize("factor", [None, 8.0])
def test_rotary_equals_transformers_gemma3(factor):
    from transformers import Gemma3TextConfig
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding

    changes = {} if factor is None else {"rope_scaling": {"rope_type": "linear", "factor": factor}}
    changes["head_dim"] = 256
    module = Gemma3RotaryEmbedding(Gemma3TextConfig(**TINY_CONFIGS["gemma3_text"], **_no_dim(changes)))
    cfg = config("gemma3_text", **_no_dim(changes))
    assert cfg.rope["full_attention"].factor == (factor or 1.0)
    for layer_type in ("full_attention", "sliding_attention"):
        cos, sin = module(torch.zeros(1), torch.arange(2048)[None], layer_type)
        _check_rotary(cfg, layer_type, cos, sin)


def _no_dim(changes):
    return {key: value for key, value in changes.items() if key != "head_dim"}


def test_layout_is_page_aligned_without_holes_and_wide_types_first():
    plan = build_plan(config("gemma3_text"), "w8a16", 48)
    layout = lay_out(plan)
    assert len(layout.header) % 4096 == 0
    assert layout.header.endswith((b"}", b" "))
    specs = sorted(plan, key=lambda spec: layout.offsets[spec.name])
    end = len(layout.header)
    for spec in specs:
        assert layout.offsets[spec.name] == end
        end += spec.nbytes
    assert end == layout.file_bytes
    widths = [{"float32": 4, "int8": 1}[spec.dtype] for spec in specs]
    assert widths == sorted(widths, reverse=True)


def test_unsigned_codes_are_the_same_plan_in_other_dtypes():
    """With the same bytes in the same places; what is no code stays as it is."""
    forms = CodeForm(), CodeForm(unsigned=True)
    for storage in (Storage(), Storage(Codes(4, 32), Codes(8, 32))):
        signed, unsigned = (
            build_plan(config("gemma3_text"), "w8a16", 32, storage=storage, form=form) for form in forms
        )
        assert signed == build_plan(config("gemma3_text"), "w8a16", 32, storage=storage)
        renamed = {"int8": "uint8", "int4": "uint4"}
        assert [(one.name, renamed.get(one.dtype, one.dtype)) for one in signed] == [
            (one.name, one.dtype) for one in unsigned
        ]
        assert {one.dtype for one in unsigned} >= {f"uint{storage.linears.bits}"}
        assert lay_out(signed).offsets == lay_out(unsigned).offsets
        assert [one.nbytes for one in signed] == [one.nbytes for one in unsigned]
    floats = [build_plan(config(), "fp32", 32, form=form) for form in (*forms, CodeForm(True, True))]
    assert floats[0] == floats[1] == floats[2]


def test_linears_kept_in_8_bits_are_those_named():
    """With the groups of the others; scales, tables and all else stay as they are."""
    cfg = config("gemma3_text")
    four = by_name(build_plan(cfg, "w8a16", 32, storage=Storage(Codes(4, 32), Codes(8, 32))))
    mixed = by_name(build_plan(cfg, "w8a16", 32, storage=Storage(Codes(4, 32), Codes(8, 32), ("k_proj", "down_proj"))))
    changed = {name for name in four if four[name] != mixed[name]}
    assert changed == {name for name in four if name.endswith(("k_proj.weight", "down_proj.weight"))}
    for name in changed:
        assert mixed[name] == replace(four[name], dtype="int8", kind="int8_per_channel")
        assert mixed[name].nbytes == 2 * four[name].nbytes


def test_what_stays_in_8_bits():
    """k_proj and v_proj of int4, unless the recipe says others or none; of int8 there is nothing to keep."""
    kept = ("k_proj", "v_proj")
    for scheme, given, expected in (
        ("w4a16_gptq", None, kept), ("w4a16", None, kept), ("w4a16", ("o_proj",), ("o_proj",)), ("w4a16", (), ()),
        ("w8a16_gptq", None, ()), ("w8a8", None, ()), ("w8a16", None, ()),
    ):  # fmt: skip
        storage = storage_of(scheme, 64, kept_w8=given)
        assert storage.kept_w8 == expected, (scheme, given)
        assert json.loads(json.dumps(storage.to_json())) == storage.to_json()
        assert Storage.from_json(storage.to_json()) == storage
    mixed = storage_of("w4a16", 64)
    assert [mixed.linear(f"model.layers.0.self_attn.{kind}_proj") for kind in "qkv"] == [
        Codes(4, 32), Codes(8, 32), Codes(8, 32),
    ]  # fmt: skip
    assert mixed.linears_text == (
        "linears int4 per row and group of 32, k_proj and v_proj int8 per row and group of 32"
    )
    older = {"linears": {"bits": 4, "groupsize": 32}, "table": None}  # before there was any
    assert Storage.from_json(older) == Storage(Codes(4, 32), None)


@pytest.mark.parametrize("tied", [True, False])
def test_transposed_codes_are_those_of_linears_signed_with_columns_for_rows(tied):
    """Tables, scales, norms and the places of all bytes are those of the unsigned form."""
    cfg = config("gemma3_text", tie_word_embeddings=tied)
    shapes, storage = expected_tensors(cfg), Storage(Codes(), Codes(8, 32))
    unsigned, transposed = (
        build_plan(cfg, "w8a16", 32, storage=storage, form=CodeForm(unsigned=True, transposed=flag))
        for flag in (False, True)
    )
    assert lay_out(transposed).offsets == lay_out(unsigned).offsets
    linears = set()
    for before, spec in zip(unsigned, transposed, strict=True):
        if spec.transposed:
            linears.add(spec.name)
            assert (spec.dtype, spec.shape, spec.source) == ("int8", shapes[spec.name][::-1], spec.name)
            assert before == replace(spec, dtype="uint8", shape=shapes[spec.name], transposed=False)
        else:
            assert spec == before
    assert linears == {name for name in shapes if name.endswith("_proj.weight")}
    assert {spec.dtype for spec in transposed if spec.name in ("model.embed_tokens.weight", "lm_head.weight")} == {
        "uint8"
    }
