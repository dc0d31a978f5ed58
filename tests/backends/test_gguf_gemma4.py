"""Files for llama.cpp of Gemma 4: what kinds of layers, tokenizer and rope add, as the converter writes it."""

import json

import gguf
import numpy as np
import pytest

from gemma_deploy.architectures import by_gguf_name
from gemma_deploy.backends.gguf.vocabulary import vocabulary_of
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.cli import main
from gemma_deploy.errors import CheckpointError
from gemma_deploy.testing import TINY_EXPERTS, TINY_PER_LAYER, write_tiny_checkpoint
from gemma_deploy.text.files import TokenizerFiles
from tests.backends.test_gguf import LLAMA_IS_THERE, fields_of, recipe_of, tensors_of
from tests.calibration.make import write_tokenizer

MODELS = {"dense": {}, "per_layer": TINY_PER_LAYER, "experts": TINY_EXPERTS}
KINDS = [True] * 5 + [False] * 2


def compiled(root, scheme, *more, **changes):
    write_tokenizer(write_tiny_checkpoint(root / "ck", "gemma4_text", **changes))
    return main(["compile", str(recipe_of(root, root / "ck", scheme)), *more])


@pytest.mark.parametrize("name", MODELS)
def test_metadata_and_what_only_tensors_say(tmp_path, name):
    assert compiled(tmp_path, "fp32", "--no-parity", **MODELS[name]) == 0
    fields, tensors = fields_of(tmp_path / "fp32"), tensors_of(tmp_path / "fp32")
    said = {key.removeprefix("gemma4."): value for key, value in fields.items() if key.startswith("gemma4.")}
    wanted = {
        "block_count": 7, "attention.key_length": 64, "attention.value_length": 64, "rope.dimension_count": 64,
        "attention.key_length_swa": 32, "attention.value_length_swa": 32, "rope.dimension_count_swa": 32,
        "rope.freq_base": 1e6, "rope.freq_base_swa": 1e4, "final_logit_softcapping": 3.0,
        "attention.sliding_window": 8, "attention.sliding_window_pattern": KINDS, "attention.shared_kv_layers": 0,
        "embedding_length_per_layer_input": 0, "feed_forward_length": 160,
        "attention.head_count_kv": [2 if local else 1 for local in KINDS],
    }  # fmt: skip
    if name == "per_layer":
        wanted |= {
            "attention.sliding_window_pattern": [True, False, True, False, True, True, False],
            "attention.shared_kv_layers": 3, "embedding_length_per_layer_input": 32,
            "feed_forward_length": [160] * 4 + [320] * 3,
        }  # fmt: skip
        wanted["attention.head_count_kv"] = 2  # where values have a matrix of their own, global layers have as many
    if name == "experts":
        wanted |= {"expert_count": 8, "expert_used_count": 3, "expert_feed_forward_length": 96}
    assert {key: said.get(key) for key in wanted} == wanted
    # A quarter of the pairs of global heads turns.
    assert np.asarray(tensors["rope_freqs.weight"].data).tolist() == [1.0] * 8 + [np.float32(1e30)] * 24
    source, read = Checkpoint.open(tmp_path / "ck").config, Checkpoint.open(tmp_path / "fp32" / "model.gguf").config
    assert (read.layers, read.rope, read.layer_types) == (source.layers, source.rope, source.layer_types)
    assert len(tensors) == len(Checkpoint.open(tmp_path / "ck").tensors) + 1
    norm = Checkpoint.open(tmp_path / "ck").rows("model.norm.weight", 0, 64)  # which multiplies as it is
    np.testing.assert_array_equal(np.asarray(tensors["output_norm.weight"].data), norm)
    assert fields["tokenizer.ggml.model"] == "gemma4"
    merges = json.loads((tmp_path / "ck" / "tokenizer.json").read_text())["model"]["merges"]
    assert merges
    assert fields["tokenizer.ggml.merges"] == [one if isinstance(one, str) else " ".join(one) for one in merges]


def test_marks_of_replies_are_text_for_llama_cpp(tmp_path):
    from tokenizers import AddedToken, Tokenizer

    write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(one, special=True) for one in ("<|tool_call>", "<|image>")])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    files, size = TokenizerFiles(tmp_path, CheckpointError), tokenizer.get_vocab_size()
    made = vocabulary_of(files, size, by_gguf_name()["gemma4"][1])
    kinds = {token: kind for token, kind in zip(made.tokens, made.kinds, strict=True) if token.startswith("<|")}
    assert kinds == {"<|tool_call>": gguf.TokenType.USER_DEFINED, "<|image>": gguf.TokenType.CONTROL}
    assert vocabulary_of(files, size, by_gguf_name()["gemma3"][1]).merges == []


@pytest.mark.parametrize(("name", "says"), [("per_layer", "per-layer vectors"), ("experts", "experts")])
def test_codes_of_what_has_more_than_linears_are_refused(tmp_path, capsys, name, says):
    assert compiled(tmp_path, "w8a16", **MODELS[name]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert f"a model with {says} is not built in codes: set backend.dtype: bf16" in told
    assert not (tmp_path / "w8a16").exists()


@LLAMA_IS_THERE
@pytest.mark.parametrize(
    ("name", "scheme"), [("dense", "fp32"), ("per_layer", "fp32"), ("experts", "fp32"), ("dense", "w8a16")]
)
def test_llama_cpp_computes_it(tmp_path, name, scheme):
    assert compiled(tmp_path, scheme, **MODELS[name]) == 0
