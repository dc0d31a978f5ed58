"""Accuracy on C-Eval: the choice is the largest of four logits at the end of the prompt."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemma_deploy.calibration.sources import SOURCES, ceval
from gemma_deploy.calibration.sources.reading import Row
from gemma_deploy.errors import CalibrationError, DeployError, UsageError
from gemma_deploy.evaluation.models import Evaluated, Tokens, in_chunks, positions_at_once
from gemma_deploy.evaluation.prompts import CHOICES, choice_tokens, prompt
from gemma_deploy.machine import give_memory_back
from gemma_deploy.progress import Tick

SHOWN = 5  # offenders named in a message
DEV, SPLITS = "dev", ("val", "test")


@dataclass(frozen=True)
class Asked:
    """One question as a model is asked it.

    Args:
        ids: the prompt, BOS first; shots: examples in it.
        choices: tokens of A, B, C and D.
    """

    subject: str
    number: str
    answer: str
    ids: Tokens
    shots: int
    choices: tuple[int, ...]


@dataclass(frozen=True)
class Answered:
    """A question and what the models chose.

    Args:
        logits: [models, 4], of A, B, C and D.
    """

    asked: Asked
    logits: np.ndarray

    def choice(self, model: int) -> str:
        """A, B, C or D; the first of equals."""
        return CHOICES[int(self.logits[model].argmax())]

    def right(self, model: int) -> bool:
        """Whether that is the answer."""
        return self.choice(model) == self.asked.answer

    def to_json(self, model: int) -> dict[str, Any]:
        """The question, and what a model chose."""
        return {
            "subject": self.asked.subject,
            "id": self.asked.number,
            "answer": self.asked.answer,
            "choice": self.choice(model),
            "logits": [float(value) for value in self.logits[model]],
            "shots": self.asked.shots,
            "prompt_tokens": len(self.asked.ids),
        }


def read(
    path: Path | None, split: str, shots: int, *, subjects: Sequence[str], limit: int | None
) -> dict[str, tuple[list[Row], list[Row]]]:
    """Examples and questions by subject.

    Args:
        path: the archive, None for the bundled sample.
        subjects: names in the archive, none for all; limit: the first questions of each.

    Raises:
        CalibrationError: the archive is damaged, or lacks the split, answers or examples; UsageError: no such subject.
    """
    path = SOURCES["ceval"].sample if path is None else path
    found = ceval.questions(path, split)
    if not found:
        raise CalibrationError(
            f"has no {split} questions",
            where=str(path),
            expected=ceval.EXPECTED,
            next_step="name the archive of C-Eval with --path, or another --split",
        )
    unknown = [name for name in subjects if name not in found]
    if unknown:
        near = {name: difflib.get_close_matches(name, found, 1) for name in unknown}
        raise UsageError(
            "no such subject in the archive",
            where=str(path),
            problems=[f"{name}{f', did you mean {near[name][0]}?' if near[name] else ''}" for name in unknown],
            expected="of " + ", ".join(found),
            next_step="correct --subjects",
        )
    examples = ceval.questions(path, DEV) if shots else {}
    chosen = {name: (examples.get(name, [])[:shots], found[name][:limit]) for name in (sorted(set(subjects)) or found)}
    _refuse_unusable(path, chosen, split, shots)
    return chosen


def _refuse_unusable(path: Path, chosen: Mapping[str, tuple[list[Row], list[Row]]], split: str, shots: int) -> None:
    problems = []
    for name, (examples, questions) in chosen.items():
        if len(examples) < shots:
            problems.append(f"{name}_{DEV}: {len(examples)} examples, {shots} wanted")
        for part, rows in ((DEV, examples), (split, questions)):
            wrong = [row["id"] for row in rows if row.get("answer") not in tuple(CHOICES)]
            if wrong:
                problems.append(
                    f"{name}_{part}: {len(wrong)} answers that are not A, B, C or D, the first of id {wrong[0]}"
                )
        if not questions:
            problems.append(f"{name}_{split}: no question in it")
    if problems:
        raise CalibrationError(
            "cannot be evaluated on" if len(problems) <= SHOWN else f"cannot be evaluated on: {len(problems)} problems",
            where=str(path),
            problems=problems[:SHOWN],
            expected="an answer to every question, and as many solved examples in dev as --shots says",
            next_step="use --split val, fewer --shots, or other --subjects",
        )


def ask(
    chosen: Mapping[str, tuple[list[Row], list[Row]]],
    encode: Callable[[str], list[int]],
    bos: int,
    *,
    longest: int,
    where: str,
) -> list[Asked]:
    """Make prompts; where one is too long, examples are left out from the front.

    Args:
        encode: text -> ids without BOS; longest: tokens of a prompt at most.

    Raises:
        UsageError: questions that do not fit without any example.
    """
    asked, too_long = [], []
    for subject, (examples, questions) in chosen.items():
        tokens = tuple(choice_tokens(prompt(subject, (), questions[0]), encode, where))
        for row in questions:
            for first in range(len(examples) + 1):
                ids = (bos, *encode(prompt(subject, examples[first:], row)))
                if len(ids) <= longest:
                    shots = len(examples) - first
                    asked.append(Asked(subject, row["id"], row["answer"], ids, shots, tokens))
                    break
            else:
                too_long.append(f"{subject}, id {row['id']}: {len(ids)} tokens")
    if too_long:
        total = len(asked) + len(too_long)
        rest = f" (the first {SHOWN})" if len(too_long) > SHOWN else ""
        raise UsageError(
            f"{len(too_long)} of {total} questions are too long even without an example{rest}",
            where=where,
            problems=too_long[:SHOWN],
            expected=f"prompts of at most {longest} tokens, the prefill length of what is evaluated",
            next_step="compile with a longer first length in frontend.shape.input_ids, or choose --subjects",
        )
    return asked


def answer(models: Sequence[Evaluated], asked: Sequence[Asked], progress: Tick | None = None) -> list[Answered]:
    """Put every question to every model; prompts of like length run together.

    Raises:
        DeployError: logits of a choice are not finite.
    """
    order = sorted(range(len(asked)), key=lambda i: -len(asked[i].ids))  # the first of a chunk is the longest
    prompts = [asked[i].ids for i in order]
    block = positions_at_once(models[0].vocab_size)
    logits = np.full((len(asked), len(models), len(CHOICES)), np.nan, np.float32)
    for first, found in in_chunks(models, prompts):
        for m, (model, rows) in enumerate(zip(models, found, strict=True)):
            for start in range(0, len(rows), block):
                ends = np.stack([row[-1] for row in rows[start : start + block]])
                for n, whole in enumerate(model.source.head(ends, prompt_end=True)):
                    i = order[first + start + n]
                    logits[i, m] = whole[list(asked[i].choices)]
                give_memory_back()
        if progress is not None:
            progress(first + len(found[0]), len(asked))
    refuse_no_numbers(asked, logits, [str(model.path) for model in models])
    return [Answered(one, logits[i]) for i, one in enumerate(asked)]


def refuse_no_numbers(asked: Sequence[Asked], logits: np.ndarray, names: Sequence[str]) -> None:
    """Refuse choices that nobody can make.

    Args:
        logits: [questions, models, 4]; names: of the models.

    Raises:
        DeployError: some are inf or NaN.
    """
    bad = [
        f"{names[m]}: {asked[i].subject}, id {asked[i].number}"
        for i, m in np.argwhere(~np.isfinite(logits).all(axis=2))
    ]
    if bad:
        raise DeployError(
            f"{len(bad)} questions have logits that are inf or NaN: no choice can be read from them",
            problems=bad[:SHOWN],
            next_step="`gemma-deploy parity ARTIFACT` finds the first layer that is wrong",
        )


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers.

    Args:
        error: standard error, std / sqrt(questions) with n - 1; None of a single question.
    """

    questions: int
    right: int
    value: float
    error: float | None

    @classmethod
    def of(cls, right: Sequence[bool]) -> Accuracy:
        """Of questions answered rightly or not."""
        count, good = len(right), sum(right)
        share = good / count
        return cls(count, good, share, math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else None)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"questions": self.questions, "right": self.right, "accuracy": self.value, "accuracy_error": self.error}


def summary(answered: Sequence[Answered], model: int) -> dict[str, Any]:
    """Accuracy by subject, over questions, and as C-Eval states it: the mean of the subjects."""
    subjects: dict[str, list[bool]] = {}
    for one in answered:
        subjects.setdefault(one.asked.subject, []).append(one.right(model))
    by_subject = {name: Accuracy.of(right) for name, right in subjects.items()}
    errors = [one.error for one in by_subject.values()]
    squares = [error**2 for error in errors if error is not None]
    mean_error = math.sqrt(sum(squares)) / len(errors) if len(squares) == len(errors) else None
    return {
        **Accuracy.of([one.right(model) for one in answered]).to_json(),
        "average_over_subjects": sum(one.value for one in by_subject.values()) / len(by_subject),
        "average_over_subjects_error": mean_error,
        "subjects": {name: one.to_json() for name, one in by_subject.items()},
    }


def agreement(answered: Sequence[Answered]) -> dict[str, Any]:
    """The second model against the first on the same questions: choices shared, accuracy won, with paired error."""
    gain = np.array([one.right(1) - one.right(0) for one in answered], np.float64)
    return {
        "same_choice": sum(one.choice(0) == one.choice(1) for one in answered) / len(answered),
        "accuracy_change": float(gain.mean()),
        "accuracy_change_error": float(gain.std(ddof=1) / math.sqrt(len(gain))) if len(gain) > 1 else None,
    }
