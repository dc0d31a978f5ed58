"""What tests of fine-tuning train on: tiny checkpoints with the demo's tokenizer, small files, and TRL itself."""

import json
import shutil
from pathlib import Path

from gemma_deploy import paths
from gemma_deploy.finetune.settings import FinetuneSettings
from gemma_deploy.testing import write_tiny_checkpoint

# More tokens than the tiny models' window of 8.
TEXTS = [
    "def add(one, other):\n    return one + other",
    "The list is sorted before it is returned to the caller.",
    "Raises an error where the file is not there, or may not be read.",
    "class Reader:\n    def __init__(self, path):\n        self.path = path",
    "for line in lines:\n    print(line.strip())",
    "A dictionary holds keys and values; a set holds keys alone.",
    "if value is None:\n    raise ValueError('no value was given')",
    "The message says which argument is wrong and what was expected.",
]
CHATS = [
    [{"role": "user", "content": "What is a list?"}, {"role": "assistant", "content": "A row of values, one by one."}],
    [
        {"role": "user", "content": "Is it sorted?"},
        {"role": "assistant", "content": "Not unless you sort it."},
        {"role": "user", "content": "How do I do that?"},
        {"role": "assistant", "content": "Call sorted and keep the result."},
    ],
    [{"role": "user", "content": "Return a value."}, {"role": "assistant", "content": "return value"}],
    [{"role": "user", "content": "Name a set."}, {"role": "assistant", "content": "The keys of a dictionary."}],
]
QUICK = {
    "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "save_steps": 2, "use_cpu": True,
}  # fmt: skip


def tiny(root: Path, model_type: str, **changes) -> Path:
    """A random checkpoint whose vocabulary is the demo's."""
    write_tiny_checkpoint(root, model_type, vocab_size=4096, **changes)
    demo = paths.demo_checkpoint_dir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(demo / name, root)
    return root


def write_lines(file: Path, rows) -> Path:
    """JSONL."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def texts_file(folder: Path, field: str = "text") -> Path:
    return write_lines(folder / "texts.jsonl", [{field: text} for text in TEXTS])


def settings(data: Path, out: Path, *, sft=None, **keys) -> FinetuneSettings:
    """Settings of a short run; nothing is held out unless `keys` say so."""
    held = {} if "eval_data" in keys or "validation" in keys else {"validation": 0}
    return FinetuneSettings.model_validate(
        {"data": str(data), "out": str(out), "sft": QUICK | (sft or {}), **held, **keys}
    )


def losses(log) -> list[float]:
    """Of every step."""
    return [one["loss"] for one in log if "loss" in one]


def trl_run(checkpoint: Path, rows, folder: Path, *, r=4, alpha=8, targets=None, quantized=False, **arguments):
    """TRL's own run of the stock class with eager attention: its trainer, nothing of this project in it."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    how = {}
    if quantized:
        how["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager", **how)
    if quantized:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(folder), logging_steps=1, report_to="none", disable_tqdm=True,
            **{**QUICK, "save_strategy": "no", "bf16": False, **arguments},
        ),
        train_dataset=Dataset.from_list(list(rows)),
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
        peft_config=LoraConfig(
            r=r, lora_alpha=alpha, task_type="CAUSAL_LM",
            target_modules=targets or ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        ),
    )  # fmt: skip
    trainer.train()
    return trainer


def adapter_of(folder: Path):
    """Tensors of an adapter's file."""
    from safetensors.numpy import load_file

    return load_file(folder / "adapter_model.safetensors")


def loss_of(model, tokenizer, texts) -> float:
    """transformers' own loss of texts that end, a token: of all of them together."""
    import torch

    nll, count = 0.0, 0
    for text in texts:
        ids = tokenizer(text + "<eos>", return_tensors="pt").input_ids
        with torch.no_grad():
            nll += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return nll / count
