"""`backend.type: tvm_vacc`: the traced pair iter0 and iter1, static or dynamic, whole or in parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict

from gemma_deploy.artifact.manifest import Manifest
from gemma_deploy.backends.base import Export, ExportJob, Proof, Serving
from gemma_deploy.backends.serving import own_server
from gemma_deploy.backends.spec import BuildSpec, CodeDefaults, Options
from gemma_deploy.checkpoint import Checkpoint, ModelConfig
from gemma_deploy.estimates import (
    EXPORT_BYTES,
    EXPORT_SECONDS,
    GRAPH_BYTES,
    IMPORT_SECONDS,
    WRITER_BYTES,
    StageEstimate,
)
from gemma_deploy.graph.contract import ENCODER, GRAPHS, EncoderContract, GraphContract
from gemma_deploy.names import PARAMS
from gemma_deploy.quantization.budget import FLOAT_PRODUCTS
from gemma_deploy.schemes import CodeForm

if TYPE_CHECKING:
    from gemma_deploy.artifact.adapters import KeptAdapter
    from gemma_deploy.artifact.manifest import LedgerEntry
    from gemma_deploy.artifact.opened import Artifact
    from gemma_deploy.parity.compare import ParityResult
    from gemma_deploy.runtime.encoder import EncoderGraph
    from gemma_deploy.runtime.engine import Engine


class VaccOptions(Options):
    """`backend.compile` of a recipe: the vendor's compiler reads it, and alone knows what it may hold."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, protected_namespaces=())


class StaticPair:
    """See `Backend` in backends/base.py."""

    graphs: Sequence[str] = GRAPHS
    runs_on = "onnxruntime"
    rescales_float16 = True
    runs_bf16 = True  # float32 products on weights that are stored so
    shares_tensors = False
    no_lookup = "this artifact is static: its decode graph takes one token"
    converter = None
    options: type[Options] = VaccOptions
    code_defaults = CodeDefaults()
    unrounded_inputs = FLOAT_PRODUCTS
    code: Sequence[str] = ("gemma_deploy.graph.worker",)
    proof_code: Sequence[str] = ("gemma_deploy.backends.tvm_vacc.proof",)

    def contradictions(self, spec: BuildSpec) -> Iterator[tuple[tuple[str, ...], str]]:
        """No keys but those that the recipe refuses for every back end."""
        return iter(())

    def not_built(self, spec: BuildSpec) -> Iterator[str]:
        """What the vendor's graphs have no place for."""
        if spec.adapter_rank is not None:
            yield (
                "adapters: static graphs take no adapter at run time; remove the section and merge the adapter into "
                "the weights (frontend.adapter: DIR), or set backend.type: onnxruntime"
            )

    def graphs_estimate(self) -> StageEstimate:
        """Traced in a process of its own."""
        seconds = IMPORT_SECONDS + EXPORT_SECONDS
        memory = WRITER_BYTES + EXPORT_BYTES  # this process waits beside it
        return StageEstimate("graphs", "iter0 and iter1, no weights", memory, GRAPH_BYTES, seconds)

    def proof_bytes(self, spec: BuildSpec, elements: int) -> int:
        """None: a matrix at a time."""
        return 0

    def model_problems(self, spec: BuildSpec, config: ModelConfig) -> list[str]:
        """What is not built of models whose layers read other layers, or vectors of tokens."""
        if config.drafting is not None:
            return ["backend.type: tvm_vacc is not built for drafters, which read another model's caches: write "
                    "onnxruntime"]  # fmt: skip
        if not config.reads_beside:
            return []
        problems = [] if config.altup is None else self._not_for_streams(spec)
        if spec.per_layer_table == "int4":
            problems.append("frontend.quantize.per_layer_table: int4 is not built on tvm_vacc: write int8")
        sources = [layer.cache_from for layer in config.layers if layer.cache_from is not None]
        first = min(sources, default=config.num_hidden_layers)
        problems += [
            f"split.points: {point} is behind layer {first}, whose keys and values later layers read, and codes of "
            f"{spec.scheme} do not pass between stages: cut at {first} or before, or keep the cache in floats"
            for point in spec.split_points
            if point > first and spec.scheme.int8_cache
        ]
        return problems

    def _not_for_streams(self, spec: BuildSpec) -> list[str]:
        """What is not built of models whose layers carry several streams along."""
        which, problems = "a model of several streams (Gemma 3n)", []
        floats_with_codes = spec.scheme.int8_cache and not spec.scheme.codes
        if spec.scheme.rounds_activations or floats_with_codes:
            other = "w8a16+kv8" if floats_with_codes else "w8a16_gptq or w4a16_gptq"
            problems.append(f"frontend.quantize.type: {spec.scheme} is not built for {which}: write {other}")
        if spec.scheme.weights == "fp16" and (spec.ranks > 1 or spec.split_points):
            problems.append(f"backend.dtype: fp16 is not built for {which} in parts: write fp32, bf16 or int8")
        return problems

    def codes(self, spec: BuildSpec) -> CodeForm:
        """Signed codes, [out, in]."""
        return CodeForm()

    def front(self, spec: BuildSpec, checkpoint: Checkpoint, name: str) -> bytes:
        """Nothing."""
        return b""

    def contract(self, spec: BuildSpec, config: ModelConfig) -> GraphContract:
        """Of `ranks` ranks joined, with all their KV heads; of an encoder, P or, where it is dynamic, C tokens."""
        if config.architecture.encoder:
            length = spec.context if spec.dynamic else spec.prefill
            return EncoderContract.of_encoder(config, batch=spec.batch, length=length, dynamic=spec.dynamic)
        return GraphContract.of(
            config,
            spec.scheme.form,
            batch=spec.batch,
            prefill=spec.prefill,
            context=spec.context,
            dynamic=spec.dynamic,
            ranks=spec.ranks,
            int8_cache=spec.scheme.int8_cache,
        )

    def export(self, job: ExportJob) -> Export:
        """Trace without weights, stamp, point into the parameter file; in a process of its own."""
        from gemma_deploy.graph import worker

        spec, config = job.spec, job.config
        rows = [(part, job.tensors[part.file(PARAMS)]) for part in job.parts]
        task = worker.Task(
            config,
            spec.scheme.form,
            job.contract,
            spec.embed_scale,
            rows,
            PARAMS,
            job.rescaling,
            spec.storage(config.hidden_size, config.per_layer),
            None if job.unrounded is None else tuple(job.unrounded),
        )
        return worker.export_apart(task)

    def config_keys(self, spec: BuildSpec, config: ModelConfig) -> Mapping[str, Any]:
        """The checkpoint's own say all."""
        return {}

    def files(self, spec: BuildSpec, config: ModelConfig) -> dict[str, dict[str, Any]]:
        """No files beside graphs and parameters."""
        return {}

    def kernels(self, spec: BuildSpec, config: ModelConfig, unrounded: Sequence[str] | None) -> dict[str, Any] | None:
        """The vendor's compiler picks them."""
        return None

    def require_tools(self, spec: BuildSpec, *, proof: bool) -> None:
        """None that this program does not bring along."""

    def ledger(self, manifest: Manifest) -> list[LedgerEntry]:
        """See `Backend`."""
        from gemma_deploy.backends.tvm_vacc.ledger import ledger_of

        return ledger_of(manifest)

    def prove(self, proof: Proof, result: ParityResult) -> None:
        """Layer by layer, each cut around its linears."""
        from gemma_deploy.backends.tvm_vacc.proof import prove_pair

        prove_pair(proof, result)

    def engine(self, artifact: Artifact, *, threads: int = 0, strict: bool = False, one_reply: bool = False) -> Engine:
        """The two graphs in ONNX Runtime."""
        from gemma_deploy.backends.tvm_vacc.engine import StaticEngine

        return StaticEngine(artifact, threads=threads, strict=strict, one_reply=one_reply)

    def serve_command(self, artifact: Artifact, how: Serving) -> list[str]:
        """This program's own server."""
        return own_server(artifact, how)

    def encoder(self, artifact: Artifact, *, threads: int = 0, strict: bool = False) -> EncoderGraph:
        """The one graph of an encoder, in ONNX Runtime."""
        from gemma_deploy.backends.tvm_vacc.sessions import open_session
        from gemma_deploy.runtime.encoder import EncoderGraph

        file = artifact.path.resolve() / f"{ENCODER}.onnx"
        session = open_session(file, "strict" if strict else "fast", threads)
        return EncoderGraph(session, artifact.manifest.contract, where=file)

    def keep_adapter(
        self, artifact: Artifact, directory: Path, name: str | None = None, *, force: bool = False
    ) -> KeptAdapter:
        """See `Backend`: there is no place for one.

        Raises:
            UsageError: always.
        """
        from gemma_deploy.artifact.adapters import slots_of

        slots_of(artifact)
        raise AssertionError(artifact.path)  # pragma: no cover: slots_of has raised

    def rounds(self, manifest: Manifest) -> bool:
        """With rounded activations (w8a8) or an int8 cache."""
        from gemma_deploy.backends.tvm_vacc.rounding import rounds

        return rounds(manifest)


BACKEND = StaticPair()
