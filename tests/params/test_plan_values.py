"""What a plan says in numbers: bytes, rescaled constants, ranks that together are the whole, what a part holds."""

from dataclasses import FrozenInstanceError, fields, replace

import numpy as np
import pytest

from gemma_deploy.checkpoint import ModelConfig, expected_tensors
from gemma_deploy.params import build_plan
from gemma_deploy.params.plan import ParamSpec
from gemma_deploy.params.quantized import OutputError
from gemma_deploy.partition import ArtifactPart, parts_of, spans_of
from gemma_deploy.quantization.rescaling import Rescaling
from gemma_deploy.schemes import CodeForm, Codes, Storage
from gemma_deploy.testing import TINY_CONFIGS

TABLE, COLUMN_SCALE = "model.embed_tokens.weight", "model.embed_tokens.column_scale"


def config(**changes):
    return ModelConfig.from_dict({**TINY_CONFIGS["gemma3_text"], **changes}, "config.json")


def plan(cfg, scheme, **given):
    return {spec.name: spec for spec in build_plan(cfg, scheme, 32, **given)}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8", "uint8", "int4", "uint4"])
def test_bytes_of_a_tensor(dtype):
    sizes = {"bfloat16": 2.0, "int4": 0.5, "uint4": 0.5}  # not NumPy's own; two codes share a byte
    size = sizes[dtype] if dtype in sizes else np.dtype(dtype).itemsize
    assert ParamSpec("x", (6, 32), dtype, "stored").nbytes == 192 * size


def test_eps_and_scale_of_a_rescaled_model_undo_the_powers_of_two():
    at = "model.layers.1."
    rescaling = Rescaling(
        {
            f"{at}input_layernorm.in": 3, f"{at}self_attn.q_norm.in": 2, "model.norm.in": 5,
            f"{at}self_attn.q_norm.out": 2, f"{at}self_attn.k_norm.out": 1,
        }
    )  # fmt: skip
    held = plan(config(rms_norm_eps=1e-2), "fp16", rescaling=rescaling)
    rng = np.random.default_rng(0)
    for norm, exponent in ((f"{at}input_layernorm", 3), ("model.norm", 5), ("model.layers.0.input_layernorm", 0)):
        x = rng.standard_normal(64)
        small = x / 2.0**exponent
        eps = held[f"{norm}.eps"]
        assert (eps.shape, eps.dtype, eps.kind, eps.source) == ((1,), "float32", "constant", None)
        normed = small / np.sqrt(np.mean(small**2) + eps.value)
        np.testing.assert_allclose(normed, x / np.sqrt(np.mean(x**2) + 1e-2), rtol=1e-14)
    q, k = rng.standard_normal((2, 32))
    for layer, queries, keys in ((0, 0, 0), (1, 2, 1)):
        scale = held[f"model.layers.{layer}.self_attn.scaling"]
        assert (scale.shape, scale.dtype, scale.kind, scale.source) == ((1,), "float32", "constant", None)
        scores = (q / 2.0**queries) @ (k / 2.0**keys) * scale.value
        np.testing.assert_allclose(scores, q @ k / np.sqrt(24), rtol=1e-14)
    norms = {name for name, shape in expected_tensors(config()).items() if len(shape) == 1}
    constants = {name for name, spec in held.items() if spec.kind == "constant" and "rotary" not in name}
    assert constants == {name.replace(".weight", ".eps") for name in norms} | {
        f"model.layers.{i}.self_attn.scaling" for i in range(7)
    }


@pytest.mark.parametrize("scheme", ["fp32", "bf16", "w8a16"])
def test_only_float16_has_constants_of_its_own(scheme):
    rescaling = Rescaling({"model.norm.in": 5})
    assert not [name for name in plan(config(), scheme, rescaling=rescaling) if name.endswith((".eps", ".scaling"))]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_together_are_the_whole(ranks, transposed):
    """Each tensor cut as the plan says and put together again, in NumPy."""
    cfg = config()
    form, storage = CodeForm(unsigned=True, transposed=transposed), Storage(Codes(8, 16), Codes())
    if transposed and ranks > 1:
        form = CodeForm()  # no back end has both
    parts = [plan(cfg, "w8a16", part=part, storage=storage, form=form) for part in parts_of(7, (), ranks)]
    for name, shape in expected_tensors(cfg).items():
        whole = np.arange(np.prod(shape)).reshape(shape)
        pieces = []
        for part in parts:
            spec = part[name]
            piece = np.concatenate([whole[a:b] for a, b in spec.rows]) if spec.rows else whole
            piece = piece[:, slice(*spec.columns)] if spec.columns else piece
            assert spec.shape == (piece.T.shape if spec.transposed else piece.shape), name
            pieces.append(piece)
        if len(shape) == 1:
            assert all((piece == whole).all() for piece in pieces)
        else:
            axis = 1 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0
            assert (np.concatenate(pieces, axis) == whole).all(), name
            scales = [part[name.replace(".weight", ".scale")].shape for part in parts]
            one = pieces[0].shape
            assert scales == [(one[0],) if name == TABLE else (one[0], one[1] // 16)] * ranks, name


def test_a_rank_repeats_heads_and_constants():
    cfg = config()
    rescaling = Rescaling({"model.norm.in": 5})
    ranks = [plan(cfg, "fp16", part=part, rescaling=rescaling, int8_cache=True) for part in parts_of(7, (), 4)]
    whole = plan(cfg, "fp16", rescaling=rescaling, int8_cache=True)
    for rank, held in enumerate(ranks):
        assert list(held) == list(whole)
        head = rank // 2  # two KV heads, each in two ranks
        for name, spec in held.items():
            if "k_proj" in name or "v_proj" in name:
                assert (spec.rows, spec.shape[0]) == (((32 * head, 32 * head + 32),), 32), name
            elif spec.kind == "constant" or "norm" in name:
                assert spec == whole[name]
    assert ranks[3]["model.layers.0.mlp.down_proj.weight"].columns == (120, 160)
    assert ranks[3]["model.layers.0.mlp.down_proj.weight"].rows == ()
    assert ranks[1][TABLE].rows == ((128, 256),)


def test_factors_of_an_int8_cache():
    held = plan(config(), "w8a16", int8_cache=True)
    factors = {name: spec for name, spec in held.items() if name.endswith(".cache_factor")}
    assert set(factors) == {f"model.layers.{i}.self_attn.{x}_proj.cache_factor" for i in range(7) for x in "kv"}
    for name, spec in factors.items():
        assert (spec.shape, spec.dtype, spec.kind, spec.source) == ((64,), "float32", "stored", name)
    assert factors.keys() == held.keys() - plan(config(), "w8a16").keys()


def test_steps_of_an_int8_cache_in_the_place_of_factors():
    made = plan(config(), "w8a16", int8_cache=True)
    held = plan(config(), "w8a16", int8_cache=True, form=CodeForm(cache_scales=True))
    renamed = {name.replace(".cache_factor", ".cache_scale"): spec for name, spec in made.items()}
    assert list(held) == list(renamed)
    for name in held.keys() - made.keys():
        assert name.endswith(".cache_scale")
        assert held[name] == replace(renamed[name], name=name, source=name)


@pytest.mark.parametrize("scheme", ["w8a16", "w8a16_folded"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("table", [Codes(), Codes(8, 32), None])
def test_a_tied_table_with_one_scale_per_row_has_one_per_column_where_factors_are_folded(scheme, tied, table):
    cfg = config(tie_word_embeddings=tied)
    held = plan(cfg, scheme, storage=Storage(Codes(), table))
    expected = scheme == "w8a16_folded" and tied and table == Codes()
    assert (COLUMN_SCALE in held) is expected
    if expected:
        assert held[COLUMN_SCALE] == ParamSpec(COLUMN_SCALE, (64,), "float32", "stored", COLUMN_SCALE)
    if table is None:
        assert (held[TABLE].dtype, held[TABLE].kind) == ("float16", "cast")
        assert "model.embed_tokens.scale" not in held
    bottom, top = (ArtifactPart(span) for span in spans_of(7, (3,)))
    assert (COLUMN_SCALE in plan(cfg, scheme, part=bottom, storage=Storage(Codes(), table))) is expected
    assert COLUMN_SCALE not in plan(cfg, scheme, part=top, storage=Storage(Codes(), table))


def test_what_a_quantizer_made_is_copied_with_its_error():
    name, error = "model.layers.0.mlp.up_proj.weight", OutputError(31.0, 2.0)
    held = plan(config(), "w8a16_folded", quantized={name: error})
    scale = name.replace(".weight", ".scale")
    assert (held[name].kind, held[name].source, held[name].output_error) == ("stored", name, error)
    assert (held[scale].kind, held[scale].source) == ("stored", scale)
    other = name.replace("up_proj", "down_proj")
    assert (held[other].kind, held[other].output_error) == ("int8_per_channel", None)
    assert (held[other.replace(".weight", ".scale")].kind, held[other.replace(".weight", ".scale")].source) == (
        "scale",
        other,
    )


@pytest.mark.parametrize("scheme", ["fp32", "fp16", "w8a16"])
def test_stages_hold_their_layers_and_the_rotary_tables_of_their_kinds(scheme):
    cfg = config()
    whole = plan(cfg, scheme, int8_cache=True)
    stages = [
        plan(cfg, scheme, part=ArtifactPart(span), int8_cache=True) for span in spans_of(7, (2, 5))
    ]  # layer 5 alone looks at everything
    seen = set()
    for held, layers in zip(stages, ({0, 1}, {2, 3, 4}, {5, 6}), strict=True):
        assert {int(name.split(".")[2]) for name in held if ".layers." in name} == layers
        assert all(spec == whole[name] for name, spec in held.items())
        kinds = {name.split(".")[2] for name in held if "rotary" in name}
        assert kinds == {"sliding_attention", "full_attention"} if 5 in layers else {"sliding_attention"}
        seen |= held.keys()
    assert seen == whole.keys()
    assert [TABLE in held for held in stages] == [True, False, True]
    assert whole["model.rotary_emb.full_attention.cos"].shape == (32, 16)
    assert whole["model.rotary_emb.full_attention.cos"].rope == cfg.rope["full_attention"]


@pytest.mark.parametrize("made", [ParamSpec("x", (1,), "int8", "stored")], ids=lambda made: type(made).__name__)
def test_it_cannot_be_changed(made):
    with pytest.raises(FrozenInstanceError):
        setattr(made, fields(made)[0].name, None)
