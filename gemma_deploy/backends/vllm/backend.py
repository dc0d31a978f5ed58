"""`backend.type: vllm` as `compile` sees it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_deploy.artifact.manifest import Manifest
from gemma_deploy.backends.base import Export, Exported, ExportJob, Proof, Serving
from gemma_deploy.backends.spec import BuildSpec, CodeDefaults, Options
from gemma_deploy.backends.vllm.options import VllmOptions, contradictions, model_problems, not_built
from gemma_deploy.errors import UsageError
from gemma_deploy.estimates import BASE_BYTES, StageEstimate
from gemma_deploy.graph.contract import GraphContract, Port, kv_shapes
from gemma_deploy.quantization.budget import INTEGER_PRODUCTS
from gemma_deploy.schemes import CodeForm, Naming

if TYPE_CHECKING:
    from gemma_deploy.artifact.adapters import KeptAdapter
    from gemma_deploy.artifact.manifest import LedgerEntry
    from gemma_deploy.artifact.opened import Artifact
    from gemma_deploy.checkpoint import ModelConfig
    from gemma_deploy.parity.compare import ParityResult
    from gemma_deploy.runtime.encoder import EncoderGraph
    from gemma_deploy.runtime.engine import Engine

VLLM_BYTES = 3 << 30  # what vLLM's processes take beside the model


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


class Vllm:
    """See `Backend` in backends/base.py."""

    graphs: Sequence[str] = ()
    runs_on = "vllm"
    rescales_float16 = False
    runs_bf16 = True
    shares_tensors = False
    no_lookup = "vLLM decodes it"
    options: type[Options] = VllmOptions
    unrounded_inputs = INTEGER_PRODUCTS
    code_defaults = CodeDefaults(table="fp16", keep_w8=(), scales="bfloat16")
    code: Sequence[str] = ("gemma_deploy.backends.vllm.config", "gemma_deploy.params.naming")
    proof_code: Sequence[str] = ("gemma_deploy.backends.vllm.proof",)

    def contradictions(self, spec: BuildSpec) -> Iterator[tuple[tuple[str, ...], str]]:
        """See options.py."""
        return contradictions(spec)

    def not_built(self, spec: BuildSpec) -> Iterator[str]:
        """See options.py."""
        return not_built(spec)

    def model_problems(self, spec: BuildSpec, config: ModelConfig) -> list[str]:
        """See options.py."""
        return model_problems(spec, config)

    def graphs_estimate(self) -> StageEstimate:
        """None are made."""
        return StageEstimate("graphs", "none: vLLM has the model's code", BASE_BYTES, 0, 0.0)

    def proof_bytes(self, spec: BuildSpec, elements: int) -> int:
        """The model in vLLM, activations in the width that it is told; or in transformers, in float32."""
        return 4 * elements + VLLM_BYTES

    def codes(self, spec: BuildSpec) -> CodeForm:
        """As compressed-tensors has them: with a zero point in the middle, packed; of w8a8 signed."""
        unsigned = spec.scheme.codes and not spec.scheme.rounds_activations
        return CodeForm(unsigned=unsigned, floats="bfloat16", rotary=False, naming="compressed-tensors")

    def contract(self, spec: BuildSpec, config: ModelConfig) -> CheckpointContract:
        """C is what `vllm serve` is told as its longest context."""
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
            cache_dtype="float32" if spec.scheme.weights == "fp32" else "bfloat16",
            dynamic=True,
            hidden_size=config.hidden_size,
        )

    def export(self, job: ExportJob) -> Export:
        """Nothing: the engine has the model's code."""
        return Exported({})

    def files(self, spec: BuildSpec, config: ModelConfig) -> Mapping[str, dict[str, Any] | Path]:
        """None beside the checkpoint's own."""
        return {}

    def config_keys(self, spec: BuildSpec, config: ModelConfig) -> Mapping[str, Any]:
        """The class, the dtype, and how codes are packed."""
        from gemma_deploy.backends.vllm.config import config_keys

        return config_keys(spec, config)

    def kernels(self, spec: BuildSpec, config: ModelConfig, unrounded: Sequence[str] | None) -> dict[str, Any] | None:
        """VLLM picks them."""
        return None

    def ledger(self, manifest: Manifest) -> list[LedgerEntry]:
        """See `Backend`."""
        from gemma_deploy.backends.vllm.ledger import ledger_of

        return ledger_of(manifest)

    def prove(self, proof: Proof, result: ParityResult) -> None:
        """As transformers reads it, and in vLLM."""
        from gemma_deploy.backends.vllm.proof import prove_checkpoint

        prove_checkpoint(proof, result)

    def engine(self, artifact: Artifact, *, threads: int = 0, strict: bool = False, one_reply: bool = False) -> Engine:
        """There is none here.

        Raises:
            UsageError: always.
        """
        raise _is_for_vllm(artifact)

    def serve_command(self, artifact: Artifact, how: Serving) -> list[str]:
        """Words of `vllm serve`."""
        manifest = artifact.manifest
        words = ["vllm", "serve", str(artifact.path), "--served-model-name", manifest.name]
        words += ["--max-model-len", str(manifest.contract.context), "--host", how.host, "--port", str(how.port)]
        if how.tensor > 1:
            words += ["--tensor-parallel-size", str(how.tensor)]
        if how.pipeline > 1:
            words += ["--pipeline-parallel-size", str(how.pipeline)]
        return [*words, "--distributed-executor-backend", "ray"] if how.ray else words

    def encoder(self, artifact: Artifact, *, threads: int = 0, strict: bool = False) -> EncoderGraph:
        """There is none.

        Raises:
            UsageError: always.
        """
        raise _is_for_vllm(artifact)

    def keep_adapter(
        self, artifact: Artifact, directory: Path, name: str | None = None, *, force: bool = False
    ) -> KeptAdapter:
        """See `Backend`: vLLM loads PEFT's files itself.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "vLLM loads adapters of PEFT itself",
            where=str(artifact.path),
            next_step=f"vllm serve {artifact.path} --enable-lora --lora-modules NAME={directory}",
        )

    def rounds(self, manifest: Manifest) -> bool:
        """Never: as transformers reads it nothing is rounded but the weights."""
        return False


def _is_for_vllm(artifact: Artifact) -> UsageError:
    return UsageError(
        "an artifact of backend.type vllm runs in vLLM, which is not part of this program",
        where=str(artifact.path),
        next_step=f"gemma-deploy serve-command {artifact.path} prints the command",
    )


BACKEND = Vllm()
