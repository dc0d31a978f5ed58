"""`backend.type: native` as `compile` sees it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_deploy.artifact.manifest import Manifest
from gemma_deploy.backends.base import Export, Exported, ExportJob, Proof, Serving
from gemma_deploy.backends.native.graph import GRAPH, MODEL, build_graph
from gemma_deploy.backends.native.options import NativeOptions, candidates_of, contradictions, model_problems, not_built
from gemma_deploy.backends.serving import own_server
from gemma_deploy.backends.spec import BuildSpec, CodeDefaults, Options, embedding_scale
from gemma_deploy.errors import UsageError
from gemma_deploy.estimates import BASE_BYTES, GRAPH_BYTES, RUNTIME_BYTES, StageEstimate
from gemma_deploy.graph.contract import BATCH, SEQUENCE, AdapterSlots, GraphContract, Port, kv_shapes
from gemma_deploy.names import PARAMS
from gemma_deploy.quantization.budget import INTEGER_PRODUCTS
from gemma_deploy.schemes import CodeForm

if TYPE_CHECKING:
    from gemma_deploy.artifact.adapters import KeptAdapter
    from gemma_deploy.artifact.manifest import LedgerEntry
    from gemma_deploy.artifact.opened import Artifact
    from gemma_deploy.checkpoint import Checkpoint, ModelConfig
    from gemma_deploy.parity.compare import ParityResult
    from gemma_deploy.runtime.encoder import EncoderGraph
    from gemma_deploy.runtime.engine import Engine

TOTAL, SLOTS = "total_sequence", "cache_slots"


@dataclass(frozen=True)
class NativeContract(GraphContract):
    """One operator: new tokens and the cache -> logits of the last token, and the cache, which is written in place.

    Args:
        panels: how matrices lie in the parameter file (params/panels.py).
        adapters: what texts may be computed with of a LoRA adapter; None: nothing.
        candidates: of a screened head, rows of the table that are read whole for a token; None: all are.
    """

    panels: bool = True
    adapters: AdapterSlots | None = None
    candidates: int | None = None

    @property
    def graph_names(self) -> tuple[str, ...]:
        """The name of the one graph, without `.onnx`."""
        return (MODEL,)

    def inputs(self, graph: str) -> tuple[Port, ...]:
        """Token ids, the attention mask, whose length counts, and the cache."""
        ids = Port("input_ids", "int64", (BATCH, SEQUENCE))
        return (ids, Port("attention_mask", "int64", (BATCH, TOTAL)), *self._cache("past_key_values", SLOTS))

    def outputs(self, graph: str) -> tuple[Port, ...]:
        """Logits, and the cache."""
        return (Port("logits", "float32", (BATCH, 1, self.vocab_size)), *self._cache("present", SLOTS))


class Native:
    """See `Backend` in backends/base.py."""

    graphs: Sequence[str] = (MODEL,)
    runs_on = "native"
    rescales_float16 = False
    runs_bf16 = True
    shares_tensors = True
    no_lookup = ""
    converter = None
    options: type[Options] = NativeOptions
    unrounded_inputs = INTEGER_PRODUCTS
    code_defaults = CodeDefaults(table_in_groups=True)
    code: Sequence[str] = ("gemma_deploy.backends.native.graph", "gemma_deploy.backends.native.plan")
    proof_code: Sequence[str] = ("gemma_deploy.backends.native.proof",)

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
        """Next to nothing: a text."""
        return StageEstimate("graphs", "model.onnx, no weights", BASE_BYTES, GRAPH_BYTES, 1.0)

    def proof_bytes(self, spec: BuildSpec, elements: int) -> int:
        """Weights are mapped; what is computed is small."""
        return RUNTIME_BYTES

    def codes(self, spec: BuildSpec) -> CodeForm:
        """Unsigned, in panels; those of a head that is screened in two planes."""
        return CodeForm(unsigned=True, panels=True, planes=candidates_of(spec) is not None)

    def front(self, spec: BuildSpec, checkpoint: Checkpoint, name: str) -> bytes:
        """Nothing."""
        return b""

    def contract(self, spec: BuildSpec, config: ModelConfig) -> NativeContract:
        """Lengths are free; P is the longest prompt that is compared, C the positions there are."""
        from gemma_deploy.backends.native.adapters import slots_for

        kv_heads, head_dim, geometry = kv_shapes(config)
        dtype = "bfloat16" if spec.scheme.weights == "bf16" else "float32"  # of adapters
        return NativeContract(
            batch=1,
            prefill=spec.prefill,
            context=spec.context,
            layers=config.num_hidden_layers,
            kv_heads=kv_heads,
            head_dim=head_dim,
            geometry=geometry,
            vocab_size=config.vocab_size,
            cache_dtype="bfloat16",
            adapters=slots_for(config, spec.adapter_rank, dtype) if spec.adapter_rank else None,
            dynamic=True,
            hidden_size=config.hidden_size,
            candidates=candidates_of(spec),
        )

    def export(self, job: ExportJob) -> Export:
        """The plan, in a graph of one operator."""
        from gemma_deploy.backends.native.plan import plan_of
        from gemma_deploy.graph.external import serialized

        config, rounding = job.config, job.spec.embed_scale
        sizes = config.hidden_size, config.per_layer.size if config.per_layer is not None else 1
        scale, vector_scale = (embedding_scale(size, rounding) for size in sizes)
        places = job.tensors[PARAMS]
        plan = plan_of(
            config,
            places,
            context=job.spec.context,
            embed_scale=scale,
            vector_scale=vector_scale,
            unrounded=job.unrounded,
            candidates=candidates_of(job.spec),
        )
        size = max(place.offset + place.nbytes for place in places)
        return Exported({GRAPH: serialized(build_graph(job.contract, plan, size))})

    def config_keys(self, spec: BuildSpec, config: ModelConfig) -> Mapping[str, Any]:
        """The checkpoint's own say all."""
        return {}

    def files(self, spec: BuildSpec, config: ModelConfig) -> Mapping[str, dict[str, Any] | Path]:
        """What onnxruntime-genai reads, and the library, which it takes from the model's folder alone."""
        from gemma_deploy.backends.genai_config import CONFIG_FILE, genai_config
        from gemma_deploy.backends.native.library import LIBRARY, library_path

        made = genai_config(config, spec.context)
        options = made["model"]["decoder"]["session_options"]
        options |= {"intra_op_num_threads": 1, "custom_ops_library": LIBRARY}  # it has threads of its own
        return {CONFIG_FILE: made, LIBRARY: library_path()}

    def kernels(self, spec: BuildSpec, config: ModelConfig, unrounded: Sequence[str] | None) -> dict[str, Any] | None:
        """The level is chosen when it runs."""
        return None

    def require_tools(self, spec: BuildSpec, *, proof: bool) -> None:
        """None that this program does not bring along."""

    def ledger(self, manifest: Manifest) -> list[LedgerEntry]:
        """See `Backend`."""
        from gemma_deploy.backends.native.ledger import ledger_of

        return ledger_of(manifest)

    def prove(self, proof: Proof, result: ParityResult) -> None:
        """Twice: exact, and with what the kernels round."""
        from gemma_deploy.backends.native.proof import prove_plan

        prove_plan(proof, result)

    def engine(self, artifact: Artifact, *, threads: int = 0, strict: bool = False, one_reply: bool = False) -> Engine:
        """In the library."""
        from gemma_deploy.backends.native.engine import NativeEngine

        return NativeEngine(artifact, threads=threads)

    def serve_command(self, artifact: Artifact, how: Serving) -> list[str]:
        """This program's own server."""
        return own_server(artifact, how)

    def encoder(self, artifact: Artifact, *, threads: int = 0, strict: bool = False) -> EncoderGraph:
        """There is none.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "backend.type native has no encoders", where=str(artifact.path), next_step="compile it for onnxruntime"
        )

    def keep_adapter(
        self, artifact: Artifact, directory: Path, name: str | None = None, *, force: bool = False
    ) -> KeptAdapter:
        """See `Backend`: as safetensors."""
        from gemma_deploy.backends.native.adapters import keep

        return keep(artifact, directory, name, force=force)

    def rounds(self, manifest: Manifest) -> bool:
        """Never: exact arithmetic leaves no rounding but that of the weights."""
        return False


BACKEND = Native()
