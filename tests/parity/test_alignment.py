"""Config, tokenizer, base model and causal LM of the patched model against transformers' own."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from gemma_deploy import paths
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.errors import CheckpointError
from gemma_deploy.parity import alignment
from gemma_deploy.parity.cases import make_cases
from gemma_deploy.parity.reference import TorchSource
from gemma_deploy.patched import patched_module
from gemma_deploy.proving.requests import Request, patched_stage
from gemma_deploy.testing import write_tiny_checkpoint
from tests.calibration.make import write_tokenizer
from tests.checkpoint.adapters.make import PREFIX, pair, write_adapter

SMALL = Request(prompt_tokens=40, decode_tokens=4)  # five windows of 8


def values(lines):
    return {line.name.partition(" (")[0]: line.value for line in lines}


def test_every_part_is_equal_in_both_dtypes(checkpoint_dir):
    result = patched_stage(str(checkpoint_dir), SMALL)
    assert values(result.lines) == {
        "config keys that differ": 0,
        "base model, float32, relative error": 0,
        "causal LM, float32, relative error": 0,
        "base model, bfloat16, relative error": 0,
        "causal LM, bfloat16, relative error": 0,
    }
    assert result.passed
    assert any("no tokenizer" in note for note in result.notes)


def test_the_bfloat16_reference_is_transformers_own(checkpoint_dir):
    """Streamed, a block of a matrix at a time, and yet the class's own numbers."""
    checkpoint = Checkpoint.open(checkpoint_dir)
    (case,) = make_cases(checkpoint.config, batch=1, length=40, steps=2, text=None)
    source = TorchSource(checkpoint, "hf", dtype=torch.bfloat16)
    features = source.run([case])[0][0]
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint_dir, dtype=torch.bfloat16, attn_implementation="eager"
    ).eval()
    with torch.inference_mode():
        logits = model(torch.tensor([case.sequence(0)]), use_cache=False).logits[0].float().numpy()
    assert (source.head(features) == logits).all()


def test_another_default_of_the_config_is_named(checkpoint_dir, model_type, monkeypatch):
    from gemma_deploy.patched import patched_config

    checkpoint = Checkpoint.open(checkpoint_dir)
    config_class = type(patched_config(checkpoint.config))
    right = config_class.to_dict
    monkeypatch.setattr(config_class, "to_dict", lambda self: right(self) | {"rms_norm_eps": 1.0})
    line = alignment.config_line(checkpoint)
    assert (line.value, line.passed) == (1, False)
    assert "rms_norm_eps" in line.name


def test_other_tokens_are_counted(tmp_path, monkeypatch):
    checkpoint = Checkpoint.open(paths.demo_checkpoint_dir())
    notes = []
    (line,) = alignment.tokenizer_lines(checkpoint, None, notes)
    assert (line.value, line.passed, notes) == (0, True, [])
    right = alignment.stage_checkpoint

    def wrong(path, out, **options):
        staged = right(path, out, **options)
        file = staged / "tokenizer.json"
        content = json.loads(file.read_text())
        content["model"]["merges"] = content["model"]["merges"][:100]
        file.unlink()
        file.write_text(json.dumps(content))
        return staged

    monkeypatch.setattr(alignment, "stage_checkpoint", wrong)
    (line,) = alignment.tokenizer_lines(checkpoint, None, notes)
    assert line.value > 0
    assert not line.passed


def test_the_tokenizer_beside_an_adapter_is_what_is_compared(tmp_path, monkeypatch):
    """Both sides have its tokens, and the base's own are not looked at: that of this base would be refused."""
    base = write_tiny_checkpoint(tmp_path / "base", "gemma2")
    (base / "tokenizer.json").write_text("{}")
    write_adapter(tmp_path / "a", pair(PREFIX + "model.layers.1.self_attn.q_proj", (128, 64)))
    write_tokenizer(tmp_path / "a")
    seen = []
    right = alignment._tokenizer
    monkeypatch.setattr(alignment, "_tokenizer", lambda directory: seen.append(right(directory)) or seen[-1])
    (line,) = alignment.tokenizer_lines(Checkpoint.open(base, tmp_path / "a"), None, [])
    assert (line.value, line.passed) == (0, True)
    staged, stock = seen
    words = json.loads((tmp_path / "a/tokenizer.json").read_text())["model"]["vocab"]
    assert words.items() <= staged.get_vocab().items()
    assert words.items() <= stock.get_vocab().items()
    with pytest.raises(CheckpointError, match="transformers refuses the tokenizer"):
        alignment.tokenizer_lines(Checkpoint.open(base), None, [])


def break_norm(monkeypatch, norm, dtype):
    right = norm.forward
    monkeypatch.setattr(norm, "forward", lambda self, x: right(self, x) * (1.02 if x.dtype == dtype else 1))


@pytest.mark.parametrize("break_in", ["float32", "bfloat16"])
def test_a_wrong_dtype_path_fails_in_its_own_line(checkpoint_dir, monkeypatch, break_in):
    dtype = getattr(torch, break_in)
    for norm in (patched_module("layers_vacc").RMSNorm, patched_module("gain_vacc").GainNorm):
        break_norm(monkeypatch, norm, dtype)
    failed = {line.name for line in patched_stage(str(checkpoint_dir), SMALL).lines if not line.passed}
    assert failed == {f"base model, {break_in}, relative error", f"causal LM, {break_in}, relative error"}
