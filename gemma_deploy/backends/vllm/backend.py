"""`backend.type: vllm` as `compile` sees it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_deploy.artifact.manifest import Manifest
from gemma_deploy.backends.base import Proof, Serving
from gemma_deploy.backends.elsewhere import Elsewhere
from gemma_deploy.backends.spec import BuildSpec, CodeDefaults, Options
from gemma_deploy.backends.vllm.options import VllmOptions, contradictions, model_problems, not_built
from gemma_deploy.schemes import CodeForm, Naming

if TYPE_CHECKING:
    from gemma_deploy.artifact.manifest import LedgerEntry
    from gemma_deploy.artifact.opened import Artifact
    from gemma_deploy.checkpoint import Checkpoint, ModelConfig
    from gemma_deploy.parity.compare import ParityResult
    from gemma_deploy.runtime.engine import Engine

VLLM_BYTES = 3 << 30  # what vLLM's processes take beside the model


class Vllm(Elsewhere):
    """See `Backend` in backends/base.py."""

    engine_name, backend_name = "vLLM", "vllm"
    naming: Naming = "compressed-tensors"
    options: type[Options] = VllmOptions
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

    def proof_bytes(self, spec: BuildSpec, elements: int) -> int:
        """The model in transformers, in float32, and beside it in vLLM, as wide as it is told; both stay open."""
        return (4 + (4 if spec.scheme.weights == "fp32" else 2)) * elements + VLLM_BYTES

    def codes(self, spec: BuildSpec) -> CodeForm:
        """As compressed-tensors has them: with a zero point in the middle, packed; of w8a8 signed."""
        unsigned = spec.scheme.codes and not spec.scheme.rounds_activations
        return CodeForm(unsigned=unsigned, floats="bfloat16", rotary=False, naming=self.naming)

    def front(self, spec: BuildSpec, checkpoint: Checkpoint, name: str) -> bytes:
        """Nothing."""
        return b""

    def cache_dtype(self, spec: BuildSpec) -> str:
        """That of activations."""
        return "float32" if spec.scheme.weights == "fp32" else "bfloat16"

    def config_keys(self, spec: BuildSpec, config: ModelConfig) -> Mapping[str, Any]:
        """The class, the dtype, and how codes are packed."""
        from gemma_deploy.backends.vllm.config import config_keys

        return config_keys(spec, config)

    def require_tools(self, spec: BuildSpec, *, proof: bool) -> None:
        """For a proof: the Python that has vLLM, and transformers."""
        from gemma_deploy.backends.vllm.source import ENGINE

        if proof:
            ENGINE.check()

    def ledger(self, manifest: Manifest) -> list[LedgerEntry]:
        """See `Backend`."""
        from gemma_deploy.backends.vllm.ledger import ledger_of

        return ledger_of(manifest)

    def prove(self, proof: Proof, result: ParityResult) -> None:
        """As transformers reads it, and in vLLM."""
        from gemma_deploy.backends.vllm.proof import prove_checkpoint

        prove_checkpoint(proof, result)

    def engine(self, artifact: Artifact, *, threads: int = 0, strict: bool = False, one_reply: bool = False) -> Engine:
        """In vLLM, in the Python that has it."""
        from gemma_deploy.backends.vllm.engine import VllmEngine

        return VllmEngine(artifact, threads=threads)

    def serve_command(self, artifact: Artifact, how: Serving) -> list[str]:
        """See serving.py."""
        from gemma_deploy.backends.vllm.serving import serve_command

        return serve_command(artifact, how)

    def with_adapter(self, artifact: Path, directory: Path) -> str:
        """VLLM loads PEFT's files."""
        return f"vllm serve {artifact} --enable-lora --lora-modules NAME={directory}"


BACKEND = Vllm()
