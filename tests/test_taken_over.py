"""Quantized checkpoints compiled as a user would: codes and scales are in the artifact bit for bit, or told why not."""

import json

import gguf
import numpy as np
import pytest
import yaml

from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.artifact.weights import ArtifactWeights
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.cli import main
from gemma_deploy.params import taken_over as taking
from gemma_deploy.testing import TINY_EXPERTS, TINY_PER_LAYER, write_tiny_checkpoint
from gemma_deploy.verifying import verify
from tests.calibration.make import write_tokenizer
from tests.checkpoint.gguf_make import write_gemma3n, write_gemma4
from tests.checkpoint.quantized_make import FORMS, read_floats, write_quantized
from tests.checkpoint.test_gguf import write_gguf

DOWN = "model.layers.1.mlp.down_proj"
SMALL = {"num_hidden_layers": 3, "sliding_window_pattern": 3}


@pytest.fixture
def recipe(tmp_path):
    """(checkpoint, quantize section, back end, other sections) -> recipe file; P is four windows of the tiny models."""

    def write(path, quantize, backend="onnxruntime", **sections):
        content = {
            "name": "x",
            "frontend": {
                "checkpoint": str(path),
                "type": "gguf" if str(path).endswith(".gguf") else "huggingface",
                "shape": {"input_ids": [[32], [48]]},
                "quantize": quantize,
                "model_kwargs": sections.pop("model_kwargs", {}),
            },
            "backend": {"type": backend, "dtype": "int8"} | sections.pop("options", {}),
            "parity": {"prompt_tokens": 32, "decode_tokens": 8},
            "dataset": {"name": "c4:2", "seqlen": 32},
            "workspace": {"path": str(tmp_path / "w")},
            **sections,
        }
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
        return str(tmp_path / "r.yaml")

    return write


@pytest.fixture
def quantized(tmp_path):
    def make(form, **changes):
        pack, config = FORMS[form]
        packed = write_quantized(tmp_path / "q", pack, config, **SMALL | changes)
        write_tokenizer(tmp_path / "q")
        return tmp_path / "q", packed

    return make


def compiled(tmp_path, capsys, *arguments):
    assert main(["compile", *arguments]) == 0, capsys.readouterr().err
    manifest = json.loads((tmp_path / "w" / "x" / "manifest.json").read_text())
    verify(tmp_path / "w" / "x")  # raises where something is wrong
    assert manifest["parity"]["passed"]
    return manifest


def stored(tmp_path, checkpoint):
    artifact = Artifact.open(tmp_path / "w" / "x")
    return ArtifactWeights(Checkpoint.open(checkpoint).config, artifact.path, artifact.manifest)


def line(manifest, name):
    return [one for one in manifest["parity"]["lines"] if one["name"] == name]


def assert_taken(weights, packed, repeated=1):
    """Every code and scale is what went in, code by code."""
    assert packed
    for name, one in packed.items():
        codes, scales = weights.codes(name)
        assert np.array_equal(codes, one.codes - one.zeros[:, one.groups]), name
        assert np.array_equal(scales, np.repeat(one.scales, repeated, axis=1)), name


@pytest.mark.parametrize(
    ("form", "scheme", "bits", "backend"),
    [
        ("gptq", "w4a16_rtn", 4, "onnxruntime"),
        ("gptq_v2", "w4a16_rtn", 4, "tvm_vacc"),
        ("awq", "w8a16", 8, "onnxruntime"),
        pytest.param("awq-symmetric", "w4a16_rtn", 4, "tvm_vacc", marks=pytest.mark.slow),
        pytest.param("compressed-int4", "w4a16_rtn", 4, "onnxruntime", marks=pytest.mark.slow),
        pytest.param("compressed-int4-asymmetric", "w8a16", 8, "tvm_vacc", marks=pytest.mark.slow),
        pytest.param("compressed-int8", "w8a16", 8, "onnxruntime", marks=pytest.mark.slow),
        pytest.param("compressed-int8", "w8a16", 8, "tvm_vacc", marks=pytest.mark.slow),
        pytest.param("gptq-int8", "w8a16", 8, "tvm_vacc", marks=pytest.mark.slow),
    ],
)
def test_every_code_and_scale_is_the_inputs(recipe, quantized, tmp_path, capsys, form, scheme, bits, backend):
    path, packed = quantized(form)
    manifest = compiled(tmp_path, capsys, recipe(path, {"type": scheme}, backend))
    assert_taken(stored(tmp_path, path), packed)
    rows = {row["name"]: row for row in manifest["params"]}
    assert len(packed) == 21
    for name in packed:
        assert rows[name]["scheme"] == rows[f"{name.removesuffix('.weight')}.scale"]["scheme"] == "taken_over"
        assert rows[name]["dtype"].removeprefix("u") == f"int{bits}"
    (differ,) = line(manifest, "taken-over numbers that differ")
    assert differ["value"] == 0
    (exact,) = [one for one in manifest["parity"]["lines"] if one["comparison"] == "hf = patched"]
    assert exact["value"] <= 1e-5
    (arrived,) = manifest["checkpoint"]["arrived"]
    assert (arrived["matrices"], arrived["taken_over"], arrived["why"]) == (21, True, None)
    (told,) = [entry for entry in manifest["ledger"] if entry["what"].startswith("taken over")]
    assert told["where"] == f"21 matrices that arrived as {arrived['form']}"
    assert main(["inspect", str(tmp_path / "w" / "x")]) == 0
    shown = capsys.readouterr().out
    assert "arrived quantized" in shown
    assert "taken over" in shown


@pytest.mark.parametrize(
    ("kind", "scheme", "dtype"),
    [
        ("Q4_0", "w4a16_rtn", "int4"),
        pytest.param("Q8_0", "w8a16", "int8", marks=pytest.mark.slow),
        ("Q8_0", "w8a16+kv8", "int8"),
    ],
)
def test_gguf_blocks(recipe, tmp_path, capsys, kind, scheme, dtype):
    floats = write_quantized(tmp_path / "f", None, None, only=lambda name: False, **SMALL)
    assert not floats
    raw = json.loads((tmp_path / "f" / "config.json").read_text())
    tensors = {name: values for name, (_, values) in read_floats(tmp_path / "f").items()}
    write_gguf(tmp_path / "m.gguf", raw, tensors, quantize=gguf.GGMLQuantizationType[kind])
    write_tokenizer(tmp_path)
    backend = "tvm_vacc" if "kv8" in scheme else "onnxruntime"
    manifest = compiled(tmp_path, capsys, recipe(tmp_path / "m.gguf", {"type": scheme}, backend))
    weights, names = stored(tmp_path, tmp_path / "m.gguf"), [name for name in tensors if tensors[name].ndim == 2]
    taken = {row["name"]: row["dtype"] for row in manifest["params"] if row["scheme"] == "taken_over"}
    assert set(taken) == {one for name in names for one in (name, name.replace(".weight", ".scale"))}
    for name in names:
        blocks = gguf.quants.quantize(tensors[name], gguf.GGMLQuantizationType[kind])
        blocks = blocks.reshape(len(blocks), tensors[name].shape[1] // 32, -1)
        scales = blocks[..., :2].copy().view(np.float16)[..., 0].astype(np.float32)
        if kind == "Q8_0":
            expected = blocks[..., 2:].view(np.int8).reshape(len(blocks), -1)
        else:
            expected = np.stack([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], axis=2).reshape(len(blocks), -1) - 8.0
        codes, found = weights.codes(name)
        assert np.array_equal(codes, expected), name
        assert np.array_equal(found, scales), name
        # A table has 8 bits at least: codes of 4 lie in as many of 8.
        assert taken[name].removeprefix("u") == ("int8" if "embed" in name else dtype)
    (entry,) = (one for one in manifest["ledger"] if f"GGUF {kind}" in one["where"])
    assert entry["what"].startswith("taken over")


@pytest.mark.parametrize(
    ("kind", "scheme", "bits"),
    [("Q4_0", "w4a16_rtn", 4), pytest.param("Q8_0", "w8a16", 8, marks=pytest.mark.slow)],
)
def test_gguf_blocks_of_gemma_4(recipe, tmp_path, capsys, kind, scheme, bits):
    """With per-layer embeddings: both tables and what layers make of them, at 8 bits or more.

    The projection that makes all vectors at once has a scale for each row in every artifact.
    """
    changes = {**TINY_PER_LAYER, "num_global_key_value_heads": None}
    floats = Checkpoint.open(write_tiny_checkpoint(tmp_path / "f", "gemma4_text", **changes))
    write_gemma4(tmp_path / "m.gguf", tmp_path / "f", kind=gguf.GGMLQuantizationType[kind])
    write_tokenizer(tmp_path)
    manifest = compiled(tmp_path, capsys, recipe(tmp_path / "m.gguf", {"type": scheme}))
    weights = stored(tmp_path, tmp_path / "m.gguf")
    taken = {row["name"]: row["dtype"] for row in manifest["params"] if row["scheme"] == "taken_over"}
    names = [name for name, info in floats.tensors.items() if len(info.shape) == 2]
    names.remove("model.per_layer_model_projection.weight")
    (left,) = (row for row in manifest["checkpoint"]["arrived"] if not row["taken_over"])
    assert left["matrices"] == 1
    assert "a scale for each group of 32 columns, the artifact one for each row" in left["why"]
    assert set(taken) == {one for name in names for one in (name, name.replace(".weight", ".scale"))}
    for name in names:
        codes, scales = weights.codes(name)
        rows = floats.rows(name, 0, floats.tensors[name].shape[0])
        blocks = gguf.quants.quantize(rows, gguf.GGMLQuantizationType[kind])
        right = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])
        assert np.array_equal(codes * np.repeat(scales, 32, axis=1), right), name
        in_layers = "layers" in name and "per_layer" not in name
        assert taken[name].removeprefix("u") == f"int{bits if in_layers else 8}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "kind", "scheme", "floats"),
    [
        ("26b", "Q4_0", "w4a16_rtn", ("router.",)),
        ("26b", "Q8_0", "w8a16", ("router.",)),
        ("3n", "Q4_0", "w4a16_rtn", ("altup", "laurel", "per_layer_model_projection")),
        ("3n", "Q8_0", "w8a16", ("altup", "laurel", "per_layer_model_projection")),
    ],
)
def test_gguf_blocks_of_experts_and_streams(recipe, tmp_path, capsys, model, kind, scheme, floats):
    """Every expert's matrices too; routers, maps between streams and what is small are stored as floats."""
    experts = {**TINY_EXPERTS, "num_hidden_layers": 3, "moe_intermediate_size": 64}
    streams = {"vocab_size_per_layer_input": 512, "laurel_rank": 32}  # a block of Q8_0
    own = {"26b": ("gemma4_text", experts), "3n": ("gemma3n_text", streams)}[model]
    checkpoint = Checkpoint.open(write_tiny_checkpoint(tmp_path / "f", own[0], **own[1]))
    write = write_gemma4 if model == "26b" else write_gemma3n
    write(tmp_path / "m.gguf", tmp_path / "f", kind=gguf.GGMLQuantizationType[kind])
    write_tokenizer(tmp_path)
    backend = "tvm_vacc" if model == "26b" else "onnxruntime"
    manifest = compiled(tmp_path, capsys, recipe(tmp_path / "m.gguf", {"type": scheme}, backend))
    taken = {row["name"] for row in manifest["params"] if row["scheme"] == "taken_over"}
    matrices = [name for name, info in checkpoint.tensors.items() if len(info.shape) == 2]
    names = [name for name in matrices if not any(part in name for part in floats)]
    assert {name for name in matrices if name in taken} == set(names)
    assert sum(one["matrices"] for one in manifest["checkpoint"]["arrived"] if one["taken_over"]) == len(names)
    weights = stored(tmp_path, tmp_path / "m.gguf")
    for name in names:
        rows = checkpoint.rows(name, 0, checkpoint.tensors[name].shape[0])
        blocks = gguf.quants.quantize(rows, gguf.GGMLQuantizationType[kind])
        right = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])
        assert np.array_equal(weights.rows(name, 0, len(rows)), right), name


@pytest.mark.slow
def test_groups_are_repeated_where_the_recipe_wants_smaller_ones(recipe, quantized, tmp_path, capsys):
    path, packed = quantized("compressed-int8")
    quantize = {"type": "w4a16_rtn", "calib_args": {"groupsize": 32, "keep_w8": list(kinds())}}
    compiled(tmp_path, capsys, recipe(path, quantize))
    weights = stored(tmp_path, path)
    for name, one in packed.items():
        codes, scales = weights.codes(name)
        assert np.array_equal(codes, one.codes - 128)
        assert scales.shape == (len(codes), codes.shape[1] // 32)
        assert (scales == one.scales).all()


def kinds():
    return ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize(
    ("form", "quantize", "why"),
    [
        ("gptq-act-order", {"type": "w8a16"}, "its groups are no runs of columns (act order)"),
        ("awq", {"type": "w4a16_rtn"}, "and 4 bits do not hold the differences"),
        ("gptq", {"type": "w4a16_rtn", "calib_args": {"groupsize": 64}}, "its groups of 32 are no multiple of"),
        ("compressed-int8", {"type": "w4a16_rtn"}, "it has codes of 8 bits, the artifact 4"),
        pytest.param("gptq", {"type": "w4a16"}, "the scheme chooses codes of its own", marks=pytest.mark.slow),
    ],
)
def test_what_does_not_fit_is_dequantized_once_and_told(recipe, quantized, tmp_path, capsys, form, quantize, why):
    # 64 and 128 input channels everywhere: groups of 64 divide them
    path, _ = quantized(form, intermediate_size=128)
    assert main(["compile", "--no-parity", recipe(path, quantize)]) == 0, capsys.readouterr().err
    manifest = json.loads((tmp_path / "w" / "x" / "manifest.json").read_text())
    rows = [row for row in manifest["checkpoint"]["arrived"] if not row["taken_over"]]
    assert any(why in row["why"] for row in rows)
    told = [entry for entry in manifest["ledger"] if entry["what"].startswith("dequantized once")]
    assert [entry["why"] for entry in told] == [row["why"] for row in rows]


def test_the_plan_says_what_will_be_taken_over(recipe, quantized, capsys):
    path, _ = quantized("gptq")
    assert main(["compile", "--dry-run", recipe(path, {"type": "w4a16_rtn"})]) == 0
    assert "21 of 21 matrices that arrive quantized are taken over as they are" in " ".join(
        capsys.readouterr().out.split()
    )


def test_floats_say_that_they_were_dequantized(recipe, quantized, tmp_path, capsys):
    path, packed = quantized("awq")
    manifest = compiled(tmp_path, capsys, recipe(path, None, options={"dtype": "fp32"}))
    (row,) = manifest["checkpoint"]["arrived"]
    assert (row["matrices"], row["taken_over"], row["why"]) == (21, False, "the scheme stores floats")
    weights = stored(tmp_path, path)
    for name, one in packed.items():
        assert np.array_equal(weights.rows(name, 0, len(one.codes)), one.exact.astype(np.float32))


def test_part_of_the_linears_is_taken_over_and_the_rest_rounded(recipe, tmp_path, capsys):
    pack, config = FORMS["compressed-int4"]
    packed = write_quantized(tmp_path / "q", pack, config, only=lambda name: ".mlp." in name, **SMALL)
    write_tokenizer(tmp_path / "q")
    manifest = compiled(tmp_path, capsys, recipe(tmp_path / "q", {"type": "w4a16_rtn"}))
    assert manifest["storage"]["kept_w8"] == ["k_proj", "v_proj"]
    assert len(packed) == 9
    assert_taken(stored(tmp_path, tmp_path / "q"), packed)
    rows = {row["name"]: row["scheme"] for row in manifest["params"]}
    assert rows["model.layers.0.self_attn.q_proj.weight"] == "int4_per_group"
    assert rows["model.layers.0.self_attn.k_proj.weight"] == "int8_per_channel"


def test_a_recipe_that_wants_whole_rows_gets_them(recipe, quantized, tmp_path, capsys):
    """Integer products have one scale per row: codes in groups are dequantized for them."""
    path, _ = quantized("awq")
    options = {"compile": {"prefill": "fast"}}
    assert main(["compile", "--no-parity", recipe(path, {"type": "w8a16"}, options=options)]) == 0
    manifest = json.loads((tmp_path / "w" / "x" / "manifest.json").read_text())
    assert manifest["storage"]["linears"] == {"bits": 8, "groupsize": None}
    (row,) = manifest["checkpoint"]["arrived"]
    assert "a scale for each group of 32 columns, the artifact one for each row" in row["why"]


@pytest.mark.slow
def test_ranks_and_stages_take_over_their_parts(recipe, quantized, tmp_path, capsys):
    path, packed = quantized("compressed-int4", intermediate_size=128)
    parts = {"model_kwargs": {"tp": 2}, "split": {"points": [1]}}
    compiled(tmp_path, capsys, recipe(path, {"type": "w4a16_rtn"}, "tvm_vacc", **parts))
    assert_taken(stored(tmp_path, path), packed)


def test_the_gate_sees_one_code_that_is_off(recipe, quantized, tmp_path, capsys, monkeypatch):
    path, _ = quantized("compressed-int4")
    real = taking.TakenOver.raw_rows

    def off_by_one(self, name, start, stop):
        rows = real(self, name, start, stop)
        if name == f"{DOWN}.weight" and start == 0:
            rows[0, 0] += 1
        return rows

    monkeypatch.setattr(taking.TakenOver, "raw_rows", off_by_one)
    assert main(["compile", recipe(path, {"type": "w4a16_rtn"})]) == 1
    assert "taken-over numbers that differ 1, must be <= 0" in capsys.readouterr().err


def test_scales_that_are_no_numbers_are_refused(recipe, tmp_path, capsys):
    pack, config = FORMS["gptq"]

    def packing(weight):
        one, parts = pack(weight)
        parts["scales"][1, 3] = np.inf
        return one, parts

    write_quantized(tmp_path / "q", packing, config, **SMALL)
    write_tokenizer(tmp_path / "q")
    assert main(["compile", recipe(tmp_path / "q", {"type": "w4a16_rtn"})]) == 1
    assert "q_proj.scale: a scale in rows 0 to 127 is NaN or infinite" in capsys.readouterr().err
