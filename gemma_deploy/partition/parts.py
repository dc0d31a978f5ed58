"""The parts of an artifact: every stage of layers (`split.points`) times every rank (`tp`), a directory each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gemma_deploy.errors import UsageError
from gemma_deploy.partition.ranks import obstacles
from gemma_deploy.partition.spans import WHOLE, Span, spans_of

if TYPE_CHECKING:
    from gemma_deploy.checkpoint import ModelConfig

FOLDER = r"^((bottom|trunk\d*|top)(/rank\d+)?|rank\d+)$"  # what a manifest may name: nothing outside the artifact


@dataclass(frozen=True)
class ArtifactPart:
    """One rank of one stage.

    Args:
        ranks: of the stage; 1 when it is not divided.
    """

    span: Span
    rank: int = 0
    ranks: int = 1

    @property
    def folder(self) -> str:
        """Directory inside the artifact: "", `rank0`, `bottom`, or `bottom/rank0`."""
        names = [self.span.name] if self.span.name != WHOLE else []
        return "/".join([*names, *([f"rank{self.rank}"] if self.ranks > 1 else [])])

    def file(self, name: str) -> str:
        """Path of one of its files inside the artifact."""
        return f"{self.folder}/{name}" if self.folder else name


def parts_of(layers: int, points: Sequence[int], ranks: int) -> tuple[ArtifactPart, ...]:
    """Stage after stage, rank after rank.

    Raises:
        UsageError: points that do not cut the layers.
    """
    return tuple(ArtifactPart(span, rank, ranks) for span in spans_of(layers, points) for rank in range(ranks))


def division_problems(config: ModelConfig, points: Sequence[int], ranks: int, *, align_qkv: bool) -> list[str]:
    """Why a model cannot be divided as a recipe asks, a sentence for each recipe key; empty when it can."""
    problems = [f"frontend.model_kwargs.tp: {problem}" for problem in obstacles(config, ranks, align_qkv)]
    try:
        spans_of(config.num_hidden_layers, points)
    except UsageError as error:
        problems.append(f"split.points: {error.what}; expected {error.expected}")
    return problems
