"""Fine-tuning of Gemma 3n and 4: what is said of held-out text is PEFT's own figure, vectors of tokens too."""

import pytest

from gemma_deploy.finetune.run import finetune
from gemma_deploy.testing import TINY_PER_LAYER
from tests.finetune.make import TEXTS, loss_of, settings, texts_file, tiny, write_lines
from tests.finetune.test_training import SMALL

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gemma4_text", {"num_hidden_layers": 3}),
        ("gemma4_text", {**TINY_PER_LAYER, "vocab_size_per_layer_input": 4096}),
        ("gemma3n_text", {}),
    ],
    ids=["dense", "per-layer-embeddings", "streams"],
)
def test_held_out_loss_is_that_of_peft(kind, changes, tmp_path):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoint = tiny(tmp_path / "ck", kind, **changes)
    held = write_lines(tmp_path / "held.jsonl", [{"text": text} for text in TEXTS[:3]])
    result = finetune(settings(texts_file(tmp_path), tmp_path / "out", lora=SMALL, eval_data=str(held)), checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(result.adapter)
    assert result.outcome.loss_before == pytest.approx(loss_of(model, tokenizer, TEXTS[:3]), rel=1e-6)  # measured: 3e-8
    model = PeftModel.from_pretrained(model, result.adapter).eval()
    assert result.outcome.loss_after == pytest.approx(loss_of(model, tokenizer, TEXTS[:3]), rel=1e-6)  # measured: 5e-8
    assert result.outcome.loss_after < result.outcome.loss_before
