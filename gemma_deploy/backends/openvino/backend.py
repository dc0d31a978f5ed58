"""`backend.type: openvino` as `compile` sees it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_deploy.artifact.manifest import Manifest
from gemma_deploy.backends.base import Converter, Export, Exported, ExportJob, Proof, Serving
from gemma_deploy.backends.openvino.convert_tokenizer import FILES
from gemma_deploy.backends.openvino.options import (
    CACHE,
    INPUT_GROUP,
    OpenVinoOptions,
    model_problems,
    not_built,
    runtime_options,
)
from gemma_deploy.backends.serving import refuse_devices
from gemma_deploy.backends.spec import BuildSpec, CodeDefaults, Options, embedding_scale
from gemma_deploy.dtypes import OPENVINO
from gemma_deploy.errors import UsageError
from gemma_deploy.estimates import BASE_BYTES, GRAPH_BYTES, RUNTIME_BYTES, StageEstimate
from gemma_deploy.graph.contract import BATCH, SEQUENCE, TOTAL, GraphContract, Port, kv_shapes
from gemma_deploy.names import OPENVINO_WEIGHTS
from gemma_deploy.params.layout import places
from gemma_deploy.params.naming import CONSTANTS, graph_file
from gemma_deploy.params.plan import build_plan
from gemma_deploy.quantization.budget import INTEGER_PRODUCTS
from gemma_deploy.schemes import CodeForm, Naming

if TYPE_CHECKING:
    from gemma_deploy.artifact.adapters import KeptAdapter
    from gemma_deploy.artifact.manifest import LedgerEntry
    from gemma_deploy.artifact.opened import Artifact
    from gemma_deploy.checkpoint import Checkpoint, ModelConfig
    from gemma_deploy.parity.compare import ParityResult
    from gemma_deploy.runtime.encoder import EncoderGraph
    from gemma_deploy.runtime.engine import Engine

NAMING: Naming = "openvino"
MODEL = "openvino_model"


@dataclass(frozen=True)
class OpenVinoContract(GraphContract):
    """One model with state: new tokens -> logits of each.

    Args:
        input_group: inputs of products with codes that share a scale, where they are rounded to 8 bits; None: they are
            not.
    """

    naming: Naming = NAMING
    input_group: int | None = None

    @property
    def graph_names(self) -> tuple[str, ...]:
        """The name of the one graph, without `.xml`."""
        return (MODEL,)

    def inputs(self, graph: str) -> tuple[Port, ...]:
        """Token ids, the attention mask, which covers what is in the cache too, positions, and rows of the cache."""
        ids = Port("input_ids", "int64", (BATCH, SEQUENCE))
        mask = Port("attention_mask", "int64", (BATCH, TOTAL))
        return (ids, mask, Port("position_ids", "int64", (BATCH, SEQUENCE)), Port("beam_idx", "int32", (BATCH,)))

    def outputs(self, graph: str) -> tuple[Port, ...]:
        """Logits."""
        return (Port("logits", "float32", (BATCH, SEQUENCE, self.vocab_size)),)


class OpenVino:
    """See `Backend` in backends/base.py."""

    graphs: Sequence[str] = (MODEL,)
    runs_on = "openvino"
    rescales_float16 = False
    runs_bf16 = True
    shares_tensors = False
    no_lookup = "what OpenVINO keeps of a text cannot be set back"
    options: type[Options] = OpenVinoOptions
    unrounded_inputs = INTEGER_PRODUCTS
    code_defaults = CodeDefaults(table_in_groups=True)
    converter: Converter | None = Converter("gemma_deploy.backends.openvino.convert_tokenizer", "openvino", FILES)
    code: Sequence[str] = ("gemma_deploy.backends.openvino.decoder", "gemma_deploy.params.naming")
    proof_code: Sequence[str] = ("gemma_deploy.backends.openvino.proof",)

    def contradictions(self, spec: BuildSpec) -> Iterator[tuple[tuple[str, ...], str]]:
        """None beside what is not built."""
        return iter(())

    def not_built(self, spec: BuildSpec) -> Iterator[str]:
        """See options.py."""
        return not_built(spec)

    def model_problems(self, spec: BuildSpec, config: ModelConfig) -> list[str]:
        """See options.py."""
        return model_problems(spec, config)

    def graphs_estimate(self) -> StageEstimate:
        """Next to nothing: a text."""
        return StageEstimate("graphs", f"{MODEL}.xml, no weights", BASE_BYTES, GRAPH_BYTES, 1.0)

    def proof_bytes(self, spec: BuildSpec, elements: int) -> int:
        """OpenVINO has a copy of the weights as it multiplies them, codes as codes, and at the end two of the head."""
        return (2 if spec.scheme.codes else 5) * elements + RUNTIME_BYTES

    def codes(self, spec: BuildSpec) -> CodeForm:
        """Signed, row by row; positions are turned by frequencies, which are constants of the graph."""
        return CodeForm(rotary=False, naming=NAMING)

    def front(self, spec: BuildSpec, checkpoint: Checkpoint, name: str) -> bytes:
        """The graph's constants, which are the same wherever tensors lie."""
        from gemma_deploy.backends.openvino.decoder import build_decoder

        config = checkpoint.config
        storage, form = spec.storage(config.hidden_size, config.per_layer), self.codes(spec)
        plan = build_plan(config, spec.scheme.form, spec.context, storage=storage, form=form)
        scale = embedding_scale(config.hidden_size, spec.embed_scale)
        _, constants = build_decoder(config, places(plan, NAMING), embed_scale=scale, options={})
        return constants.content

    def contract(self, spec: BuildSpec, config: ModelConfig) -> OpenVinoContract:
        """Lengths are free; P is the longest prompt that is compared, C the positions there are."""
        kv_heads, head_dim, geometry = kv_shapes(config)
        given = spec.options
        assert isinstance(given, OpenVinoOptions)
        return OpenVinoContract(
            batch=1,
            prefill=spec.prefill,
            context=spec.context,
            layers=config.num_hidden_layers,
            kv_heads=kv_heads,
            head_dim=head_dim,
            geometry=geometry,
            vocab_size=config.vocab_size,
            cache_dtype=OPENVINO[given.cache or CACHE],
            dynamic=True,
            hidden_size=config.hidden_size,
            input_group=INPUT_GROUP if given.round_inputs else None,
        )

    def export(self, job: ExportJob) -> Export:
        """The XML."""
        from gemma_deploy.backends.openvino.decoder import build_decoder

        scale = embedding_scale(job.config.hidden_size, job.spec.embed_scale)
        tensors, options = job.tensors[OPENVINO_WEIGHTS], runtime_options(job.spec)
        text, constants = build_decoder(job.config, tensors, embed_scale=scale, options=options)
        placed = sum(place.nbytes for place in tensors if place.name == CONSTANTS)
        assert placed == len(constants.content), "the graph has other constants than `front` gave"
        return Exported({graph_file(MODEL, NAMING): text.encode()})

    def config_keys(self, spec: BuildSpec, config: ModelConfig) -> Mapping[str, Any]:
        """The checkpoint's own say all."""
        return {}

    def files(self, spec: BuildSpec, config: ModelConfig) -> Mapping[str, dict[str, Any] | Path]:
        """None beside those of the tokenizer."""
        return {}

    def kernels(self, spec: BuildSpec, config: ModelConfig, unrounded: Sequence[str] | None) -> dict[str, Any] | None:
        """OpenVINO picks them."""
        return None

    def require_tools(self, spec: BuildSpec, *, proof: bool) -> None:
        """None beside OpenVINO, which is asked for with its `converter`."""

    def ledger(self, manifest: Manifest) -> list[LedgerEntry]:
        """See `Backend`."""
        from gemma_deploy.backends.openvino.ledger import ledger_of

        return ledger_of(manifest)

    def prove(self, proof: Proof, result: ParityResult) -> None:
        """Twice: exact, and as it is shipped."""
        from gemma_deploy.backends.openvino.proof import prove_model

        prove_model(proof, result)

    def engine(self, artifact: Artifact, *, threads: int = 0, strict: bool = False, one_reply: bool = False) -> Engine:
        """In OpenVINO."""
        from gemma_deploy.backends.openvino.engine import OpenVinoEngine

        return OpenVinoEngine(artifact, threads=threads)

    def serve_command(self, artifact: Artifact, how: Serving) -> list[str]:
        """Words of `ovms`, OpenVINO Model Server; its paged attention has no capped scores, so those go without."""
        from gemma_deploy.artifact.weights import config_of

        refuse_devices(artifact, how)
        words = ["ovms", "--model_path", str(artifact.path), "--model_name", artifact.manifest.name]
        words += ["--task", "text_generation", "--target_device", "CPU"]
        if config_of(artifact).attn_logit_softcapping is not None:
            words += ["--pipeline_type", "LM"]
        return [*words, "--rest_bind_address", how.host, "--rest_port", str(how.port)]

    def encoder(self, artifact: Artifact, *, threads: int = 0, strict: bool = False) -> EncoderGraph:
        """There is none.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "backend.type openvino has no encoders", where=str(artifact.path), next_step="compile it for onnxruntime"
        )

    def keep_adapter(
        self, artifact: Artifact, directory: Path, name: str | None = None, *, force: bool = False
    ) -> KeptAdapter:
        """See `Backend`.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "backend.type openvino takes no adapters at run time",
            where=str(artifact.path),
            next_step=f"merge it into the weights: gemma-deploy compile RECIPE -s frontend.adapter={directory}",
        )


BACKEND = OpenVino()
