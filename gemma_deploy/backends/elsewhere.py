"""What back ends have in common whose artifacts hold no graphs, and run in an engine that is not in this program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_deploy.backends.base import Export, Exported, ExportJob
from gemma_deploy.backends.spec import BuildSpec
from gemma_deploy.errors import UsageError
from gemma_deploy.estimates import BASE_BYTES, StageEstimate
from gemma_deploy.graph.contract import GraphContract, Port, kv_shapes
from gemma_deploy.quantization.budget import INTEGER_PRODUCTS
from gemma_deploy.schemes import Naming

if TYPE_CHECKING:
    from gemma_deploy.artifact.adapters import KeptAdapter
    from gemma_deploy.artifact.manifest import Manifest
    from gemma_deploy.artifact.opened import Artifact
    from gemma_deploy.checkpoint import ModelConfig
    from gemma_deploy.runtime.encoder import EncoderGraph
    from gemma_deploy.runtime.engine import Engine


@dataclass(frozen=True)
class CheckpointContract(GraphContract):
    """No graphs: the engine has the model's code."""

    naming: Naming = "compressed-tensors"

    @property
    def graph_names(self) -> tuple[str, ...]:
        """None."""
        return ()

    def inputs(self, graph: str) -> tuple[Port, ...]:
        """There is no graph."""
        raise KeyError(graph)

    def outputs(self, graph: str) -> tuple[Port, ...]:
        """There is no graph."""
        raise KeyError(graph)


class Elsewhere:
    """Answers of `Backend` (base.py) that are the same for all of them.

    Attributes:
        engine_name: for people; backend_name: `backend.type`; naming: of the parameter file.
    """

    engine_name: str
    backend_name: str
    naming: Naming
    graphs: Sequence[str] = ()
    rescales_float16 = False
    runs_bf16 = True
    shares_tensors = False
    unrounded_inputs = INTEGER_PRODUCTS
    converter = None

    @property
    def runs_on(self) -> str:
        """The engine."""
        return self.backend_name

    @property
    def no_lookup(self) -> str:
        """It decodes by itself."""
        return f"{self.engine_name} decodes it"

    def graphs_estimate(self) -> StageEstimate:
        """None are made."""
        return StageEstimate("graphs", f"none: {self.engine_name} has the model's code", BASE_BYTES, 0, 0.0)

    def cache_dtype(self, spec: BuildSpec) -> str:
        """Of keys and values, unless the engine is told another."""
        raise NotImplementedError

    def contract(self, spec: BuildSpec, config: ModelConfig) -> CheckpointContract:
        """C is what the engine is told as its longest context."""
        kv_heads, head_dim, geometry = kv_shapes(config)
        return CheckpointContract(
            batch=1,
            prefill=spec.prefill,
            context=spec.context,
            layers=config.num_hidden_layers,
            kv_heads=kv_heads,
            head_dim=head_dim,
            geometry=geometry,
            vocab_size=config.vocab_size,
            cache_dtype=self.cache_dtype(spec),
            dynamic=True,
            hidden_size=config.hidden_size,
            naming=self.naming,
        )

    def export(self, job: ExportJob) -> Export:
        """Nothing: the engine has the model's code."""
        return Exported({})

    def files(self, spec: BuildSpec, config: ModelConfig) -> Mapping[str, dict[str, Any] | Path]:
        """None beside the checkpoint's own."""
        return {}

    def kernels(self, spec: BuildSpec, config: ModelConfig, unrounded: Sequence[str] | None) -> dict[str, Any] | None:
        """The engine picks them."""
        return None

    def engine(self, artifact: Artifact, *, threads: int = 0, strict: bool = False, one_reply: bool = False) -> Engine:
        """There is none here.

        Raises:
            UsageError: always.
        """
        raise self._runs_there(artifact)

    def encoder(self, artifact: Artifact, *, threads: int = 0, strict: bool = False) -> EncoderGraph:
        """There is none.

        Raises:
            UsageError: always.
        """
        raise self._runs_there(artifact)

    def rounds(self, manifest: Manifest) -> bool:
        """Never: as it is read strictly nothing is rounded but the weights."""
        return False

    def keep_adapter(
        self, artifact: Artifact, directory: Path, name: str | None = None, *, force: bool = False
    ) -> KeptAdapter:
        """See `Backend`: the engine loads adapters itself.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            f"{self.engine_name} loads adapters itself",
            where=str(artifact.path),
            next_step=self.with_adapter(artifact.path, directory),
        )

    def with_adapter(self, artifact: Path, directory: Path) -> str:
        """How it is told to."""
        raise NotImplementedError

    def _runs_there(self, artifact: Artifact) -> UsageError:
        return UsageError(
            f"an artifact of backend.type {self.backend_name} runs in {self.engine_name}, which is not part of this "
            "program",
            where=str(artifact.path),
            next_step=f"gemma-deploy serve-command {artifact.path} prints the command",
        )
