"""What every back end answers to: how its artifacts are made, what their ledger says, how they are proven."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gemma_deploy.artifact.manifest import Manifest
from gemma_deploy.backends.spec import BuildSpec, CodeDefaults, Options
from gemma_deploy.estimates import StageEstimate
from gemma_deploy.graph.contract import GraphContract
from gemma_deploy.params.layout import Place
from gemma_deploy.quantization.budget import Budget
from gemma_deploy.quantization.rescaling import Rescaling
from gemma_deploy.schemes import CodeForm

if TYPE_CHECKING:
    from gemma_deploy.artifact.adapters import KeptAdapter
    from gemma_deploy.artifact.manifest import LedgerEntry
    from gemma_deploy.artifact.opened import Artifact
    from gemma_deploy.checkpoint import Checkpoint, ModelConfig
    from gemma_deploy.parity.cases import Case
    from gemma_deploy.parity.compare import ParityResult, Report
    from gemma_deploy.partition import ArtifactPart
    from gemma_deploy.runtime.encoder import EncoderGraph
    from gemma_deploy.runtime.engine import Engine


@dataclass(frozen=True)
class ExportJob:
    """What graphs are made from.

    Args:
        parts: of the artifact; tensors: of each parameter file, by its path in the artifact.
        unrounded: linears whose inputs are not rounded to 8 bits; None where none are.
    """

    spec: BuildSpec
    config: ModelConfig
    contract: GraphContract
    parts: Sequence[ArtifactPart]
    tensors: Mapping[str, Sequence[Place]]
    rescaling: Rescaling | None = None
    unrounded: Sequence[str] | None = None


class Export(Protocol):
    """Graphs in the making."""

    def result(self) -> tuple[dict[str, bytes], int]:
        """Wait for them.

        Returns:
            .onnx files by their path in the artifact, and the peak RSS in bytes of the process that made them, 0 when
            it was this one.

        Raises:
            ExportError, NotBuiltError: they cannot be made.
        """

    def cancel(self) -> None:
        """Give up; does nothing after `result`."""


@dataclass(frozen=True)
class Exported:
    """Graphs that are there: an `Export`."""

    files: dict[str, bytes]
    peak: int = 0

    def result(self) -> tuple[dict[str, bytes], int]:
        """See `Export`."""
        return self.files, self.peak

    def cancel(self) -> None:
        """See `Export`."""


@dataclass(frozen=True)
class BesideAdapter:
    """A LoRA adapter that an artifact is computed with, beside its weights.

    Args:
        kept: in the artifact, as its runtime loads it; directory: the adapter itself, as peft's save_pretrained wrote.
    """

    kept: KeptAdapter
    directory: Path


@dataclass(frozen=True)
class Proof:
    """What a proof looks at.

    Args:
        artifact: directory, finished or not; manifest: its manifest or what will become it.
        checkpoint: what it was made from, the adapter merged into it where there is one.
        fast: measure what a user runs as well, where no gate is on it.
        report: is told what runs.
        adapter: that the artifact is computed with; None: with none.
    """

    artifact: Path
    checkpoint: Checkpoint
    manifest: Manifest
    cases: tuple[Case, ...]
    fast: bool
    report: Report
    adapter: BesideAdapter | None = None


@dataclass(frozen=True)
class Serving:
    """How an artifact is to be served.

    Args:
        host, port: to listen on; tensor: devices that share a layer; pipeline: groups of them that share layers.
        ray: devices of several machines of a Ray cluster; cpu: processors of this machine, where an engine is told.
    """

    host: str
    port: int
    tensor: int = 1
    pipeline: int = 1
    ray: bool = False
    cpu: bool = False


@dataclass(frozen=True)
class Converter:
    """What makes files of an artifact's tokenizer, for a runtime that does not read those of Hugging Face.

    Args:
        module: run in a process of its own with the artifact's folder; it prints {"peak": its peak RSS in bytes,
            "notes": [sentences that whoever compiles should read]}.
        extra: that it takes; files: that it writes.
    """

    module: str
    extra: str
    files: Sequence[str]


class Backend(Protocol):
    """One kind of target: its options, refusals, graphs, files, ledger, proof, and how its artifacts are opened."""

    @property
    def options(self) -> type[Options]:
        """The keys of `backend.compile` that it reads."""

    @property
    def code_defaults(self) -> CodeDefaults:
        """What it wants of codes where a recipe says nothing."""

    @property
    def unrounded_inputs(self) -> Budget:
        """Of w8a8: what leaving inputs of linears unrounded costs there."""

    @property
    def code(self) -> Sequence[str]:
        """Modules whose code decides what its graphs look like; what they import is found from there."""

    @property
    def proof_code(self) -> Sequence[str]:
        """Modules that prove its artifacts, likewise."""

    @property
    def graphs(self) -> Sequence[str]:
        """Names of the graphs of a part, without `.onnx`."""

    @property
    def runs_on(self) -> str:
        """The runtime that runs its graphs on this machine: in a proof, and for `run` where genai does not."""

    @property
    def shares_tensors(self) -> bool:
        """Whether an initializer may show several tensors of the parameter file, or some rows of one."""

    @property
    def rescales_float16(self) -> bool:
        """Whether fp16 speaks of activations too, which calibration text then brings into its range."""

    @property
    def runs_bf16(self) -> bool:
        """Whether its graphs of bfloat16 weights run on this machine, as they are."""

    @property
    def no_lookup(self) -> str:
        """Why its artifacts are not decoded with lookahead, for a message; "" where they are."""

    @property
    def converter(self) -> Converter | None:
        """What its runtime needs made of the tokenizer; None: it reads the files that there are."""

    def contradictions(self, spec: BuildSpec) -> Iterator[tuple[tuple[str, ...], str]]:
        """Keys of a recipe that make no sense together, as (path of the key, sentence)."""

    def not_built(self, spec: BuildSpec) -> Iterator[str]:
        """What a recipe may ask for and is not done, a sentence that begins with the key."""

    def model_problems(self, spec: BuildSpec, config: ModelConfig) -> list[str]:
        """What does not go with this model, a sentence that begins with the key."""

    def graphs_estimate(self) -> StageEstimate:
        """What making the graphs takes."""

    def proof_bytes(self, spec: BuildSpec, elements: int) -> int:
        """Memory that a proof takes beside that of the torch side, of a model with so many parameters."""

    def codes(self, spec: BuildSpec) -> CodeForm:
        """How codes of the scheme lie in the parameter file: signed or not, transposed or not."""

    def front(self, spec: BuildSpec, checkpoint: Checkpoint, name: str) -> bytes:
        """What stands in the parameter file in front of its tensors, where its form has such a place; else b"".

        Args:
            name: of the artifact.
        """

    def contract(self, spec: BuildSpec, config: ModelConfig) -> GraphContract:
        """Names, dtypes and shapes of the whole model's inputs and outputs."""

    def export(self, job: ExportJob) -> Export:
        """Begin to make the graphs."""

    def files(self, spec: BuildSpec, config: ModelConfig) -> Mapping[str, dict[str, Any] | Path]:
        """Files beside the graphs, by name: what is written as JSON, or a file that is copied."""

    def config_keys(self, spec: BuildSpec, config: ModelConfig) -> Mapping[str, Any]:
        """What config.json says beside what the checkpoint's does, for the runtime that reads it."""

    def kernels(self, spec: BuildSpec, config: ModelConfig, unrounded: Sequence[str] | None) -> dict[str, Any] | None:
        """For the manifest: which kernels a graph names, where it names any."""

    def ledger(self, manifest: Manifest) -> list[LedgerEntry]:
        """Every place where an artifact may differ from the reference."""

    def require_tools(self, spec: BuildSpec, *, proof: bool) -> None:
        """See that other programs it compiles with are there: asked before a compile begins, which may take hours.

        Args:
            proof: those that `prove` runs artifacts in as well.

        Raises:
            UsageError: one is not installed, or does not work.
        """

    def prove(self, proof: Proof, result: ParityResult) -> None:
        """Compare an artifact with its checkpoint and put lines, measures, notes and effect into `result`.

        Raises:
            DeployError: a source could not run.
        """

    def engine(self, artifact: Artifact, *, threads: int = 0, strict: bool = False, one_reply: bool = False) -> Engine:
        """An artifact, open; see `open_engine` of gemma_deploy/engine.py."""

    def serve_command(self, artifact: Artifact, how: Serving) -> list[str]:
        """The words of the command that serves an artifact.

        Raises:
            UsageError: it is not served that way.
        """

    def encoder(self, artifact: Artifact, *, threads: int = 0, strict: bool = False) -> EncoderGraph:
        """The graph of an encoder's artifact, open.

        Args:
            threads: of one operator, 0 for as many as there are cores; strict: compute exactly what the graph says.

        Raises:
            ArtifactError: a file is missing or damaged.
        """

    def keep_adapter(
        self, artifact: Artifact, directory: Path, name: str | None = None, *, force: bool = False
    ) -> KeptAdapter:
        """Convert an adapter that peft wrote into what the runtime loads, and keep it in the artifact.

        Args:
            name: of the kept adapter, None for one made from the directory's; force: replace another of that name.

        Raises:
            UsageError: the artifact takes no adapters, or not this one.
        """

    def rounds(self, manifest: Manifest) -> bool:
        """Whether strict graphs round activations or the cache, so that two of them repeat no number."""
