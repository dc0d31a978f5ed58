"""`backend.type: gguf` as `compile` sees it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_deploy.artifact.manifest import Manifest
from gemma_deploy.backends.base import Proof, Serving
from gemma_deploy.backends.elsewhere import Elsewhere
from gemma_deploy.backends.gguf.options import GgufOptions, contradictions, model_problems, not_built
from gemma_deploy.backends.serving import refuse_devices
from gemma_deploy.backends.spec import BuildSpec, CodeDefaults, Options
from gemma_deploy.dtypes import BLOCK
from gemma_deploy.estimates import RUNTIME_BYTES
from gemma_deploy.names import GGUF
from gemma_deploy.schemes import CodeForm, Naming

if TYPE_CHECKING:
    from gemma_deploy.artifact.manifest import LedgerEntry
    from gemma_deploy.artifact.opened import Artifact
    from gemma_deploy.checkpoint import Checkpoint, ModelConfig
    from gemma_deploy.parity.compare import ParityResult
    from gemma_deploy.runtime.engine import Engine


class LlamaCpp(Elsewhere):
    """See `Backend` in backends/base.py."""

    engine_name, backend_name = "llama.cpp", "gguf"
    naming: Naming = "gguf"
    options: type[Options] = GgufOptions
    code_defaults = CodeDefaults(keep_w8=(), scales="float16", groupsize=BLOCK)
    code: Sequence[str] = ("gemma_deploy.backends.gguf.metadata", "gemma_deploy.params.naming")
    proof_code: Sequence[str] = ("gemma_deploy.backends.gguf.proof",)

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
        """The file in llama.cpp, and a second model in float32 that is read back from it."""
        return 6 * elements + RUNTIME_BYTES

    def codes(self, spec: BuildSpec) -> CodeForm:
        """In blocks of llama.cpp, which makes rotary tables itself."""
        return CodeForm(rotary=False, naming=self.naming)

    def front(self, spec: BuildSpec, checkpoint: Checkpoint, name: str) -> bytes:
        """Metadata: sizes, constants and the tokenizer."""
        from gemma_deploy.backends.gguf.metadata import front

        return front(spec, checkpoint, name)

    def cache_dtype(self, spec: BuildSpec) -> str:
        """Whatever the weights are."""
        return "float16"

    def config_keys(self, spec: BuildSpec, config: ModelConfig) -> Mapping[str, Any]:
        """None: llama.cpp reads no config.json."""
        return {}

    def require_tools(self, spec: BuildSpec, *, proof: bool) -> None:
        """For a proof: the Python that has llama.cpp."""
        from gemma_deploy.backends.gguf.source import ENGINE

        if proof:
            ENGINE.check()

    def ledger(self, manifest: Manifest) -> list[LedgerEntry]:
        """See `Backend`."""
        from gemma_deploy.backends.gguf.ledger import ledger_of

        return ledger_of(manifest)

    def prove(self, proof: Proof, result: ParityResult) -> None:
        """As this program reads the file, and in llama.cpp."""
        from gemma_deploy.backends.gguf.proof import prove_file

        prove_file(proof, result)

    def engine(self, artifact: Artifact, *, threads: int = 0, strict: bool = False, one_reply: bool = False) -> Engine:
        """In llama.cpp, in the Python that has it."""
        from gemma_deploy.backends.gguf.engine import LlamaEngine

        return LlamaEngine(artifact, threads=threads)

    def serve_command(self, artifact: Artifact, how: Serving) -> list[str]:
        """Words of `llama-server`."""
        refuse_devices(artifact, how)
        manifest = artifact.manifest
        words = ["llama-server", "-m", str(artifact.path / GGUF), "--alias", manifest.name, "--jinja"]
        return [*words, "-c", str(manifest.contract.context), "--host", how.host, "--port", str(how.port)]

    def with_adapter(self, artifact: Path, directory: Path) -> str:
        """In a form of its own."""
        return f"convert_lora_to_gguf.py {directory}, then llama-server -m {artifact / GGUF} --lora FILE"


BACKEND = LlamaCpp()
