"""`backend.type: onnxruntime` as `compile` sees it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_deploy.artifact.manifest import Manifest
from gemma_deploy.backends.base import Export, Exported, ExportJob, Proof, Serving
from gemma_deploy.backends.genai_config import CONFIG_FILE, genai_config
from gemma_deploy.backends.keeping import adapter_slots
from gemma_deploy.backends.onnxruntime.decoder import build_decoder, linears_of
from gemma_deploy.backends.onnxruntime.drafter import build_drafter
from gemma_deploy.backends.onnxruntime.encoder import build_encoder
from gemma_deploy.backends.onnxruntime.experts import expert_modules
from gemma_deploy.backends.onnxruntime.options import (
    ALL,
    CANDIDATES,
    GRAPH,
    LAST,
    MODEL,
    Kernels,
    OrtOptions,
    contradictions,
    drafter_problems,
    encoder_problems,
    not_built,
    options_of,
)
from gemma_deploy.backends.onnxruntime.window import WINDOW, WINDOW_CACHE, window_problems, windowed_layers
from gemma_deploy.backends.serving import own_server
from gemma_deploy.backends.spec import BuildSpec, CodeDefaults, Options, embedding_scale
from gemma_deploy.checkpoint import Checkpoint, ModelConfig
from gemma_deploy.estimates import BASE_BYTES, GRAPH_BYTES, RUNTIME_BYTES, SESSION_BYTES, StageEstimate
from gemma_deploy.graph.contract import (
    BATCH,
    SEQUENCE,
    AdapterSlots,
    DrafterContract,
    EncoderContract,
    GraphContract,
    Port,
    kv_shapes,
)
from gemma_deploy.names import PARAMS
from gemma_deploy.partition.ranks import input_channels
from gemma_deploy.quantization.budget import INTEGER_PRODUCTS
from gemma_deploy.schemes import CodeForm, block_problems

if TYPE_CHECKING:
    from gemma_deploy.artifact.adapters import KeptAdapter
    from gemma_deploy.artifact.manifest import LedgerEntry
    from gemma_deploy.artifact.opened import Artifact
    from gemma_deploy.parity.compare import ParityResult
    from gemma_deploy.runtime.encoder import EncoderGraph
    from gemma_deploy.runtime.engine import Engine

log = logging.getLogger(__name__)
# Tokens of a prompt that run together: activations of a longer piece are all alive at once, and attention computes what
# it masks; products of a shorter one are slower (real 270M, fast, 1,900 tokens: 1176, 1333, 1294 and 1218 tokens/s in
# pieces of 256, 512, 1024 and whole).
CHUNKS = {"lean": 256, "fast": 512}
PAST, TOTAL = "past_sequence", "total_sequence"


@dataclass(frozen=True)
class OrtContract(GraphContract):
    """One graph: new tokens and the cache before them -> logits, and the cache after them.

    Args:
        windowed: layers whose caches hold a window alone.
        logits: `last`, of each row's last token, or `all`, of every new token.
        adapters: what the graph takes of a LoRA adapter, as inputs that may be left out; None: nothing.
    """

    windowed: tuple[int, ...] = ()
    logits: str = LAST
    adapters: AdapterSlots | None = None

    @property
    def graph_names(self) -> tuple[str, ...]:
        """The name of the one graph, without `.onnx`."""
        return (MODEL,)

    def inputs(self, graph: str) -> tuple[Port, ...]:
        """Token ids, the attention mask, and the cache so far."""
        ids = Port("input_ids", "int64", (BATCH, SEQUENCE))
        return (ids, Port("attention_mask", "int64", (BATCH, TOTAL)), *self._cache("past_key_values", PAST))

    def outputs(self, graph: str) -> tuple[Port, ...]:
        """Logits, and the cache with the new tokens."""
        positions = SEQUENCE if self.logits == ALL else 1
        return (Port("logits", "float32", (BATCH, positions, self.vocab_size)), *self._cache("present", TOTAL))

    @property
    def token_scales(self) -> bool:
        """None: codes of an int8 cache have one step for each channel, which is a weight of the graph."""
        return False

    @property
    def not_for(self) -> tuple[str, ...]:
        """What a caller may try that is refused or goes wrong, as sentences."""
        every = self.logits == ALL
        return (
            "prompts of many tokens in one run: the logits of every token are "
            f"{4 * self.vocab_size} bytes (backend.compile.logits: last has those of the last one)"
            if every
            else "onnxruntime-genai's Engine, which wants the logits of every token (backend.compile.logits: all)",
            "batches padded on the left in onnxruntime-genai's Generator, which takes that padding for tokens; in "
            "attention_mask either side is right",
            *(() if self.windowed else ("several new tokens of several rows behind a cache: the graph refuses them",)),
        )

    def to_json(self) -> dict[str, Any]:
        """Sizes, ports and `not_for`, for the manifest."""
        return super().to_json() | {"not_for": list(self.not_for)}

    def _positions(self, layer: int, length: int | str) -> int | str:
        return WINDOW_CACHE if layer in self.windowed else length


class OnnxRuntime:
    """See `Backend` in backends/base.py."""

    graphs: Sequence[str] = (MODEL,)
    runs_on = "onnxruntime"
    rescales_float16 = True
    runs_bf16 = False  # ONNX Runtime has no such kernels for a CPU
    shares_tensors = True
    no_lookup = ""
    converter = None
    options: type[Options] = OrtOptions
    unrounded_inputs = INTEGER_PRODUCTS
    code_defaults = CodeDefaults(table_in_groups=True)  # its kernels have scales per group in any case
    code: Sequence[str] = tuple(
        f"gemma_deploy.backends.onnxruntime.{module}" for module in ("decoder", "drafter", "encoder", "options")
    )
    proof_code: Sequence[str] = tuple(f"gemma_deploy.backends.onnxruntime.{one}" for one in ("proof", "drafter_proof"))

    def contradictions(self, spec: BuildSpec) -> Iterator[tuple[tuple[str, ...], str]]:
        """See options.py."""
        return contradictions(spec)

    def not_built(self, spec: BuildSpec) -> Iterator[str]:
        """See options.py."""
        return not_built(spec)

    def graphs_estimate(self) -> StageEstimate:
        """Next to nothing: the graph is built node by node, not traced."""
        return StageEstimate("graphs", "model.onnx, no weights", BASE_BYTES, GRAPH_BYTES, 1.0)

    def proof_bytes(self, spec: BuildSpec, elements: int) -> int:
        """Of the session a user will open, its weights packed."""
        return RUNTIME_BYTES + int(elements * (SESSION_BYTES if spec.scheme.codes else 4))

    def model_problems(self, spec: BuildSpec, config: ModelConfig) -> list[str]:
        """Widths that the block kernel would pad, and caches of a window that this model has no use for."""
        problems = block_problems(input_channels(config, 1)) if spec.scheme.codes else []
        if config.reads_beside:
            problems += self._not_for_shared(spec, config)
        if options_of(spec).cache == WINDOW:
            problems += window_problems(config, spec.context)
        if config.architecture.encoder:
            problems += encoder_problems(spec)
        if config.drafting is not None:
            problems += drafter_problems(spec)
        return problems

    def _not_for_shared(self, spec: BuildSpec, config: ModelConfig) -> list[str]:
        """What is not built of models with per-layer embeddings, or with layers that share keys and values."""
        which = "a model with per-layer embeddings or shared keys and values (Gemma 4 E2B, E4B)"
        problems = []
        if config.altup is not None:
            which = "a model of several streams (Gemma 3n)"
        if config.altup is not None and (spec.scheme.int8_cache or spec.scheme.rounds_activations):
            problems.append(
                f"frontend.quantize.type: {spec.scheme} is not built for {which}: write w8a16_gptq or w4a16_gptq"
            )
        if options_of(spec).cache == WINDOW and options_of(spec).logits == ALL and config.first_sharing is not None:
            problems.append(
                "backend.compile.cache: window and backend.compile.logits: all contradict each other where layers read "
                "keys and values of earlier ones (Gemma 3n, Gemma 4 E2B, E4B), which are gone from such a cache: write "
                "full, or last"
            )
        if spec.adapter_rank:
            problems.append(f"adapters.rank: adapters beside the artifact are not built for {which}: leave it out")
        return problems

    def codes(self, spec: BuildSpec) -> CodeForm:
        """Unsigned, as the block kernel and the embedding want them; of integer products signed and transposed."""
        return CodeForm(
            unsigned=True,
            transposed=options_of(spec).prefill == "fast",
            experts_transposed=True,
            cache_scales=spec.scheme.int8_cache,
        )

    def front(self, spec: BuildSpec, checkpoint: Checkpoint, name: str) -> bytes:
        """Nothing."""
        return b""

    def contract(self, spec: BuildSpec, config: ModelConfig) -> GraphContract:
        """Batch and lengths are free; P is the longest prompt that is compared, C the positions there are."""
        if config.architecture.encoder:
            return EncoderContract.of_encoder(config, batch=1, length=spec.context, dynamic=True)
        if config.drafting is not None:
            return DrafterContract.of_drafter(config, context=spec.context)
        return self._decoder_contract(spec, config)

    def _decoder_contract(self, spec: BuildSpec, config: ModelConfig) -> OrtContract:
        dtype = "bfloat16" if spec.scheme.weights == "bf16" else "float32"
        kv_heads, head_dim, geometry = kv_shapes(config)
        return OrtContract(
            batch=1,
            prefill=spec.prefill,
            context=spec.context,
            layers=config.num_hidden_layers,
            kv_heads=kv_heads,
            head_dim=head_dim,
            geometry=geometry,
            vocab_size=config.vocab_size,
            cache_dtype="int8" if spec.scheme.int8_cache else dtype,
            dynamic=True,
            hidden_size=config.hidden_size,
            windowed=windowed_layers(config) if options_of(spec).cache == WINDOW else (),
            logits=options_of(spec).logits or LAST,
            adapters=adapter_slots(config, spec.adapter_rank, dtype) if spec.adapter_rank else None,
        )

    def export(self, job: ExportJob) -> Export:
        """Built from the config in this process: it takes no torch and some tens of milliseconds."""
        from gemma_deploy.graph.external import serialized

        spec, config = job.spec, job.config
        scale = embedding_scale(config.hidden_size, spec.embed_scale)
        kernels, rows = chosen_kernels(spec, config, job.unrounded), job.tensors[PARAMS]
        if config.architecture.encoder:
            model = build_encoder(config, kernels, rows, location=PARAMS, embed_scale=scale)
        elif isinstance(job.contract, DrafterContract):
            model = build_drafter(config, kernels, rows, location=PARAMS, contract=job.contract)
        else:
            adapters = self._decoder_contract(spec, config).adapters
            model = build_decoder(
                config,
                kernels,
                rows,
                location=PARAMS,
                embed_scale=scale,
                adapters=adapters,
                rounding=spec.embed_scale,
            )
        log.debug("%s built: %d nodes", GRAPH, len(model.graph))
        return Exported({GRAPH: serialized(model)})

    def config_keys(self, spec: BuildSpec, config: ModelConfig) -> Mapping[str, Any]:
        """The checkpoint's own say all."""
        return {}

    def files(self, spec: BuildSpec, config: ModelConfig) -> dict[str, dict[str, Any]]:
        """What onnxruntime-genai reads; it runs no encoders and no drafters."""
        if config.architecture.encoder or config.drafting is not None:
            return {}
        options, gpu = options_of(spec), spec.scheme.weights == "bf16"
        assert options.prefill is not None
        # genai's Engine, for which logits of all positions are, refuses models with a chunk_size.
        chunk = None if options.logits == ALL else CHUNKS[options.prefill]
        windowed = windowed_layers(config) if options.cache == WINDOW else ()
        return {CONFIG_FILE: genai_config(config, spec.context, chunk, gpu=gpu, windowed=windowed)}

    def kernels(self, spec: BuildSpec, config: ModelConfig, unrounded: Sequence[str] | None) -> dict[str, Any] | None:
        """As in `Kernels`."""
        if not spec.scheme.codes:
            return None
        chosen = chosen_kernels(spec, config, unrounded)
        record = asdict(chosen)
        del record["in_14_bits"]
        return record | {"wide": sorted(chosen.in_14_bits)}  # the name in manifests

    def require_tools(self, spec: BuildSpec, *, proof: bool) -> None:
        """None that this program does not bring along."""

    def ledger(self, manifest: Manifest) -> list[LedgerEntry]:
        """See `Backend`."""
        from gemma_deploy.backends.onnxruntime.ledger import ledger_of

        return ledger_of(manifest)

    def prove(self, proof: Proof, result: ParityResult) -> None:
        """Twice: exact, and with the kernels it ships."""
        if proof.checkpoint.config.drafting is not None:
            from gemma_deploy.backends.onnxruntime.drafter_proof import prove_drafter

            prove_drafter(proof, result)
            return
        from gemma_deploy.backends.onnxruntime.proof import prove_graph

        prove_graph(proof, result)

    def engine(self, artifact: Artifact, *, threads: int = 0, strict: bool = False, one_reply: bool = False) -> Engine:
        """In onnxruntime-genai, or in ONNX Runtime itself where that is not installed."""
        from gemma_deploy.backends.onnxruntime.engine import open_engine

        return open_engine(artifact, threads=threads, strict=strict)

    def serve_command(self, artifact: Artifact, how: Serving) -> list[str]:
        """This program's own server."""
        return own_server(artifact, how)

    def encoder(self, artifact: Artifact, *, threads: int = 0, strict: bool = False) -> EncoderGraph:
        """The graph of an encoder: as it is, or computed exactly."""
        from gemma_deploy.backends.onnxruntime.exact import exact
        from gemma_deploy.runtime.encoder import EncoderGraph
        from gemma_deploy.runtime.session import load_file, open_graph

        path = artifact.path.resolve()
        model = load_file(path / GRAPH)
        if strict:
            exact(model)
        session = open_graph(model, path, strict=strict, threads=threads)
        return EncoderGraph(session, artifact.manifest.contract, where=path / GRAPH)

    def keep_adapter(
        self, artifact: Artifact, directory: Path, name: str | None = None, *, force: bool = False
    ) -> KeptAdapter:
        """See `Backend`: in ONNX Runtime's adapter format."""
        from gemma_deploy.backends.onnxruntime.adapters import keep

        return keep(artifact, directory, name, force=force)

    def rounds(self, manifest: Manifest) -> bool:
        """Never: exact arithmetic leaves no rounding but that of the weights."""
        return False


BACKEND = OnnxRuntime()


def chosen_kernels(spec: BuildSpec, config: ModelConfig, unrounded: Sequence[str] | None) -> Kernels:
    """What the recipe asks for.

    Integer products take activations of 8 bits where calibration made them fit for that (w8a8), but for those it found
    too noisy; of any other scheme, and before experts of a graph without, 14 bits everywhere.
    """
    options = options_of(spec)
    candidates = CANDIDATES if options.head == "screened" else 0
    experts = frozenset(module for layer in config.layers for module in expert_modules(layer))
    kernels = Kernels(
        block=options.block or Kernels.block,
        in_14_bits=experts,
        candidates=candidates,
        windowed=options.cache == WINDOW,
        logits=options.logits or LAST,
    )
    if options.prefill != "fast":
        return kernels
    finer = experts.union(linears_of(config)) if unrounded is None else frozenset(unrounded)
    return replace(kernels, integer=True, in_14_bits=finer)
