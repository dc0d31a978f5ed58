"""What eval.json holds, as far as the report reads it; see artifact/schema.py."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from gemma_deploy.artifact.schema import Count, Part, Point, problems_of


class Against(Part):
    """What a result was compared with."""

    path: str


class Settings(Part):
    """What was measured."""

    text: str = ""
    windowing: str = ""
    split: str = ""
    shots: Count = 0


class Subject(Part):
    """One subject of C-Eval."""

    questions: Count
    accuracy: float | None
    accuracy_error: float | None


class Reference(Part):
    """The reference on the same questions."""

    accuracy: float | None


class _Result(Part):
    target: dict[str, Any]
    settings: Settings
    against: Against | None
    activation_absmax: dict[Point, float] | None = None


class TextResult(_Result):
    """Of `eval --task ppl`."""

    task: Literal["ppl"]
    perplexity: float | None
    perplexity_error: float | None
    perplexity_reference: float | None = None
    perplexity_reference_error: float | None = None
    kl_mean: float | None = None
    top1: float | None = None


class ExamResult(_Result):
    """Of `eval --task ceval`."""

    task: Literal["ceval"]
    questions: Count
    accuracy: float | None
    accuracy_error: float | None
    average_over_subjects: float | None
    average_over_subjects_error: float | None
    same_choice: float | None = None
    reference: Reference | None = None
    subjects: dict[str, Subject]


class Evaluation(Part):
    """eval.json."""

    results: list[Annotated[TextResult | ExamResult, Field(discriminator="task")]]


def evaluation_problems(value: object) -> list[str]:
    """What is wrong with the content of eval.json, a line for each key."""
    return problems_of(Evaluation, value)
