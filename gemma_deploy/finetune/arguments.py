"""Fields of TRL's SFTConfig that a user sets: known, of the right type, and not decided by the program."""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Mapping
from typing import Any

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from gemma_deploy.errors import UsageError
from gemma_deploy.finetune.settings import FinetuneSettings

LORA_RATE = 2e-4  # of LoRA and QLoRA (trl/scripts/sft.py); a full fine-tuning has SFTConfig's own, 2e-5
SAVE_STEPS = 50
# Fields that the program sets itself, and what to use in their place.
OURS: Mapping[str, str] = {
    "output_dir": "out",
    "max_length": "max_length",
    "truncation_mode": "too_long",
    "dataset_text_field": "field",
    "completion_only_loss": "loss",
    "assistant_only_loss": "loss",
    "load_best_model_at_end": "patience",
    "metric_for_best_model": "patience",
    "greater_is_better": "patience",
    "eval_strategy": "eval_data or validation, and sft.eval_steps",
    "save_strategy": "sft.save_steps",
    "model_init_kwargs": "model",
    "trust_remote_code": "model",
    "resume_from_checkpoint": "the same command again",
}
# Fields that nothing is done with here, or that would change what is computed in a way that is not built.
REFUSED = (
    "dataset_kwargs", "dataset_num_proc", "chat_template_path", "eos_token", "pad_token", "padding_free",
    "loss_type", "label_smoothing_factor", "use_liger_kernel", "liger_kernel_config", "push_to_hub", "hub_model_id",
    "hub_token", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision", "save_only_model", "do_train",
    "do_eval", "do_predict", "router_aux_loss_coef", "remove_unused_columns", "label_names", "prediction_loss_only",
    "include_for_metrics", "eval_do_concat_batches", "batch_eval_metrics", "past_index", "ignore_data_skip",
    "restore_callback_states_from_checkpoint", "auto_find_batch_size", "parallelism_config",
)  # fmt: skip


def read_pairs(pairs: typing.Sequence[str]) -> dict[str, Any]:
    """`KEY=VALUE` of the command line, the value in YAML.

    Raises:
        UsageError: one is no such pair.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        if not equals or not key.strip():
            raise UsageError(
                f"--set {pair} is not understood",
                expected="--set KEY=VALUE, such as --set max_steps=200",
                next_step="put = between a field of TRL's SFTConfig and its value",
            )
        found[key.strip()] = value
    return found


def sft_values(settings: FinetuneSettings) -> dict[str, Any]:
    """The checked fields of SFTConfig that the user set.

    Raises:
        UsageError: all that are unknown, of another type, or not to be set here.
    """
    from trl import SFTConfig

    known = {field.name for field in dataclasses.fields(SFTConfig) if field.init}
    types = typing.get_type_hints(SFTConfig)
    problems, values = [], {}
    for name, value in settings.sft.items():
        if name in OURS:
            problems.append(f"{name}: is decided by {OURS[name]}")
        elif name in REFUSED:
            problems.append(f"{name}: is not taken here")
        elif name not in known:
            close = difflib.get_close_matches(name, known, 1)
            problems.append(f"{name}: SFTConfig has no such field" + (f"; did you mean {close[0]}?" if close else ""))
        else:
            try:
                values[name] = _typed(types[name], value)
            except ValidationError as error:
                said = error.errors(include_url=False)[0]["msg"]
                problems.append(f"{name}: {value!r} does not fit: {said[:1].lower()}{said[1:]}")
    problems += _out_of_range(values)
    if problems:
        raise UsageError(
            f"{len(problems)} of the training arguments cannot be used",
            where="finetune.sft (--set)",
            problems=problems,
            expected="fields of TRL's SFTConfig, https://huggingface.co/docs/trl/sft_trainer#trl.SFTConfig",
            next_step="correct them, or leave them out",
        )
    return values


def _typed(kind: Any, value: Any) -> Any:
    if isinstance(value, str) and value.replace(".", "").replace("e-", "").replace("e", "").isdigit():
        value = float(value)  # YAML 1.1 takes 2e-4 for text
    return TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)


def _out_of_range(values: Mapping[str, Any]) -> list[str]:
    """Numbers that SFTConfig takes and that then train nothing, or never end."""
    problems = []
    for name in (
        *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
        *("num_train_epochs", "learning_rate", "save_steps", "eval_steps", "logging_steps", "max_steps"),
    ):
        value = values.get(name)
        if isinstance(value, int | float) and not (math.isfinite(value) and value > 0):
            problems.append(f"{name}: {value} does not fit: it has to be above 0")
    return problems


def sft_config(settings: FinetuneSettings, folder: str, *, held_out: bool) -> Any:
    """The SFTConfig of a run.

    Args:
        settings: of the run.
        folder: where the trainer writes its checkpoints.
        held_out: whether there are examples to evaluate on.

    Raises:
        UsageError: see `sft_values`, or SFTConfig refuses what is set.
    """
    import torch
    from trl import SFTConfig

    chosen = sft_values(settings)
    on_cpu = not torch.cuda.is_available() or bool(chosen.get("use_cpu"))
    values: dict[str, Any] = {
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,  # it shows the mean of earlier losses where one is no number
        "save_steps": SAVE_STEPS,
        "dataloader_pin_memory": not on_cpu,
        **({"bf16": False} if on_cpu and not chosen.get("fp16") else {}),
        **({} if settings.method == "full" else {"learning_rate": LORA_RATE}),
        **chosen,
        "output_dir": folder,
        "max_length": settings.max_length,
        "save_strategy": "steps",
        "eval_strategy": "steps" if held_out else "no",
        "remove_unused_columns": True,
    }
    values["save_total_limit"] = None  # whole checkpoints are counted, see checkpoints.py
    if held_out:
        values.setdefault("eval_steps", values["save_steps"])
    if settings.patience is not None:
        values |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
    try:
        return SFTConfig(**values)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        said = " ".join(str(error).split())
        raise UsageError(
            f"SFTConfig refuses the training arguments: {said[:400]}",
            where="finetune.sft (--set)",
            next_step="correct them, or leave them out",
        ) from error
