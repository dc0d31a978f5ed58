"""Files for llama.cpp: what the gguf package reads of them, and what NumPy makes of their bytes."""

import json
import os
import shutil
import sys
from contextlib import closing
from itertools import pairwise

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from transformers import AutoModelForCausalLM

from gemma_deploy.architectures import by_gguf_name
from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.artifact.weights import ArtifactWeights
from gemma_deploy.backends.gguf.source import ENGINE, LlamaSource
from gemma_deploy.backends.gguf.vocabulary import vocabulary_of
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.cli import main
from gemma_deploy.engine import open_engine
from gemma_deploy.errors import CheckpointError, DeployError, UsageError
from gemma_deploy.params.blocks import decode, encode
from gemma_deploy.parity.cases import Case
from gemma_deploy.paths import PACKAGE
from gemma_deploy.runtime.generate import GenerationStats
from gemma_deploy.testing import write_tiny_checkpoint
from gemma_deploy.text.files import TokenizerFiles
from tests.calibration.make import write_tokenizer

LINEARS = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
# llama.cpp has no key for another attention scale.
SCALAR = {"gemma": {}, "gemma2": {"query_pre_attn_scalar": 32}, "gemma3_text": {"query_pre_attn_scalar": 32}}


LLAMA_IS_THERE = pytest.mark.skipif(
    not os.environ.get(ENGINE.variable), reason=f"{ENGINE.variable} names no Python with llama.cpp"
)


def recipe_of(root, checkpoint, scheme, **keys):
    quantize = {} if scheme in ("bf16", "fp16", "fp32") else {"quantize": {"type": scheme, **keys}}
    recipe = {
        "name": scheme,
        "frontend": {"checkpoint": str(checkpoint), "shape": {"input_ids": [[32], [64]]}, **quantize},
        "backend": {"type": "gguf", "dtype": "int8" if quantize else scheme},
        "workspace": {"path": str(root)},
    }
    file = root / f"{scheme}.yaml"
    file.write_text(json.dumps(recipe))
    return file


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(scheme, generation) -> an artifact for llama.cpp, unproven, and its checkpoint."""
    known = {}

    def make(scheme, generation="gemma3_text"):
        if (scheme, generation) not in known:
            root = tmp_path_factory.mktemp(scheme)
            write_tokenizer(write_tiny_checkpoint(root / "ck", generation, **SCALAR[generation]))
            assert main(["compile", str(recipe_of(root, root / "ck", scheme)), "--no-parity"]) == 0
            known[scheme, generation] = root / scheme, root / "ck"
        return known[scheme, generation]

    return make


def tensors_of(artifact):
    """Name -> tensor, as the gguf package reads them."""
    return {one.name: one for one in gguf.GGUFReader(artifact / "model.gguf").tensors}


def fields_of(artifact):
    """Key -> value, likewise."""
    return {name: field.contents() for name, field in gguf.GGUFReader(artifact / "model.gguf").fields.items()}


def by_hand(tensor):
    """Codes [rows, columns] and scales [rows, groups] of Q8_0 or Q4_0, byte by byte as ggml-quants.h has them."""
    eight = tensor.tensor_type == gguf.GGMLQuantizationType.Q8_0
    rows, size = int(tensor.shape[1]), 34 if eight else 18
    raw = np.asarray(tensor.data).view(np.uint8).reshape(rows, -1, size)
    scales, codes = np.zeros(raw.shape[:2], np.float32), np.zeros((*raw.shape[:2], 32), np.int32)
    for at in np.ndindex(raw.shape[:2]):
        block = raw[at].tobytes()
        scales[at] = np.frombuffer(block[:2], "<f2")[0]
        for i, byte in enumerate(block[2:]):
            if eight:
                codes[at][i] = byte - 256 if byte > 127 else byte
            else:
                codes[at][i], codes[at][i + 16] = byte % 16 - 8, byte // 16 - 8
    return codes.reshape(rows, -1), scales


def read_back(checkpoint, name):
    """Codes and scales as the reader of everybody's files takes them over."""
    matrix = checkpoint.quantized[name]
    return matrix.differences(0, matrix.shape[0]), matrix.scales(0, matrix.shape[0])


@pytest.mark.parametrize("dtype", ["q8_0", "q4_0"])
def test_blocks_are_those_of_the_gguf_package(dtype):
    most = 128 if dtype == "q8_0" else 8
    rng = np.random.default_rng(3)
    codes = rng.integers(-most, most, (5, 96)).astype(np.int8)
    scales = rng.random((5, 3)).astype(np.float16).astype(np.float32)
    stored = encode(torch.from_numpy(codes), torch.from_numpy(scales), dtype).numpy()
    kind = gguf.GGMLQuantizationType[dtype.upper()]
    np.testing.assert_array_equal(dequantize(stored, kind), codes * np.repeat(scales, 32, axis=1))
    for given, found in zip((codes, scales), decode(stored, dtype), strict=True):
        np.testing.assert_array_equal(given, found)


@pytest.mark.parametrize(
    ("scheme", "generation"),
    [("w8a16", "gemma"), ("w8a16", "gemma2"), ("w8a16", "gemma3_text"), ("w4a16_rtn", "gemma2")],
)
def test_codes_are_what_the_checkpoint_rounds_to(made, scheme, generation):
    artifact, checkpoint = made(scheme, generation)
    tensors, source = tensors_of(artifact), Checkpoint.open(checkpoint)
    read = Checkpoint.open(artifact / "model.gguf")
    weights = ArtifactWeights(source.config, artifact, Artifact.open(artifact).manifest)
    names = {f"blk.1.{own}.weight": f"model.layers.1.{name}.weight" for own, name in LINEARS.items()}
    for own, name in {"token_embd.weight": "model.embed_tokens.weight", **names}.items():
        tensor, original = tensors[own], source.rows(name, 0, source.tensors[name].shape[0])
        linear = own != "token_embd.weight"
        four = scheme == "w4a16_rtn" and linear
        assert tensor.tensor_type.name == ("Q4_0" if four else "Q8_0")
        codes, scales = by_hand(tensor)
        made_again = codes.astype(np.float32) * np.repeat(scales, 32, axis=1)
        if not four:
            largest = np.abs(original).reshape(len(original), -1, 32).max(2) / 127
            np.testing.assert_array_equal(scales, largest.astype(np.float16).astype(np.float32))
        # Each code is the nearest: half a step, and what float16 rounds a scale by 127 times.
        steps = np.repeat(scales, 32, axis=1)
        within = np.clip(original, -7 * steps, 7 * steps) if four else original
        assert (np.abs(made_again - within) <= steps * 0.57).all()
        assert codes.min() >= (-7 if four else -127)
        np.testing.assert_array_equal(dequantize(np.asarray(tensor.data), tensor.tensor_type), made_again)
        np.testing.assert_array_equal(weights.rows(name, 0, len(original)), made_again)
        np.testing.assert_array_equal(read.rows(name, 0, len(original)), made_again)
        for own_codes, own_scales in (weights.codes(name), read_back(read, name)):
            np.testing.assert_array_equal(own_codes, codes)
            np.testing.assert_array_equal(own_scales.view(np.uint32), scales.view(np.uint32))


@pytest.mark.parametrize("generation", SCALAR)
@pytest.mark.parametrize(("scheme", "kind"), [("bf16", "BF16"), ("fp16", "F16"), ("fp32", "F32")])
def test_floats_are_the_checkpoints_own_and_norms_what_they_multiply_by(made, scheme, kind, generation):
    artifact, checkpoint = made(scheme, generation)
    tensors, source = tensors_of(artifact), Checkpoint.open(checkpoint)
    assert len(tensors) == len(source.tensors)
    matrix = tensors["blk.0.ffn_down.weight"]
    assert matrix.tensor_type.name == kind
    original = source.rows("model.layers.0.mlp.down_proj.weight", 0, 64)
    given = original.astype(np.float16).astype(np.float32) if kind == "F16" else original
    np.testing.assert_array_equal(dequantize(np.asarray(matrix.data), matrix.tensor_type).reshape(64, -1), given)
    norm = tensors["blk.2.attn_norm.weight"]
    assert norm.tensor_type.name == "F32"
    wanted = np.float32(1) + source.rows("model.layers.2.input_layernorm.weight", 0, 64)
    np.testing.assert_array_equal(np.asarray(norm.data), wanted)
    read = Checkpoint.open(artifact / "model.gguf").config
    for fact in ("layer_types", "rope", "sliding_window", "query_pre_attn_scalar", "final_logit_softcapping", "layers"):
        assert getattr(read, fact) == getattr(source.config, fact)


def test_metadata_are_those_of_the_converter(made):
    two = fields_of(made("w4a16_rtn", "gemma2")[0])
    assert two["general.architecture"] == "gemma2"
    assert two["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_0
    wanted = {
        "block_count": 5, "context_length": 512, "embedding_length": 64, "feed_forward_length": 160,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 32,
        "attention.value_length": 32, "attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "attention.sliding_window": 8, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 3.0,
    }  # fmt: skip
    assert {key: two[f"gemma2.{key}"] for key in wanted} == wanted
    assert len(two["tokenizer.ggml.tokens"]) == len(two["tokenizer.ggml.scores"]) == 512
    assert two["tokenizer.ggml.model"] == "llama"
    assert (two["tokenizer.ggml.bos_token_id"], two["tokenizer.ggml.eos_token_id"]) == (2, 1)
    assert (two["tokenizer.ggml.add_bos_token"], two["tokenizer.ggml.add_space_prefix"]) == (True, False)
    three = fields_of(made("w8a16", "gemma3_text")[0])
    assert three["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    assert three["gemma3.rope.freq_base"] == 1e6
    assert fields_of(made("fp16", "gemma")[0])["general.file_type"] == gguf.LlamaFileType.MOSTLY_F16


def test_every_key_of_a_model_with_all_there_is(tmp_path):
    keys = {
        "query_pre_attn_scalar": 32, "eos_token_id": [1, 106], "pad_token_id": 0, "rope_local_base_freq": 5000.0,
        "rope_theta": 250000.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "num_hidden_layers": 7,
        "sliding_window_pattern": 3, "max_position_embeddings": 4096,
    }  # fmt: skip
    write_tokenizer(write_tiny_checkpoint(tmp_path / "ck", "gemma3_text", **keys))
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (tmp_path / "ck" / "chat_template.jinja").write_text(template)
    assert main(["compile", str(recipe_of(tmp_path, tmp_path / "ck", "bf16")), "--no-parity"]) == 0
    said = {key: value for key, value in fields_of(tmp_path / "bf16").items() if not key.startswith("GGUF.")}
    lists = {name: said.pop(f"tokenizer.ggml.{name}") for name in ("tokens", "scores", "token_type")}
    assert [len(one) for one in lists.values()] == [512] * 3
    assert said == {
        "general.architecture": "gemma3", "general.type": "model", "general.name": "bf16",
        "general.file_type": gguf.LlamaFileType.MOSTLY_BF16, "general.quantization_version": gguf.GGML_QUANT_VERSION,
        "gemma3.block_count": 7, "gemma3.context_length": 4096, "gemma3.embedding_length": 64,
        "gemma3.feed_forward_length": 160, "gemma3.attention.head_count": 4, "gemma3.attention.head_count_kv": 2,
        "gemma3.attention.key_length": 32, "gemma3.attention.value_length": 32,
        "gemma3.attention.layer_norm_rms_epsilon": pytest.approx(1e-6), "gemma3.attention.sliding_window": 8,
        "gemma3.attention.sliding_window_pattern": 3, "gemma3.rope.freq_base": 250000.0,
        "gemma3.rope.freq_base_swa": 5000.0, "gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0,
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default", "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.eot_token_id": 106, "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0, "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False, "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.chat_template": template,
    }  # fmt: skip
    source, read = Checkpoint.open(tmp_path / "ck").config, Checkpoint.open(tmp_path / "bf16" / "model.gguf").config
    assert source.rope["full_attention"].factor == 8.0
    for fact in ("layer_types", "rope", "sliding_window", "eos_token_ids", "max_position_embeddings"):
        assert getattr(read, fact) == getattr(source, fact)


def pieces(text, vocabulary):
    """What llama.cpp makes of a text without added tokens: it joins the neighbours whose piece has the best score."""
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    parts = list(text.replace(" ", "\u2581"))
    assert set(parts) <= set(ids)
    while True:
        joined = [(vocabulary.scores[ids[a + b]], -at) for at, (a, b) in enumerate(pairwise(parts)) if a + b in ids]
        if not joined:
            return [ids[part] for part in parts]
        at = -max(joined)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def test_scores_make_the_tokens_that_merges_make():
    from tokenizers import Tokenizer

    demo = PACKAGE / "demo"
    vocabulary = vocabulary_of(TokenizerFiles(demo, CheckpointError), 4100, by_gguf_name()["gemma3"][1])
    tokenizer = Tokenizer.from_file(str(demo / "tokenizer.json"))
    text = "Return the value of the message, or raise an exception where there are several."
    assert pieces(text, vocabulary) == tokenizer.encode(text, add_special_tokens=False).ids
    assert vocabulary.tokens[-1] == "[PAD4099]"
    assert vocabulary.kinds[-1] == gguf.TokenType.UNUSED
    byte = tokenizer.token_to_id("<0x41>")
    assert vocabulary.kinds[byte] == gguf.TokenType.BYTE
    assert vocabulary.kinds[tokenizer.token_to_id("<bos>")] == gguf.TokenType.CONTROL


def test_a_file_made_of_such_a_file_has_the_same_tensors(tmp_path):
    for scheme, kind in (("w8a16", "Q8_0"), ("w4a16_rtn", "Q4_0")):
        first, second = tmp_path / f"{scheme}1", tmp_path / f"{scheme}2"
        first.mkdir()
        second.mkdir()
        assert main(["compile", str(recipe_of(first, PACKAGE / "demo", scheme)), "--no-parity"]) == 0
        shutil.copyfile(first / scheme / "model.gguf", tmp_path / f"{scheme}.gguf")
        again = recipe_of(second, tmp_path / f"{scheme}.gguf", scheme)
        assert main(["compile", str(again), "--no-parity"]) == 0
        once, twice = tensors_of(first / scheme), tensors_of(second / scheme)
        assert kind in {one.tensor_type.name for one in once.values()}
        assert list(once) == list(twice)
        for name, tensor in once.items():
            assert tensor.tensor_type == twice[name].tensor_type
            np.testing.assert_array_equal(np.asarray(tensor.data), np.asarray(twice[name].data))


def test_calibrated_scales_are_stored_as_codes_were_chosen_for_them(tmp_path):
    write_tokenizer(write_tiny_checkpoint(tmp_path / "ck", "gemma3_text", query_pre_attn_scalar=32))
    recipe = json.loads(recipe_of(tmp_path, tmp_path / "ck", "w8a16_gptq").read_text())
    recipe["dataset"] = {"name": "c4", "nsamples": 4, "seqlen": 32}
    file = tmp_path / "r.yaml"
    file.write_text(json.dumps(recipe))
    assert main(["compile", str(file), "--no-parity"]) == 0  # it refuses scales that are no numbers of float16
    assert main(["verify", str(tmp_path / "w8a16_gptq")]) == 0
    kinds = {one.tensor_type.name for one in tensors_of(tmp_path / "w8a16_gptq").values()}
    assert kinds == {"Q8_0", "F32"}


@pytest.mark.parametrize("where", ["metadata", "table", "tensor"])
def test_verify_sees_a_bit_that_changed(made, tmp_path, capsys, where):
    artifact, _ = made("w8a16", "gemma3_text")
    assert main(["verify", str(artifact)]) == 0
    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy)
    content = bytearray((copy / "model.gguf").read_bytes())
    at = {"metadata": content.index(b"gemma3.block_count") + 30, "table": content.index(b"blk.3.attn_q.weight")}
    content[at.get(where, len(content) - 40)] ^= 1
    (copy / "model.gguf").write_bytes(content)
    assert main(["verify", str(copy)]) == 1
    said = {"metadata": "general.metadata", "table": "the header differs", "tensor": "sha256 is"}
    assert said[where] in capsys.readouterr().err


def test_it_is_served_by_llama_server(made, capsys):
    artifact, _ = made("w8a16", "gemma3_text")
    capsys.readouterr()
    assert main(["serve-command", str(artifact), "--port", "8000"]) == 0
    words = capsys.readouterr().out.split()
    assert words[:3] == ["llama-server", "-m", str(artifact / "model.gguf")]
    assert words[words.index("-c") + 1] == "64"
    assert main(["serve-command", str(artifact), "--tensor-parallel-size", "2"]) == 2
    assert "served by one process" in capsys.readouterr().err
    assert main(["run", str(artifact), "-p", "x", "--lookup"]) == 2
    assert "llama.cpp decodes it" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["shorter", "gone"])
def test_no_command_serves_what_is_damaged(made, tmp_path, capsys, damage):
    copy = tmp_path / "copy"
    shutil.copytree(made("w8a16")[0], copy)
    file = copy / "model.gguf"
    if damage == "gone":
        file.unlink()
    else:
        os.truncate(file, file.stat().st_size - 1)
    assert main(["serve-command", str(copy)]) == 1
    told = capsys.readouterr()
    assert not told.out
    assert "model.gguf" in told.err


@pytest.mark.parametrize(
    ("generation", "quantize", "changes", "says"),
    [
        ("gemma3_text", {"type": "w8a16", "table": "int8_g64"}, {}, "blocks of llama.cpp have 32 codes"),
        ("gemma3_text", {"type": "w8a16_gptq", "calib_args": {"groupsize": 64}}, {}, "blocks of llama.cpp have 32"),
        ("gemma3_text", {"type": "w8a8"}, {}, "rounds activations in its own way"),
        ("gemma3_text", {"type": "w8a16+kv8"}, {}, "rounds its cache itself"),
        ("gemma3_text", {"type": "w8a16"}, {"query_pre_attn_scalar": 24}, "query_pre_attn_scalar is 24"),
        ("gemma2", {"type": "w8a16"}, {"tie_word_embeddings": False}, "reads no LM head"),
        ("gemma2", {"type": "w8a16"}, {"attn_logit_softcapping": None}, "attn_logit_softcapping is None"),
        ("vaultgemma", {"type": "w8a16"}, {}, "not built for VaultGemma"),
    ],
)
def test_what_llama_cpp_cannot_hold_is_refused_before_any_work(tmp_path, capsys, generation, quantize, changes, says):
    keys = {**SCALAR.get(generation, {}), **changes}
    write_tokenizer(write_tiny_checkpoint(tmp_path / "ck", generation, num_hidden_layers=2, **keys))
    file = recipe_of(tmp_path, tmp_path / "ck", quantize["type"], **{k: v for k, v in quantize.items() if k != "type"})
    assert main(["compile", str(file)]) == 2
    assert says in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / quantize["type"]).exists()


def test_without_llama_cpp_the_proof_says_where_to_get_it(monkeypatch, made):
    file = made("w8a16")[0] / "model.gguf"
    monkeypatch.delenv(ENGINE.variable, raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"llama\.cpp is not installed here") as told:
        ENGINE.python()
    assert ENGINE.variable in str(told.value.next_step)
    monkeypatch.setenv(ENGINE.variable, sys.executable)  # which has no llama-cpp-python
    source = LlamaSource(file)
    with pytest.raises(DeployError, match="ended before it answered"):
        source.run([Case("text", ((2, 5),), ((),))])


@LLAMA_IS_THERE
@pytest.mark.parametrize("generation", SCALAR)
def test_llama_cpp_computes_the_model(made, generation):
    artifact, _ = made("fp32", generation)
    assert main(["parity", str(artifact)]) == 0


@LLAMA_IS_THERE
@pytest.mark.parametrize("generation", SCALAR)
def test_run_says_in_llama_cpp_what_transformers_says(made, generation):
    artifact, checkpoint = made("fp32", generation)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    ids = [2, 9, 40, 77, 8, 300, 5, 61, 33, 12]  # more than a window
    wanted = model.generate(torch.tensor([ids]), max_new_tokens=24, min_new_tokens=24, do_sample=False)[0, len(ids) :]
    engine = open_engine(artifact, threads=1)
    session, stats = engine.session(endless=True), GenerationStats()
    assert list(session.reply(ids, max_new_tokens=10, stats=stats)) is not None
    assert stats.tokens == wanted[:10].tolist()
    sequence = engine.session(endless=True)._decider.sequence(40)  # set back by more than a window
    sequence.read([*ids, *wanted[:15].tolist()])
    sequence.length = 4
    again = sequence.read(ids[4:])[0]
    assert int(again.argmax()) == wanted[0]
    assert 0 < engine.load_seconds < 600
    assert engine.apart_bytes > 1 << 20


@LLAMA_IS_THERE
def test_logits_that_have_no_room_are_made_again(made):
    file = made("w8a16")[0] / "model.gguf"
    cases = [Case("text", ((2, 5, 9), (2, 7), (2, 8, 11, 4)), ((),) * 3)]
    found = []
    for room in (1, 1 << 30):
        with closing(LlamaSource(file, threads=1, room=room)) as source:
            rows = np.concatenate(source.run(cases)[0])
            found += [source.head(rows[::-1]) for _ in range(2)]
            assert len(source._files) == (1 if room == 1 else 3)
    for one in found[1:]:
        np.testing.assert_array_equal(found[0], one)
