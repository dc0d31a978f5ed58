"""What eval.json holds, as far as the report reads it; see bounds.py."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from gemma_deploy.bounds import Count, Part, Point, problems_of


class Against(Part):
    """What a result was compared with."""

    path: str
    adapter: str = ""


class TextSettings(Part):
    """The text and the windows of a perplexity measurement."""

    text: str
    windowing: str
    adapter: str = ""


class ExamSettings(Part):
    """The questions and shots of a C-Eval run."""

    split: str
    shots: Count
    adapter: str = ""


class Subject(Part):
    """One subject of C-Eval."""

    questions: Count
    accuracy: float | None
    accuracy_error: float | None


class Reference(Part):
    """The reference on the same questions."""

    accuracy: float | None


class _Result(Part):
    beside: ClassVar[tuple[str, ...]]  # keys that a result has where there was something to compare with
    target: dict[str, Any]
    against: Against | None

    @model_validator(mode="after")
    def _compared(self) -> Self:
        missing = [key for key in self.beside if key not in self.model_fields_set]
        if self.against is not None and missing:
            raise ValueError(f"{', '.join(missing)} missing beside against")
        return self


class TextResult(_Result):
    """The result of `eval --task ppl`."""

    beside = ("perplexity_reference", "perplexity_reference_error", "kl_mean", "top1")
    task: Literal["ppl"]
    settings: TextSettings
    perplexity: float | None
    perplexity_error: float | None
    perplexity_reference: float | None = None
    perplexity_reference_error: float | None = None
    kl_mean: float | None = None
    top1: float | None = None
    activation_absmax: dict[Point, float] | None = None


class ExamResult(_Result):
    """Of `eval --task ceval`."""

    beside = ("same_choice", "reference")
    task: Literal["ceval"]
    settings: ExamSettings
    questions: Count
    accuracy: float | None
    accuracy_error: float | None
    average_over_subjects: float | None
    average_over_subjects_error: float | None
    subjects: dict[str, Subject]
    same_choice: float | None = None
    reference: Reference | None = None
    activation_absmax: None = None


class Evaluation(Part):
    """The whole eval.json: results, newest last."""

    results: list[Annotated[TextResult | ExamResult, Field(discriminator="task")]]


def evaluation_problems(value: object) -> list[str]:
    """What is wrong with the content of eval.json, a line for each key."""
    return problems_of(Evaluation, value)
