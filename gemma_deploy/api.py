"""What Python programs call beside `Recipe`, `compile_recipe` and `open_engine`: `prove`, `evaluate`, `fine_tune`.

Importing this imports no torch: a proof loads it when it runs, an evaluation where transformers is one of its models.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from gemma_deploy import extras
from gemma_deploy.artifact.check import byte_problems, open_whole, refuse
from gemma_deploy.artifact.manifest import GateRecord
from gemma_deploy.checkpoint import AdapterRef
from gemma_deploy.errors import UsageError
from gemma_deploy.progress import Tick

if TYPE_CHECKING:
    from gemma_deploy.finetune.result import FinetuneResult


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation was of.

    Args:
        target: path of what was evaluated; against: of what it was compared with, None for nothing.
        settings: what was asked for, with all defaults.
        notes: what a reader of the figures must know.
        record: everything, as plain JSON values; what `gemma-deploy eval --json` writes.
    """

    target: str
    against: str | None
    settings: Mapping[str, Any]
    notes: tuple[str, ...]
    record: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True)
class TextEvaluation(Evaluation):
    """Perplexity on a text; beside a reference, how near the two are. None stands for a figure that is not finite.

    Args:
        scored_tokens: tokens that the figures are of; bad_positions: those whose logits are inf or NaN, left out.
        perplexity, perplexity_error: and its standard error.
        perplexity_reference, perplexity_reference_error: of the reference on the same tokens.
        perplexity_change, perplexity_change_error: relative; the error is of the paired difference.
        kl_mean: Kullback-Leibler divergence from the reference, nats a token.
        top1: share of tokens where both have the same largest logit.
    """

    scored_tokens: int
    bad_positions: int
    perplexity: float | None
    perplexity_error: float | None
    perplexity_reference: float | None = None
    perplexity_reference_error: float | None = None
    perplexity_change: float | None = None
    perplexity_change_error: float | None = None
    kl_mean: float | None = None
    top1: float | None = None


@dataclass(frozen=True)
class ExamEvaluation(Evaluation):
    """Accuracy on C-Eval.

    Args:
        questions, right: how many there were, and how many were answered rightly.
        accuracy, accuracy_error: share of all questions, and its standard error.
        average_over_subjects, average_over_subjects_error: the mean of the subjects, as C-Eval states it.
        same_choice: share of questions where the reference chose the same.
        accuracy_change, accuracy_change_error: against the reference, in shares; the error is of paired answers.
    """

    questions: int
    right: int
    accuracy: float
    accuracy_error: float | None
    average_over_subjects: float
    average_over_subjects_error: float | None
    same_choice: float | None = None
    accuracy_change: float | None = None
    accuracy_change_error: float | None = None


def prove(
    artifact: str | Path,
    *,
    against: str | Path | None = None,
    checkpoint: str | Path | None = None,
    adapters: Sequence[AdapterRef] = (),
    text: str | Path | None = None,
    prompt_tokens: int | None = None,
    decode_tokens: int | None = None,
    fast: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> GateRecord:
    """Compare an artifact with the checkpoint it was made from, in transformers; or with another artifact.

    Args:
        artifact: its directory.
        against: another artifact; None for the checkpoint.
        checkpoint: where the checkpoint is now; None for where the recipe says.
        adapters: one that is computed beside the weights of an artifact that takes adapters, and compared with PEFT; of
            any other, where those are now that were merged into it; () for where the recipe says.
        text: UTF-8 file to take the prompt from; prompt_tokens, decode_tokens: how many of it are read as a prompt and
            fed one by one. None for what the recipe says.
        fast: measure the optimized session of a static artifact as well.
        report: is told what runs.

    Returns:
        Every gate with its value and limit; `passed` is False where one fails.

    Raises:
        UsageError: the checkpoint is not there, or is another one. ArtifactError: the artifact is damaged, also where
            every gate passes on weights that are not those that were written.
    """
    extras.require("build", what="a proof")
    from gemma_deploy.proving import requests

    request = requests.Request(_path(text), prompt_tokens, decode_tokens, fast, report, tuple(adapters))
    where = None if checkpoint is None else str(checkpoint)
    opened = [open_whole(one) for one in (artifact, against) if one is not None]
    if against is None:
        result = requests.artifact_stage(Path(artifact), where, request)
    else:
        result = requests.two_artifacts(Path(artifact), Path(against), where, request=request)
    if result.passed:
        for one in opened:
            refuse(one, byte_problems(one))
    return GateRecord.model_validate_json(json.dumps(result.to_json()))


@overload
def evaluate(
    target: str | Path,
    *,
    task: Literal["ppl"] = ...,
    against: str | Path | None = ...,
    checkpoint: str | Path | None = ...,
    adapters: Sequence[AdapterRef] = ...,
    kernels: str | None = ...,
    text: str | Path | None = ...,
    windows: int | None = ...,
    seqlen: int | None = ...,
    record: bool = ...,
    progress: Tick | None = ...,
) -> TextEvaluation: ...


@overload
def evaluate(
    target: str | Path,
    *,
    task: Literal["ceval"],
    against: str | Path | None = ...,
    checkpoint: str | Path | None = ...,
    adapters: Sequence[AdapterRef] = ...,
    kernels: str | None = ...,
    path: str | Path | None = ...,
    split: Literal["val", "test"] | None = ...,
    shots: int | None = ...,
    subjects: Sequence[str] | None = ...,
    limit: int | None = ...,
    record: bool = ...,
    progress: Tick | None = ...,
) -> ExamEvaluation: ...


def evaluate(
    target: str | Path,
    *,
    task: Literal["ppl", "ceval"] = "ppl",
    against: str | Path | None = None,
    checkpoint: str | Path | None = None,
    adapters: Sequence[AdapterRef] = (),
    kernels: str | None = None,
    text: str | Path | None = None,
    windows: int | None = None,
    seqlen: int | None = None,
    path: str | Path | None = None,
    split: Literal["val", "test"] | None = None,
    shots: int | None = None,
    subjects: Sequence[str] | None = None,
    limit: int | None = None,
    record: bool = False,
    progress: Tick | None = None,
) -> TextEvaluation | ExamEvaluation:
    """How good a model is: perplexity on a text, or accuracy on C-Eval; alone, or beside a reference.

    Args:
        target: an artifact, a checkpoint's directory, a .gguf file or "demo".
        task: "ppl" or "ceval".
        against: "hf" for an artifact's checkpoint in transformers, "none", or another artifact or checkpoint; None for
            "hf" where the perplexity of an artifact is asked for, and "none" otherwise.
        checkpoint: where an artifact's checkpoint is now; None for where its recipe says.
        adapters: added to a checkpoint that is the target; one that is computed beside the weights of an artifact that
            takes adapters; of any other artifact, where those are now that were merged into it.
        kernels: of an artifact for ONNX Runtime: "shipped" (the default) or "strict".
        text: of "ppl": UTF-8 file, None for the bundled sample; windows: at most so many (16); seqlen: tokens of each
            (512, or the longest prompt).
        path: of "ceval": ceval-exam.zip, None for the bundled sample; split: "val"; shots: solved examples before each
            question (5); subjects: names, None for all; limit: the first questions of each subject.
        record: keep the result in the artifact and its report.
        progress: is called with what is done and what there is.

    Raises:
        UsageError: an option of the other task, a result that cannot be kept, or two models that do not go together.
        ArtifactError, CheckpointError, CalibrationError: one of the inputs is not there, or damaged.
    """
    from gemma_deploy.evaluation import record as records
    from gemma_deploy.evaluation import tasks
    from gemma_deploy.evaluation.models import is_artifact

    _refuse_others(
        task,
        ppl={"text": text, "windows": windows, "seqlen": seqlen},
        ceval={"path": path, "split": split, "shots": shots, "subjects": subjects, "limit": limit},
    )
    if record:
        if not is_artifact(Path(target)):
            raise UsageError(
                "a result is kept in an artifact, and this is none", where=str(target), next_step="leave record out"
            )
        records.refuse_read_only(Path(target))
        records.finish_interrupted(Path(target))
    pair = tasks.open_pair(
        str(target),
        None if against is None else str(against),
        None if checkpoint is None else str(checkpoint),
        task=task,
        kernels=kernels,
        adapters=adapters,
    )
    if task == "ppl":
        result = tasks.run_text(pair, tasks.TextRequest(_path(text), windows, seqlen), progress)
    else:
        request = tasks.ExamRequest(
            _path(path), split or "val", 5 if shots is None else shots, tuple(subjects or ()), limit
        )
        result = tasks.run_exam(pair, request, progress)
    if record:
        records.record(Path(target), {key: value for key, value in result.items() if key != "answers"})
    return _typed(TextEvaluation, result) if task == "ppl" else _typed(ExamEvaluation, result)


def fine_tune(
    checkpoint: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    dry_run: bool = False,
    progress: Tick | None = None,
    **settings: Any,
) -> FinetuneResult:
    """Train a LoRA adapter, or a whole model, on a file of examples.

    Args:
        checkpoint: the base: a directory, a .gguf file, or "demo".
        data: JSONL or a JSON list, see docs/finetune.md.
        out: where adapter/ (or model/), report.html and run.json go. What a killed call with the same arguments left
            there is gone on with.
        dry_run: check everything, estimate memory and disk, and stop; nothing is written.
        progress: is called with steps done and all.
        settings: other keys of a recipe's section `finetune`, as plain values: `method="lora"`, `max_length=512`,
            `lora={"r": 8}`, `sft={"max_steps": 200}` (fields of TRL's SFTConfig).

    Raises:
        UsageError: settings or data that make no sense, or `out` is finished. CheckpointError: the base is damaged.
        PreflightError: too little memory or disk. DeployError: the training failed.
    """
    from gemma_deploy.finetune.run import finetune
    from gemma_deploy.finetune.settings import settings_of

    asked = settings_of(
        {**settings, "data": str(data), "out": str(out)},
        where="fine_tune",
        next_step="see the keys of `finetune` in docs/recipes.md",
    )
    return finetune(asked, checkpoint, dry_run=dry_run, progress=progress)


AnyEvaluation = TypeVar("AnyEvaluation", bound=Evaluation)


def _typed(kind: type[AnyEvaluation], result: Mapping[str, Any]) -> AnyEvaluation:
    """A result by its fields."""
    against = result["against"]
    values = {
        **result,
        "target": result["target"]["path"],
        "against": None if against is None else against["path"],
        "notes": tuple(result["notes"]),
        "record": result,
    }
    return kind(**{one.name: values[one.name] for one in dataclasses.fields(kind) if one.name in values})


def _refuse_others(task: str, **options: Mapping[str, Any]) -> None:
    """An option of the other task would be ignored."""
    if task not in options:
        raise UsageError(
            f"there is no task {task!r}", expected=" or ".join(map(repr, options)), next_step="name one of them"
        )
    wrong = [
        name for other, given in options.items() if other != task for name, value in given.items() if value is not None
    ]
    if wrong:
        raise UsageError(f"task {task!r} does not take {', '.join(wrong)}", next_step="leave them out")


def _path(file: str | Path | None) -> Path | None:
    return None if file is None else Path(file)
