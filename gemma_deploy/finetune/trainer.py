"""TRL's SFTTrainer with the loss of head.py, checkpoints that are whole or do not count, and figures of every step."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback
from trl import SFTTrainer

from gemma_deploy.errors import DeployError
from gemma_deploy.finetune import checkpoints
from gemma_deploy.finetune.head import FLAG, add_summed_loss
from gemma_deploy.machine import peak_rss_bytes

SECONDS, PEAK = "step_seconds", "peak_rss_bytes"


class Trainer(SFTTrainer):
    """The trainer; arguments as SFTTrainer's.

    Args:
        progress: is called with (steps done, steps in all).
    """

    def __init__(self, *, progress: Callable[[float, float], None] | None = None, **options: Any) -> None:
        super().__init__(**options)
        add_summed_loss(self.base)
        self.remove_callback(PrinterCallback)  # a line on standard output for every step
        self._began: float | None = None
        if progress is not None:
            self.add_callback(_Progress(progress))

    @property
    def base(self) -> Any:
        """The causal LM itself, without the wrapper of PEFT."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean over the labels of the whole step, as SFTTrainer's.

        Args:
            model: maybe wrapped for several processes; inputs: a batch with labels.
            return_outputs: whether the outputs are wanted too.
            num_items_in_batch: labels that count in all batches and processes of the step; None where it is unknown.
        """
        outputs = model(**inputs, **{FLAG: True})
        count = outputs.tokens if num_items_in_batch is None else num_items_in_batch
        loss = outputs.loss / torch.as_tensor(count, device=outputs.loss.device).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        mode = "train" if self.model.training else "eval"
        tokens = self.accelerator.gather_for_metrics(outputs.tokens).sum()
        correct = self.accelerator.gather_for_metrics(outputs.correct).sum()
        self._metrics[mode]["mean_token_accuracy"].append((correct / tokens.clamp(min=1)).item())
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """See SFTTrainer; remembers when the step began."""
        if self._began is None:
            self._began = time.perf_counter()
        return super().training_step(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """See SFTTrainer; adds the seconds since the last line, evaluation left out, and the peak of the memory.

        Raises:
            DeployError: a loss is no number; nothing is saved from then on.
        """
        if not all(math.isfinite(logs.get(name, 0.0)) for name in ("loss", "eval_loss")):
            raise DeployError(
                f"the loss is no number at step {self.state.global_step}",
                where="finetune",
                next_step="try a lower rate (--learning-rate) or float32 (--set bf16=false), with another OUT",
            )
        if "loss" in logs and self._began is not None:
            logs |= {SECONDS: time.perf_counter() - self._began, PEAK: float(peak_rss_bytes())}
            self._began = None
        super().log(logs, start_time)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: run.json and report.html say what it is."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint and say that it is whole; then delete old ones.

        Raises:
            DeployError: the disk refuses.
        """
        folder = Path(self.args.output_dir)
        checkpoint = folder / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # each process writes the state of its own random numbers
            if self.args.should_save:
                checkpoints.mark_whole(checkpoint)
                checkpoints.delete_old(folder, self.state.best_model_checkpoint)
        except Exception as error:
            reason = _refusal_of_disk(error)
            if reason is None:
                raise
            shutil.rmtree(checkpoint, ignore_errors=True)
            before = checkpoints.whole_checkpoints(folder)
            goes_on = f"goes on after step {before[-1].name.partition('-')[2]}" if before else "begins again"
            raise DeployError(
                f"the checkpoint of step {self.state.global_step} cannot be written: {reason}",
                where=str(folder),
                next_step=f"make room there and run the same command again: it {goes_on}",
            ) from error


class _Progress(TrainerCallback):
    def __init__(self, tick: Callable[[float, float], None]) -> None:
        self.tick = tick

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell how far it is."""
        self.tick(state.global_step, state.max_steps)


def early_stopping(patience: int | None) -> list[TrainerCallback]:
    """Callbacks that end a training whose held-out loss no longer falls."""
    return [] if patience is None else [EarlyStoppingCallback(early_stopping_patience=patience)]


def _refusal_of_disk(error: Exception) -> str | None:
    """What the disk said, from the errors that torch and safetensors make of it; None for another error."""
    said = " ".join(str(error).split())
    if isinstance(error, OSError):
        return error.strerror or said
    words = ("No space left", "File too large", "quota", "file write failed", "unexpected pos", "Read-only file system")
    return said[:200] if any(word.lower() in said.lower() for word in words) else None


@torch.no_grad()
def held_out_loss(model: Any, rows: Sequence[Mapping[str, Any]], collate: Callable[[Any], Any], *, batch: int) -> float:
    """Mean negative log likelihood in nats of the labels that count, over all rows.

    Args:
        model: with `summed_loss`.
        rows: input_ids and labels of each; collate: makes a batch of some.
        batch: rows at a time.
    """
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    try:
        for start in range(0, len(rows), batch):
            inputs = {key: value.to(model.device) if hasattr(value, "to") else value
                      for key, value in collate(rows[start : start + batch]).items()}  # fmt: skip
            outputs = model(**inputs, **{FLAG: True})
            total, count = total + float(outputs.loss), count + int(outputs.tokens)
    finally:
        model.train(was_training)
    return total / max(1, count)
