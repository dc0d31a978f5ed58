"""What a compiled pair takes and gives, and what it was compiled for."""

from __future__ import annotations

from dataclasses import dataclass

from gemma_deploy.backends.tvm.target import file_of
from gemma_deploy.graph.contract import GraphContract


@dataclass(frozen=True)
class CompiledContract(GraphContract):
    """A static pair's.

    Args:
        triple, cpu: of LLVM.
    """

    triple: str = ""
    cpu: str = ""

    @property
    def beside_graphs(self) -> tuple[str, ...]:
        """The library, or its object files."""
        return (file_of(self.triple),)
