"""LoRA on a checkpoint, here and by TRL's own run of transformers' class: losses of every step, time, peak memory.

    python benchmarks/finetune.py /models/gemma-3-270m wikitext2_valid.txt --steps 200

Both train on the same windows, `--batch` of `--length` tokens a step, in float32, with the same seeds, each in a
process of its own, one after the other. TRL's run is SFTTrainer with its defaults on the class that from_pretrained
gives (eager attention), nothing of this project in it. On a busy machine compare the seconds of processor time.

Limits: losses equal within 1e-3 at every step, time at most 1.0 x, peak RSS at most 0.7 x.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

CHARACTERS = 8  # for each token that is wanted: no text of a language has fewer tokens
LORA = {"r": 16, "alpha": 32}
GIB = 1 << 30


def windows(file: Path, count: int, length: int) -> list[str]:
    """Pieces of a text that have more tokens than `length`."""
    text, size = file.read_text(encoding="utf-8"), CHARACTERS * length
    return [text[at : at + size] for at in range(0, min(len(text) - size, count * size), size)][:count]


def arguments(steps: int, batch: int) -> dict[str, Any]:
    """What both runs are told."""
    return {"max_steps": steps, "per_device_train_batch_size": batch, "learning_rate": 2e-4, "use_cpu": True}


def trl_run(checkpoint: str, data: Path, length: int, sft: dict[str, Any]) -> dict[str, Any]:
    """TRL's own run."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.processor: list[float] = []
            self.began = 0.0

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.seconds.append(time.perf_counter() - self.began)
            self.processor.append(time.process_time())

    clock = Clock()
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager"),
            args=SFTConfig(
                output_dir=folder, bf16=False, report_to="none", logging_steps=1, disable_tqdm=True,
                save_strategy="no", max_length=length, **sft,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(checkpoint),
            peft_config=LoraConfig(
                r=LORA["r"], lora_alpha=LORA["alpha"], task_type="CAUSAL_LM",
                target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            ),
            callbacks=[clock],
        )  # fmt: skip
        trainer.train()
    return {
        "losses": [one["loss"] for one in trainer.state.log_history if "loss" in one],
        "seconds": clock.seconds,
        "processor": clock.processor,
    }


def own_run(checkpoint: str, data: Path, length: int, sft: dict[str, Any]) -> dict[str, Any]:
    """The command's."""
    from gemma_deploy.finetune.run import finetune
    from gemma_deploy.finetune.settings import FinetuneSettings

    processor: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        asked = FinetuneSettings.model_validate(
            {"data": str(data), "out": f"{folder}/out", "max_length": length, "validation": 0, "lora": LORA,
             "sft": sft | {"save_steps": 10**6}}
        )  # fmt: skip
        result = finetune(asked, checkpoint, progress=lambda done, every: processor.append(time.process_time()))
    assert result.outcome is not None
    steps = [one for one in result.outcome.log if "loss" in one]
    return {
        "losses": [one["loss"] for one in steps],
        "seconds": [one["step_seconds"] for one in steps],
        "processor": processor,
        "estimated": result.memory.total,
    }


def measured(which: str, words: list[str]) -> dict[str, Any]:
    """One of the two in a process of its own."""
    command = [sys.executable, __file__, *words, "--only", which]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@click.command()
@click.argument("checkpoint")
@click.argument("text", type=click.Path(exists=True, path_type=Path))
@click.option("--steps", type=click.IntRange(2), default=40, show_default=True)
@click.option("--batch", default=4, show_default=True)
@click.option("--length", default=256, show_default=True)
@click.option("--only", type=click.Choice(["trl", "own"]), help="Print the figures of one as JSON.")
def main(checkpoint: str, text: Path, steps: int, batch: int, length: int, only: str | None) -> None:
    """Train on pieces of TEXT, once with TRL alone and once here."""
    if only is None:
        words = [checkpoint, str(text), "--steps", str(steps), "--batch", str(batch), "--length", str(length)]
        _show(measured("trl", words), measured("own", words), steps)
        return
    from gemma_deploy.machine import peak_rss_bytes

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.jsonl"
        pieces = windows(text, steps * batch, length)
        data.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces), encoding="utf-8")
        run = trl_run if only == "trl" else own_run
        found = run(checkpoint, data, length, arguments(steps, batch))
    click.echo(json.dumps(found | {"peak": peak_rss_bytes()}))


def _apart(moments: list[float]) -> float:
    """Mean seconds from one step's end to the next one's."""
    return (moments[-1] - moments[0]) / max(1, len(moments) - 1)


def _show(theirs: dict[str, Any], own: dict[str, Any], steps: int) -> None:
    for name, found in (("TRL", theirs), ("here", own)):
        click.echo(
            f"{name:>5}: {sum(found['seconds']) / steps:.2f} s a step ({_apart(found['processor']):.2f} s of a "
            f"processor), peak RSS {found['peak'] / GIB:.2f} GiB, "
            f"loss {found['losses'][0]:.4f} to {found['losses'][-1]:.4f}"
        )
    apart = max(abs(one - other) for one, other in zip(theirs["losses"], own["losses"], strict=True))
    times, peaks = sum(own["seconds"]) / sum(theirs["seconds"]), own["peak"] / theirs["peak"]
    processor = _apart(own["processor"]) / _apart(theirs["processor"])
    click.echo(
        f"losses apart by {apart:.1e} at most, over {steps} steps; time {times:.2f} x (processor {processor:.2f} x), "
        f"peak RSS {peaks:.2f} x; estimated {own['estimated'] / GIB:.2f} GiB"
    )


if __name__ == "__main__":
    main()
