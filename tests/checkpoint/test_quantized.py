"""Codes in a checkpoint: every way of packing gives the product of codes and scales, and what does not fit is told."""

import json

import numpy as np
import pytest

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.checkpoint.quantized import awq, bitsandbytes, compressed_tensors, gptq
from gemma_deploy.errors import CheckpointError
from gemma_deploy.staging import stage_checkpoint
from tests.checkpoint.quantized_make import (
    DTYPES,
    FORMS,
    bfloat16,
    compressed,
    compressed_config,
    quantize,
    read_floats,
    words_along,
    write_quantized,
    write_tensors,
)

Q_PROJ = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj.weight"
SMALL = {"num_hidden_layers": 2, "sliding_window_pattern": 2}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """form -> (directory, what was packed); read only."""
    made = {}

    def get(form, **changes):
        if form not in made:
            pack, config = FORMS[form]
            made[form] = write_quantized(directories / form, pack, config, **SMALL, **changes)
        return directories / form, made[form]

    directories = tmp_path_factory.mktemp("quantized")
    return get


def refusal(path):
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path)
    assert str(path) in str(caught.value)
    assert caught.value.next_step
    return str(caught.value)


@pytest.mark.parametrize("form", FORMS)
def test_rows_are_the_products_of_codes_and_scales(quantized, form):
    path, packed = quantized(form)
    checkpoint = Checkpoint.open(path)
    assert set(checkpoint.quantized) == set(packed)
    assert len(packed) == 14
    for name, one in packed.items():
        exact = one.exact.astype(np.float32)
        assert np.array_equal(exact.astype(np.float64), one.exact)  # the product of a code and 16 bits is exact
        assert np.array_equal(checkpoint.rows(name, 0, len(exact)), exact), name
        for start, stop in ((0, 1), (3, 12), (9, 10), (5, 5)):
            assert np.array_equal(checkpoint.rows(name, start, stop), exact[start:stop]), (name, start, stop)
    for name, (_, values) in read_floats(path).items():
        if "norm" in name:
            assert np.array_equal(checkpoint.rows(name, 0, len(values)), values)
    assert "quantization_config" not in checkpoint.config_dict()
    (told,) = (note for note in checkpoint.notes if "arrive quantized" in note)
    assert "14 matrices are int" in told


@pytest.mark.parametrize(
    ("form", "broken"),
    [
        ("gptq", lambda patch: patch.setattr(gptq, "STORED_LESS_ONE", {"gptq": 0, "gptq_v2": 0})),
        ("awq", lambda patch: patch.setattr(awq, "PLACES", tuple(range(8)))),
        ("awq", lambda patch: patch.setattr(awq, "PLACES", (0, 2, 4, 6, 1, 3, 5, 7))),
        (
            "compressed-int4",
            lambda patch: patch.setattr(compressed_tensors, "unpacked", lambda words, bits: swapped(words)),
        ),
        ("gptq-act-order", lambda patch: patch.setattr(gptq.GptqMatrix, "order", lambda self: None)),
        ("compressed-int4", lambda patch: patch.setattr(compressed_tensors.CompressedMatrix, "scales", other_axis)),
    ],
    ids=[
        "zero point off by one",
        "awq not interleaved",
        "awq interleaved the other way",
        "nibbles",
        "act order",
        "axis",
    ],
)
def test_a_layout_read_wrongly_is_seen(quantized, monkeypatch, form, broken):
    path, packed = quantized(form)
    broken(monkeypatch)
    checkpoint = Checkpoint.open(path)
    assert not np.array_equal(checkpoint.rows(DOWN, 0, 64), packed[DOWN].exact.astype(np.float32))


def other_axis(matrix, start, stop):
    """Scales as if groups were runs of rows: the same numbers in the order of columns."""
    return matrix._scale.whole().reshape(matrix.groups, -1).T[start:stop].copy()


def swapped(words):
    """Nibbles in the other order."""
    octets = np.ascontiguousarray(words).view(np.uint8).reshape(len(words), -1)
    return np.stack([octets >> 4, octets & 15], axis=-1).reshape(len(words), -1)


def test_what_is_read_and_its_fingerprint_follow_the_codes(quantized, tmp_path):
    pack, config = FORMS["compressed-int4"]
    write_quantized(tmp_path / "a", pack, config, **SMALL)
    before = Checkpoint.open(tmp_path / "a")
    assert before.own_dtype == "float32"
    assert before.is_dequantized
    assert not Checkpoint.open("demo").is_dequantized
    assert not Checkpoint.open("demo").quantized
    first = before.weights_fingerprint()
    write_quantized(tmp_path / "a", pack, config | {"note": 1}, **SMALL)
    assert Checkpoint.open(tmp_path / "a").weights_fingerprint() != first


def test_staging_writes_what_the_codes_stand_for(quantized, tmp_path):
    path, packed = quantized("awq")
    staged = Checkpoint.open(stage_checkpoint(path, tmp_path / "staged"))
    assert not staged.quantized
    assert "quantization_config" not in json.loads((tmp_path / "staged" / "config.json").read_text())
    for name, one in packed.items():
        assert np.array_equal(staged.rows(name, 0, len(one.codes)), one.exact.astype(np.float32))


def test_the_language_model_of_a_published_multimodal_one(quantized, tmp_path):
    path, packed = quantized("compressed-int4")
    write_quantized(tmp_path / "x", *FORMS["compressed-int4"], **SMALL)
    raw = json.loads((path / "config.json").read_text())
    said = raw.pop("quantization_config")
    outer = {"model_type": "gemma3", "text_config": raw, "quantization_config": said}
    (tmp_path / "x" / "config.json").write_text(json.dumps(outer))
    file = tmp_path / "x" / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header = {name.replace("model.", "language_model.model.", 1): info for name, info in header.items()}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    checkpoint = Checkpoint.open(tmp_path / "x")
    assert checkpoint.is_nested
    assert set(checkpoint.quantized) == set(packed)
    assert np.array_equal(checkpoint.rows(DOWN, 0, 64), packed[DOWN].exact.astype(np.float32))


def test_codes_that_lie_in_several_shards(quantized, tmp_path):
    path, packed = quantized("gptq-asymmetric")
    write_quantized(tmp_path / "x", *FORMS["gptq-asymmetric"], **SMALL)
    data = (path / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    shards, index = {"one.safetensors": {}, "two.safetensors": {}}, {}
    kinds = {"BF16": np.uint16, "I32": np.int32, "F16": np.float16}
    for name, info in header.items():
        first, last = (8 + length + at for at in info["data_offsets"])
        shard = "two.safetensors" if name.endswith((".scales", ".g_idx")) else "one.safetensors"
        shards[shard][name] = np.frombuffer(data[first:last], kinds[info["dtype"]]).reshape(info["shape"])
        index[name] = shard
    for shard, tensors in shards.items():
        write_tensors(tmp_path / "x", tensors)
        (tmp_path / "x" / "model.safetensors").rename(tmp_path / "x" / shard)
    (tmp_path / "x" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    checkpoint = Checkpoint.open(tmp_path / "x")
    assert [file.name for file in checkpoint.weight_files] == list(shards)
    assert np.array_equal(checkpoint.rows(DOWN, 0, 64), packed[DOWN].exact.astype(np.float32))


def test_bitsandbytes_four_bits_equal_its_own(tmp_path):
    import torch
    from bitsandbytes import functional

    expected = {}
    for nested, kind in ((False, "nf4"), (True, "nf4"), (False, "fp4")):

        def pack(weight, nested=nested, kind=kind):
            codes, state = functional.quantize_4bit(
                torch.from_numpy(weight), blocksize=64, quant_type=kind, compress_statistics=nested
            )
            whole = functional.dequantize_4bit(codes, state).numpy()
            parts = {f"weight.{key}": value.numpy() for key, value in state.as_dict(packed=True).items()}
            return whole, {"weight": codes.numpy(), **parts}

        config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
        path = tmp_path / f"{kind}{nested}"
        # 72 columns: blocks of 64 run across rows.
        expected = write_quantized(path, pack, config, **SMALL, intermediate_size=72)
        checkpoint = Checkpoint.open(path)
        for name, whole in expected.items():
            found = checkpoint.rows(name, 0, len(whole))
            # The magnitudes of double quantization are sums in another order: 1.2e-7 of the largest value at most.
            np.testing.assert_allclose(found, whole, rtol=0, atol=3e-7 * np.abs(whole).max() if nested else 0)
            assert np.array_equal(checkpoint.rows(name, 3, 8), found[3:8])
        assert "no multiples of a scale" in checkpoint.quantized[DOWN].why_not(None)
        assert kind in checkpoint.notes[0]


def test_bitsandbytes_eight_bits(tmp_path):
    def pack(weight):
        maxima = np.abs(weight).max(1)
        codes = np.round(weight / maxima[:, None] * 127).astype(np.int8)
        return (codes, maxima), {"weight": codes, "SCB": maxima, "weight_format": np.array(0, np.uint8)}

    packed = write_quantized(tmp_path / "x", pack, {"quant_method": "bitsandbytes", "load_in_8bit": True}, **SMALL)
    checkpoint, (codes, maxima) = Checkpoint.open(tmp_path / "x"), packed[DOWN]
    exact = codes * (maxima[:, None].astype(np.float64) / 127)
    np.testing.assert_allclose(
        checkpoint.rows(DOWN, 0, 64), exact, rtol=2e-7
    )  # the scale and the product: two roundings
    assert checkpoint.quantized[DOWN].groupsize is None


@pytest.mark.parametrize(("symmetric", "size", "bits"), [(True, 32, 4), (False, 32, 4), (True, None, 8)])
def test_compressed_tensors_unpacks_the_same(tmp_path, symmetric, size, bits):
    library = pytest.importorskip("compressed_tensors", reason="not installed")
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    config = compressed_config(bits, size, symmetric=symmetric)
    scheme = QuantizationScheme.model_validate(config["config_groups"]["group_0"])
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    assert library
    whole = {}

    def pack(weight):
        one = quantize(weight, bits=bits, size=size, symmetric=symmetric)
        parts = compressed(one, bits=bits, symmetric=symmetric)
        state = {key: torch.from_numpy(value) for key, value in parts.items()}
        state["weight_scale"] = torch.from_numpy(one.scales.astype(np.float32))  # in bfloat16 it would round products
        whole[len(whole)] = compressor.decompress(state, scheme)["weight"].numpy()
        return one, parts

    packed = write_quantized(tmp_path / "x", pack, config, **SMALL)
    checkpoint = Checkpoint.open(tmp_path / "x")
    for name, theirs in zip(packed, whole.values(), strict=True):
        assert np.array_equal(checkpoint.rows(name, 0, len(theirs)), theirs), name


# Bad input. Each changes the tensors or the config of a good checkpoint.


def changed(tmp_path, form, change, config=None):
    pack, said = FORMS[form]

    def packing(weight):
        one, parts = pack(weight)
        change(parts)
        return one, parts

    write_quantized(tmp_path / "x", packing, said if config is None else config(said), **SMALL)
    return tmp_path / "x"


def shorter(key, axis=0):
    def change(parts):
        parts[key] = np.take(parts[key], range(parts[key].shape[axis] - 1), axis)

    return change


def recast(key, kind):
    def change(parts):
        parts[key] = parts[key].astype(kind)

    return change


@pytest.mark.parametrize(
    ("form", "change", "words"),
    [
        ("gptq", shorter("scales"), "do not fit each other (GPTQ"),
        ("gptq", shorter("g_idx"), "g_idx is [63], its codes have 64 columns"),
        ("gptq", lambda parts: parts.pop("qzeros"), "qzeros missing beside qweight"),
        ("gptq", recast("qweight", np.int64), "qweight is int64, expected int32"),
        ("gptq", recast("scales", np.int32), "scales is int32, expected a float"),
        ("awq", shorter("qzeros", 1), "do not fit each other (AWQ"),
        ("compressed-int4", shorter("weight_scale"), "weight_scale [127, 2] does not fit codes [128, 64]"),
        ("compressed-int4", lambda parts: parts.pop("weight_scale"), "weight_packed has no weight_scale"),
        ("compressed-int4", lambda parts: parts.pop("weight_shape"), "has no weight_shape"),
        ("compressed-int4", shorter("weight_packed", 1), "7 words hold 64 codes, which are then of 3.5 bits"),
        ("compressed-int4-asymmetric", lambda parts: parts.pop("weight_zero_point"), "there is no weight_zero_point"),
        ("compressed-int4-asymmetric", shorter("weight_zero_point"), "weight_zero_point is int32 [15, 2], expected"),
        ("compressed-int8", shorter("weight_scale"), "weight_scale [127, 1] does not fit codes [128, 64]"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_each_other(tmp_path, form, change, words):
    text = refusal(changed(tmp_path, form, change))
    assert words in text
    assert f"wrong codes: {Q_PROJ}." in text
    assert "14 tensor(s)" in text


@pytest.mark.parametrize(
    ("form", "config", "words"),
    [
        ("gptq", lambda said: said | {"group_size": 64}, "are int4 in groups of 32, GPTQ, config.json says int4"),
        ("gptq", lambda said: said | {"bits": 8}, "config.json says int8 in groups of 32"),
        ("gptq", lambda said: {**said, "quant_method": "awq", "version": "gemm"}, "do not fit each other (AWQ"),
        ("gptq", lambda said: said | {"checkpoint_format": "marlin"}, "gptq codes packed as 'marlin'"),
        ("awq", lambda said: said | {"version": "gemv"}, "awq codes packed as 'gemv'"),
        ("compressed-int4", lambda said: compressed_config(4, 128), "config.json says int4 in groups of 128"),
        ("compressed-int4", lambda said: {"quant_method": "quark"}, "already quantized (quark)"),
    ],
)
def test_tensors_that_contradict_the_config(tmp_path, form, config, words):
    path = changed(tmp_path, form, lambda parts: None, config)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path)
    assert words in str(caught.value)


def test_codes_without_a_config_are_not_guessed(tmp_path):
    write_quantized(tmp_path / "x", FORMS["gptq"][0], None, **SMALL)
    assert "has codes (model.layers.0.self_attn.q_proj.qweight), and config.json no quantization_config" in refusal(
        tmp_path / "x"
    )


def test_fp8_is_refused_by_name(tmp_path):
    config = compressed_config(8, None, format="naive-quantized")
    write_quantized(tmp_path / "x", FORMS["compressed-int8"][0], config, kinds={**DTYPES, "int8": "F8_E4M3"}, **SMALL)
    assert f"{Q_PROJ}.weight holds fp8 numbers: int4 and int8 codes are read" in refusal(tmp_path / "x")


def test_two_quantizations_in_one_file(tmp_path):
    awq_pack, gptq_config = FORMS["compressed-int4"][0], FORMS["gptq"][1]
    count = iter(range(14))

    def pack(weight):
        return (FORMS["gptq"][0] if next(count) % 2 else awq_pack)(weight)

    write_quantized(tmp_path / "x", pack, gptq_config, **SMALL)
    assert "two quantizations in one file: 7 matrices of compressed-tensors, 7 matrices of gptq" in refusal(
        tmp_path / "x"
    )


def test_floats_beside_their_codes(tmp_path):
    def pack(weight):
        one, parts = FORMS["gptq"][0](weight)
        return one, parts | {"weight": bfloat16(weight)}

    write_quantized(tmp_path / "x", pack, FORMS["gptq"][1], **SMALL)
    assert f"twice: {Q_PROJ}.weight is there as floats and as codes" in refusal(tmp_path / "x")


def test_floats_are_believed_whatever_the_config_says(tmp_path):
    """compressed-tensors after a forward: bfloat16 weights, their scales still beside them, status decompressed."""
    floats = {}

    def pack(weight):
        one = quantize(weight, bits=8)
        floats[len(floats)] = weight
        return one, {"weight": bfloat16(weight), "weight_scale": bfloat16(one.scales)}

    config = compressed_config(8, None, format="int-quantized", quantization_status="decompressed")
    packed = write_quantized(tmp_path / "x", pack, config, **SMALL)
    checkpoint = Checkpoint.open(tmp_path / "x")
    assert not checkpoint.quantized
    assert not checkpoint.is_dequantized
    for name, weight in zip(packed, floats.values(), strict=True):
        assert np.array_equal(checkpoint.rows(name, 0, len(weight)), weight)
    first, second = checkpoint.notes[:2]
    assert "compressed-tensors, quantization_status decompressed, but the tensors are floats" in first
    assert "14 scales and zero points beside weights that are floats are not read, as quantization_status dec" in second
    assert second.endswith(f"says that they are applied already: {Q_PROJ}.weight_scale and others")
    config["quantization_status"] = "frozen"
    write_quantized(tmp_path / "frozen", pack, config, **SMALL)
    second = Checkpoint.open(tmp_path / "frozen").notes[1]
    assert f"beside weights that are floats are not read: {Q_PROJ}.weight_scale" in second
    config["quantization_status"] = "compressed"
    write_quantized(tmp_path / "packed", pack, config, **SMALL)
    said = f"{Q_PROJ}.weight_scale lies beside a weight of floats (14 so), and config.json says quantization_status co"
    assert said in refusal(tmp_path / "packed")


def test_part_of_the_linears_and_a_list_that_is_wrong(tmp_path):
    config = compressed_config(4, 32, ignore=["lm_head", "model.layers.0.mlp.up_proj", "re:.*down_proj"])
    packed = write_quantized(
        tmp_path / "x", FORMS["compressed-int4"][0], config, only=lambda name: ".layers.0.mlp." in name, **SMALL
    )
    checkpoint = Checkpoint.open(tmp_path / "x")
    assert set(checkpoint.quantized) == set(packed)
    assert len(packed) == 3
    assert "3 matrices are int4 in groups of 32, compressed-tensors; 11 of 14 linears are floats" in checkpoint.notes[0]
    assert "lists model.layers.0.mlp.up_proj as not quantized, but it has codes" in checkpoint.notes[1]


def test_activations_that_are_not_rounded_are_told(tmp_path):
    config = compressed_config(8, None, format="int-quantized")
    config["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "dynamic": True}
    write_quantized(tmp_path / "x", FORMS["compressed-int8"][0], config, **SMALL)
    assert "rounded activations as well (input_activations)" in Checkpoint.open(tmp_path / "x").notes[-1]


def test_groups_out_of_range_are_told_when_they_are_read(tmp_path):
    def change(parts):
        parts["g_idx"][5] = 9

    path = changed(tmp_path, "gptq", change)
    assert "g_idx names groups 0 to 9 of 2" in refusal(path)


def test_scales_that_are_no_numbers_give_none_and_no_warning(tmp_path):
    def change(parts):
        parts["scales"][0, 0], parts["scales"][1, 1] = np.inf, np.nan

    checkpoint = Checkpoint.open(changed(tmp_path, "gptq", change))
    rows = checkpoint.rows(f"{Q_PROJ}.weight", 0, 3)  # pytest makes an error of a warning
    assert not np.isfinite(rows[0, :32]).all()
    assert np.isnan(rows[1, 32:]).all()
    assert np.isfinite(rows[2]).all()


def test_words_are_read_from_their_lowest_bits():
    codes = np.arange(16)[None]
    assert words_along(codes, 4).view(np.uint32).tolist() == [[0x76543210, 0xFEDCBA98]]
    assert bitsandbytes.STATE
