"""What a recipe's words mean for weights and cache, and how many numbers that stores."""

from dataclasses import FrozenInstanceError, fields

import numpy as np
import pytest

from gemma_deploy.schemes import (
    QUANTIZE_TYPES,
    QUANTIZERS,
    TABLES,
    CodeForm,
    Codes,
    Scheme,
    Storage,
    block_problems,
    dividing_table,
    group_problems,
    is_kept,
    storage_of,
)


@pytest.mark.parametrize(
    ("dtype", "kind", "weights", "cache", "name"),
    [
        ("fp32", None, "fp32", False, "fp32"),
        ("bf16", None, "bf16", False, "bf16"),
        ("int8", None, "w8a16", False, "w8a16"),
        ("int8", "w8a16", "w8a16", False, "w8a16"),
        ("int8", "w8a8+kv8", "w8a8", True, "w8a8+kv8"),
        ("int8", "w4a16_gptq", "w4a16_gptq", False, "w4a16_gptq"),
        ("int8", "w4a16_gptq+kv8", "w4a16_gptq", True, "w4a16_gptq+kv8"),
        ("fp16", "w16kv8", "fp16", True, "w16kv8"),
        ("bf16", "w16kv8", "bf16", True, "w16kv8"),
        ("int8", "w16kv8", "fp16", True, "w16kv8"),
    ],
)
def test_words_of_a_recipe(dtype, kind, weights, cache, name):
    scheme = Scheme.parse(dtype, kind)
    assert (scheme.weights, scheme.int8_cache, str(scheme)) == (weights, cache, name)
    assert scheme.codes is (weights[0] == "w")
    assert (scheme.quantizer is None) is (weights[0] != "w")


def test_an_unknown_scheme_is_refused():
    for weights in ("w3a16", "", "fp32+kv8", "w16kv8"):
        with pytest.raises(ValueError, match="no such scheme"):
            Scheme(weights)
    assert not Scheme("w8a16").int8_cache


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize(
    ("weights", "calibrated", "rounds", "form"),
    [
        ("fp32", False, False, "fp32"),
        ("fp16", False, False, "fp16"),
        ("bf16", False, False, "bf16"),
        ("w8a16", False, False, "w8a16"),
        ("w8a16_gptq", True, False, "w8a16_folded"),
        ("w8a8", True, True, "w8a16_folded"),
        ("w4a16", True, False, "w8a16_folded"),
        ("w4a16_gptq", True, False, "w8a16_folded"),
    ],
)
def test_what_a_scheme_needs(weights, cache, calibrated, rounds, form):
    scheme = Scheme(weights, cache)
    assert (scheme.calibrated, scheme.rounds_activations, scheme.form) == (calibrated, rounds, form)
    assert scheme.calibrates is (calibrated or cache)


def test_quantizers_and_what_each_may_lose():
    """As docs/proof-and-ledger.md promises it; a change of a limit is a decision, with a measurement beside it."""
    shown = {
        name: (one.bits, one.compensate, one.groupsize, one.kl_limit, one.perplexity_limit, one.kernels_kl_limit)
        for name, one in QUANTIZERS.items()
    }
    assert shown == {
        "w8a16": (8, False, None, 0.01, 0.005, 0.02),
        "w8a16_gptq": (8, True, None, 0.005, 0.005, 0.015),
        "w8a8": (8, True, None, 0.016, 0.016, 0.02),
        "w4a16_rtn": (4, False, 32, 0.7, 0.5, 1.0),
        "w4a16": (4, False, 32, 0.5, 0.5, 0.6),
        "w4a16_gptq": (4, True, 32, 0.3, 0.3, 0.35),
    }
    assert set(QUANTIZE_TYPES) == {*QUANTIZERS, "w16kv8", *(f"{name}+kv8" for name in QUANTIZERS)}
    assert (CodeForm().unsigned, CodeForm().transposed) == (False, False)


def test_tables_are_what_their_names_say():
    assert {name: (one.bits, one.groupsize) for name, one in TABLES.items() if one} == {
        "int8": (8, None), "int8_g128": (8, 128), "int8_g64": (8, 64), "int8_g32": (8, 32),
    }  # fmt: skip
    assert [name for name, one in TABLES.items() if one is None] == ["fp16"]


@pytest.mark.parametrize("groupsize", [None, 16, 32, 64])
def test_there_is_a_scale_for_each_group_of_a_row(groupsize):
    weight = np.ones((6, 192))
    scales = np.abs(weight.reshape(6, -1, groupsize or 192)).max(-1)
    codes = Codes(4, groupsize)
    assert codes.scale_shape(weight.shape) == (scales.shape if groupsize else (6,))
    assert str(codes) == "int4 per row" + (f" and group of {groupsize}" if groupsize else "")


def test_layers_are_linears_and_all_else_is_the_table():
    storage = Storage(Codes(4, 32), None, ("k_proj",))
    assert storage.of("model.layers.10.self_attn.q_proj") == Codes(4, 32)
    assert storage.of("model.layers.10.self_attn.k_proj") == Codes(8, 32)
    assert storage.of("model.embed_tokens") is storage.of("lm_head") is None
    assert Storage().of("lm_head") == Codes(8) == Storage().of("model.layers.0.mlp.up_proj")
    assert Storage(Codes(4, 32)).linears_text == "linears int4 per row and group of 32"
    assert is_kept("model.layers.0.self_attn.k_proj", ("k_proj",))
    assert is_kept("k_proj", ("k_proj",))
    assert not is_kept("model.layers.0.self_attn.q_proj", ("k_proj",))


@pytest.mark.parametrize(
    ("scheme", "given", "linears", "table", "kept"),
    [
        ("w8a16", {}, Codes(8), Codes(8), ()),
        ("w8a16", {"groupsize": 64, "table": "int8_g32"}, Codes(8), Codes(8, 32), ()),  # nothing is calibrated
        ("w8a16", {"table": "fp16"}, Codes(8), None, ()),
        ("fp32", {}, Codes(8), Codes(8), ()),
        ("w8a16_gptq", {}, Codes(8), Codes(8, 128), ()),
        ("w8a16_gptq", {"groupsize": 64}, Codes(8, 64), Codes(8, 128), ()),
        ("w8a16_gptq", {"groupsize": -1, "table": "int8"}, Codes(8), Codes(8), ()),
        ("w8a16_gptq", {"kept_w8": ["v_proj"]}, Codes(8), Codes(8, 128), ()),
        ("w8a8", {"groupsize": -1}, Codes(8), Codes(8, 128), ()),
        ("w8a8", {"groupsize": 64}, Codes(8), Codes(8, 128), ()),  # products of integers have one scale per row
        ("w4a16", {}, Codes(4, 32), Codes(8, 128), ("k_proj", "v_proj")),
        ("w4a16_gptq", {"groupsize": 128, "kept_w8": ["o_proj"]}, Codes(4, 128), Codes(8, 128), ("o_proj",)),
        ("w4a16_gptq", {"groupsize": -1, "kept_w8": []}, Codes(4), Codes(8, 128), ()),
    ],
)
def test_what_is_stored(scheme, given, linears, table, kept):
    storage = storage_of(scheme, 640, **given)
    assert storage == Storage(linears, table, kept)
    assert Storage.from_json(storage.to_json()) == storage


def test_the_default_table_has_the_largest_groups_that_divide():
    for columns in range(8, 1025, 8):
        largest = max((size for size in (32, 64, 128) if columns // size * size == columns), default=None)
        assert TABLES[dividing_table(columns)] == Codes(8, largest), columns


def test_matrices_that_a_block_kernel_would_pad():
    """MatMulNBits' smallest block has 16 columns: microsoft/onnxruntime, contrib operators."""
    assert block_problems({"q_proj": 16, "o_proj": 64, "down_proj": 48}) == []
    assert block_problems({"q_proj": 24, "o_proj": 64, "down_proj": 8}) == [
        "backend.type: onnxruntime wants multiples of 16 input channels in int8, got q_proj (24), down_proj (8): "
        "set backend.dtype: fp32"
    ]


def test_groups_that_do_not_divide():
    linears = {"q_proj": 64, "down_proj": 160}
    assert group_problems(Storage(Codes(8, 32), Codes(8, 64)), linears, 64) == []
    assert group_problems(Storage(Codes(8, 32), Codes(8, 64)), linears, 192) == []
    assert group_problems(Storage(Codes(8), Codes(8)), {"q_proj": 33}, 33) == []
    assert group_problems(Storage(Codes(8), None), {"q_proj": 33}, 33) == []
    assert group_problems(Storage(Codes(4, 64), Codes(8, 128)), linears, 64) == [
        "frontend.quantize.calib_args.groupsize: 64 does not divide the input channels of down_proj (160)",
        "frontend.quantize.table: groups of 128 do not divide the hidden_size 64",
    ]


@pytest.mark.parametrize(
    "made", [Codes(), Storage(), CodeForm(), QUANTIZERS["w8a8"], Scheme("fp32")], ids=lambda made: type(made).__name__
)
def test_it_cannot_be_changed(made):
    with pytest.raises(FrozenInstanceError):
        setattr(made, fields(made)[0].name, None)
