"""LoRA on 4-bit weights of bitsandbytes, on a CPU: TRL's own losses, and which optimizers step there."""

from importlib.metadata import version

import numpy as np
import pytest

pytest.importorskip("trl")
pytest.importorskip("bitsandbytes")

from gemma_deploy.errors import UsageError
from gemma_deploy.finetune.run import finetune
from tests.finetune.make import TEXTS, losses, settings, texts_file, tiny, trl_run

SMALL = {"r": 4, "alpha": 8}
# What docs/finetune.md names. States below 4,096 numbers stay float32 in bitsandbytes: r 64 has larger ones.
OPTIMIZERS = ["adamw_torch", "adamw_8bit", "paged_adamw_8bit", "lion_8bit", "paged_lion_8bit", "adafactor"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Columns of every matrix are a multiple of 64, as 4-bit blocks want."""
    return tiny(tmp_path_factory.mktemp("base") / "gemma2", "gemma2", intermediate_size=192)


@pytest.mark.slow
def test_losses_are_those_of_trl(base, tmp_path):
    expected = losses(trl_run(base, [{"text": text} for text in TEXTS], tmp_path / "t", quantized=True, **SMALL)
                      .state.log_history)  # fmt: skip
    result = finetune(settings(texts_file(tmp_path), tmp_path / "out", lora=SMALL, method="qlora"), base)
    found = losses(result.outcome.log)
    assert np.abs(np.subtract(found, expected)).max() <= 1e-4  # adapters are bfloat16 here; measured: 2.4e-5
    plain = finetune(settings(texts_file(tmp_path), tmp_path / "float", lora=SMALL), base)
    assert np.abs(np.subtract(losses(plain.outcome.log), found)).max() > 1e-3
    assert found[-1] < found[0]


@pytest.mark.slow
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_optimizers_that_step_on_a_cpu(base, tmp_path, optim):
    asked = settings(
        texts_file(tmp_path), tmp_path / "out", method="qlora", lora={"r": 64, "alpha": 64},
        sft={"optim": optim, "max_steps": 8, "per_device_train_batch_size": 8, "learning_rate": 3e-3},
    )  # fmt: skip
    found = losses(finetune(asked, base).outcome.log)
    assert found[-1] < found[0] - 0.02


def test_what_bitsandbytes_cannot_do_is_a_sentence(base, tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise NotImplementedError("no kernel for this machine")

    import transformers

    monkeypatch.setattr(transformers.Gemma2ForCausalLM, "from_pretrained", fails)
    asked = settings(texts_file(tmp_path), tmp_path / "out", method="qlora", lora=SMALL)
    with pytest.raises(UsageError) as raised:
        finetune(asked, base)
    said = f"bitsandbytes {version('bitsandbytes')} cannot quantize this model here: no kernel for this machine"
    assert said in str(raised.value)
    assert "use `--method lora`" in str(raised.value)
