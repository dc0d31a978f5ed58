"""One training, in one process or in each of several: model, trainer, figures before and after, what it leaves.

Data path: settings + checkpoint + examples -> `train` -> folder/adapter (or folder/model) and an `Outcome`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_deploy.errors import DeployError
from gemma_deploy.finetune.arguments import sft_config
from gemma_deploy.finetune.checkpoints import newest_whole
from gemma_deploy.finetune.encoding import Encoded, Examples
from gemma_deploy.finetune.model import load_model, targets_of
from gemma_deploy.finetune.preparing import Prepared
from gemma_deploy.machine import give_memory_back, peak_rss_bytes
from gemma_deploy.reading import FileKind, read_object
from gemma_deploy.text import Tokenizer
from gemma_deploy.writing import write_json

CHECKPOINTS, ADAPTER, MODEL, BEFORE = "checkpoints", "adapter", "model", "before.json"
SAMPLE_TOKENS = 64
_BEFORE = FileKind(DeployError, "figures from before the training", "delete it, and run the same command again")


@dataclass(frozen=True)
class Sample:
    """A held-out example, answered.

    Args:
        prompt: the end of it; wanted: the answer in the data; before, after: the model's, greedy.
    """

    prompt: str
    wanted: str
    before: str
    after: str = ""


@dataclass(frozen=True)
class Outcome:
    """What came of it.

    Args:
        log: of the trainer: a record for each step and each evaluation.
        steps: that were made in all runs together; stopped_early: before their number was reached.
        loss_before, loss_after: held-out, nats a token; None without held-out examples.
        loss_merged: of a run on an artifact's codes: after adding the adapter to float weights and quantizing these.
        samples: answered before and after.
        trainable, parameters: numbers of weights.
        seconds: wall time of this run; peak_rss_bytes: its highest memory; resumed: the step it went on from, or 0.
    """

    log: list[dict[str, Any]]
    steps: int
    stopped_early: bool
    loss_before: float | None
    loss_after: float | None
    loss_merged: float | None
    samples: tuple[Sample, ...]
    trainable: int
    parameters: int
    seconds: float
    peak_rss_bytes: int
    resumed: int


def train(prepared: Prepared, folder: Path, progress: Callable[[float, float], None] | None = None) -> Outcome | None:
    """Train, from the newest whole checkpoint in `folder` on, and write what is wanted there.

    Args:
        prepared: see there.
        folder: where checkpoints and the result go.
        progress: is called with steps done and all.

    Returns:
        The outcome; None in every process but the first of several.

    Raises:
        UsageError: training arguments do not go together.
        DeployError: the disk refuses a checkpoint, or the loss is no number.
    """
    from gemma_deploy.finetune.trainer import held_out_loss

    began = time.perf_counter()
    resume = newest_whole(folder / CHECKPOINTS)
    trainer = make_trainer(prepared, folder, progress)
    rows = [] if prepared.held_out is None else [_row(one) for one in prepared.held_out.rows]
    batch = trainer.args.per_device_eval_batch_size
    collate = trainer.data_collator

    def measure() -> tuple[float | None, list[str]]:
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:  # no process has all of the weights
            return None, []
        with _undisturbed(), trainer.accelerator.autocast():  # the trainer leaves the model in it, but only afterwards
            loss = held_out_loss(trainer.model, rows, collate, batch=batch) if rows else None
            return loss, [_answer(trainer.model, one, prepared.tokenizer) for one in _samples(prepared)]

    first = trainer.is_world_process_zero()
    before = _once(folder / BEFORE, measure) if first else (None, [])
    trainer.accelerator.wait_for_everyone()
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    _save(trainer, prepared, folder)
    if not first:
        return None
    loss_after, after = measure()
    samples = [
        Sample(prepared.tokenizer.decode_all(one.ids[1 : one.prompt]), one.answer, old, new)
        for one, old, new in zip(_samples(prepared), before[1], after, strict=True)
    ]
    state = trainer.state
    return Outcome(
        log=list(state.log_history),
        steps=state.global_step,
        stopped_early=state.global_step < state.max_steps,
        loss_before=before[0],
        loss_after=loss_after,
        loss_merged=_merged_again(prepared, trainer, measure),
        samples=tuple(samples),
        trainable=sum(one.numel() for one in trainer.model.parameters() if one.requires_grad),
        parameters=sum(one.numel() for one in trainer.base.parameters()),
        seconds=time.perf_counter() - began,
        peak_rss_bytes=peak_rss_bytes(),
        resumed=0 if resume is None else int(resume.name.partition("-")[2]),
    )


def _merged_again(
    prepared: Prepared, trainer: Any, measure: Callable[[], tuple[float | None, list[str]]]
) -> float | None:
    """The held-out loss of the other way to an int8 model: merge first, then quantize; overwrites the model's codes."""
    if prepared.base is None or prepared.held_out is None:
        return None
    from gemma_deploy.finetune.codes import merge_and_quantize

    merge_and_quantize(trainer.model, prepared.base, prepared.checkpoint)
    with trainer.model.disable_adapter():
        return measure()[0]


def make_trainer(prepared: Prepared, folder: Path, progress: Callable[[float, float], None] | None = None) -> Any:
    """The trainer with its model; TRL's seeds come before the adapter is drawn, as in a run without this program."""
    from datasets import Dataset, Features, Sequence, Value, disable_progress_bars
    from peft import LoraConfig
    from transformers import PreTrainedTokenizerFast

    from gemma_deploy.finetune.trainer import Trainer, early_stopping

    disable_progress_bars()
    # The one that made the ids, not a second one: with a vocabulary of 262,144 each takes hundreds of MiB.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=prepared.tokenizer.backend, **dict(prepared.tokenizer.special_tokens)
    )
    settings = prepared.settings
    arguments = sft_config(settings, str(folder / CHECKPOINTS), held_out=prepared.held_out is not None)
    numbers = Sequence(Value("int32"))

    def table(examples: Examples | None) -> Any:
        if examples is None:
            return None
        columns = {
            "input_ids": [list(row.ids) for row in examples.rows],
            "labels": [list(row.labels) for row in examples.rows],
        }
        return Dataset.from_dict(columns, features=Features({"input_ids": numbers, "labels": numbers}))

    model = load_model(settings, prepared.checkpoint, folder, base=prepared.base)
    give_memory_back()
    adapter = None
    if settings.method != "full":
        adapter = LoraConfig(
            r=settings.lora.r,
            lora_alpha=settings.lora.alpha,
            lora_dropout=settings.lora.dropout,
            target_modules=targets_of(settings, prepared.checkpoint),
            use_rslora=settings.lora.rslora,
            use_dora=settings.lora.dora,
            task_type="CAUSAL_LM",
        )
    return Trainer(
        progress=progress,
        model=model,
        args=arguments,
        train_dataset=table(prepared.train),
        eval_dataset=table(prepared.held_out),
        processing_class=tokenizer,
        peft_config=adapter,
        callbacks=early_stopping(settings.patience),
    )


def _row(one: Encoded) -> dict[str, list[int]]:
    return {"input_ids": list(one.ids), "labels": list(one.labels)}


def _samples(prepared: Prepared) -> Sequence[Encoded]:
    """Held-out examples that are answered, those whose prompt was not cut off."""
    rows = () if prepared.held_out is None else prepared.held_out.rows
    return [one for one in rows if one.prompt < len(one.ids)][: prepared.settings.samples]


def _answer(model: Any, one: Encoded, tokenizer: Tokenizer) -> str:
    """Greedy, at most `SAMPLE_TOKENS`, the prompt left out."""
    import torch

    was_training, cache = model.training, model.config.use_cache
    model.eval()
    ids = torch.tensor([list(one.ids[: one.prompt])], device=model.device)
    try:
        with torch.no_grad():
            found = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=SAMPLE_TOKENS, do_sample=False,
                use_cache=True,
            )  # fmt: skip
    finally:
        model.train(was_training)
        model.config.use_cache = cache
    return tokenizer.decode(found[0, ids.shape[1] :].tolist())


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Measuring draws no random number that the training would have drawn."""
    import torch

    with torch.random.fork_rng():
        yield


def _once(file: Path, measure: Callable[[], tuple[float | None, list[str]]]) -> tuple[float | None, list[str]]:
    """What was measured before the training, which a run that goes on cannot measure again."""
    if file.is_file():
        kept = read_object(file, _BEFORE)
        return kept["loss"], kept["answers"]
    loss, answers = measure()
    write_json(file, {"loss": loss, "answers": answers})
    return loss, answers


def _save(trainer: Any, prepared: Prepared, folder: Path) -> None:
    """The adapter, or the whole model, with the tokenizer beside it."""
    from gemma_deploy.text.saving import write_tokenizer

    place = folder / (MODEL if prepared.settings.method == "full" else ADAPTER)
    trainer.save_model(str(place))
    if trainer.is_world_process_zero():
        for name in ("training_args.bin", "README.md", "tokenizer.json", "tokenizer_config.json"):
            (place / name).unlink(missing_ok=True)
        write_tokenizer(prepared.checkpoint, place, link=False)
