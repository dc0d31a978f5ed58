"""What every back end answers to `compile`, and the table of them.

A back end is a class here or in a folder beside it, and a row in `BACKENDS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gemma_deploy.checkpoint import ModelConfig
from gemma_deploy.graph.contract import GraphContract
from gemma_deploy.params import ParamTable
from gemma_deploy.partition import Part
from gemma_deploy.quantization.rescaling import Rescaling
from gemma_deploy.recipe import Recipe
from gemma_deploy.schemes import CodeForm

PARAMS = "params.safetensors"


@dataclass(frozen=True)
class Job:
    """What graphs are made from.

    Args:
        parts: of the artifact; table: of all parameter files.
        kept: linears whose inputs are not rounded to 8 bits; None where none are.
    """

    recipe: Recipe
    config: ModelConfig
    contract: GraphContract
    parts: Sequence[Part]
    table: ParamTable
    rescaling: Rescaling | None = None
    kept: Sequence[str] | None = None


class Backend(Protocol):
    """One kind of target."""

    @property
    def graphs(self) -> Sequence[str]:
        """Names of the graphs of a part, without `.onnx`."""

    def codes(self, recipe: Recipe) -> CodeForm:
        """How codes are stored."""

    def contract(self, recipe: Recipe, config: ModelConfig) -> GraphContract:
        """Names, dtypes and shapes of the whole model's inputs and outputs."""

    def export(self, job: Job) -> tuple[dict[str, bytes], int]:
        """.onnx files by their path in the artifact; peak RSS in bytes of a process that made them, 0 without one.

        Raises:
            ExportError, NotBuiltError: see graph/export.py.
        """

    def files(self, recipe: Recipe, config: ModelConfig) -> dict[str, dict[str, Any]]:
        """JSON files beside the graphs, by name."""

    def kernels(self, recipe: Recipe, config: ModelConfig, kept: Sequence[str] | None) -> dict[str, Any] | None:
        """For the manifest: which kernels a graph names, where it names any."""


def backend_of(manifest: Mapping[str, Any]) -> str:
    """The back end an artifact was made for."""
    return str(manifest["recipe"].get("backend", {}).get("type", "tvm_vacc"))
