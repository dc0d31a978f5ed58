"""One compile, opened: what its stages need, taken from recipe and checkpoint once. Nothing below knows a recipe."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from gemma_deploy import extras
from gemma_deploy.architectures import ROWS
from gemma_deploy.backends import backend
from gemma_deploy.backends.base import Backend
from gemma_deploy.backends.spec import BuildSpec
from gemma_deploy.checkpoint import Checkpoint, ModelConfig, resolve_checkpoint
from gemma_deploy.graph.contract import GraphContract
from gemma_deploy.machine import give_memory_back
from gemma_deploy.params.naming import graph_file
from gemma_deploy.params.plan import ParamSpec, build_plan
from gemma_deploy.params.taken_over import storage_like, taken_over
from gemma_deploy.partition import ArtifactPart, division_problems, parts_of
from gemma_deploy.partition.ranks import input_channels, repeated_heads
from gemma_deploy.recipe import Recipe, check_against_model, check_built
from gemma_deploy.schemes import CodeForm, Codes, Scheme, Storage, group_problems
from gemma_deploy.text import check_text, with_stops

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dataset:
    """The text that is asked for.

    Args:
        name: a data set or a mix; path: where it lies. Words as in calibration/mix.py.
        nsamples: windows, or a default (`nsamples_given`) that what there is may fall short of; seqlen: tokens in each,
            likewise.
    """

    name: str
    path: str | None
    nsamples: int
    seqlen: int
    nsamples_given: bool = True
    seqlen_given: bool = True


@dataclass(frozen=True)
class QuantizerChoices:
    """What a recipe says of the calibrated quantizers; None where the quantizer chooses.

    Args:
        true_sequential, percdamp, act_order, blocksize: see `quantization.solver.Settings`.
        keep_a16: share of the multiplications whose inputs stay unrounded where w8a8 rounds the others.
        sensitivity: measure what each layer costs alone.
    """

    true_sequential: bool = True
    percdamp: float | None = None
    act_order: bool | None = None
    blocksize: int = 128
    keep_a16: float | None = None
    sensitivity: bool = False


@dataclass(frozen=True)
class Workers:
    """Who works.

    Args:
        writers: tensors written at a time.
        processes: that calibrate; cluster: address of a Ray cluster that calibrates in their place.
    """

    writers: int
    processes: int
    cluster: str | None


@dataclass(frozen=True)
class ProofRequest:
    """How an artifact is compared with its checkpoint.

    Args:
        text: file that prompts come from; None for bundled text.
        prompt_tokens: at least so many; decode_tokens: steps after them.
        gate: a comparison that fails ends the compile.
    """

    text: str | None
    prompt_tokens: int
    decode_tokens: int
    gate: bool


@dataclass(frozen=True)
class Job:
    """One compile. Make one with `Job.open`.

    Args:
        name: of the artifact; out: its directory.
        record: the recipe with all defaults, as the manifest holds it; carried: keys for the vendor alone.
        chat_format: see `TextCheck`.
    """

    name: str
    out: Path
    spec: BuildSpec
    checkpoint: Checkpoint
    dataset: Dataset
    quantizer: QuantizerChoices
    workers: Workers
    proof: ProofRequest
    record: Mapping[str, Any]
    carried: Mapping[str, Any]
    chat_format: str | None = None

    @classmethod
    def open(cls, recipe: Recipe, out: Path | None = None) -> Job:
        """Find everything about recipe and checkpoint that can be wrong, before any work.

        Args:
            out: the artifact's directory (`workspace.path`/NAME by default).

        Raises:
            UsageError: a package that the recipe takes is not installed.
            CheckpointError: the checkpoint or its tokenizer is damaged; RecipeError, NotBuiltError: it does not go with
                the recipe.
        """
        rescales = recipe.scheme.weights == "fp16" and backend(recipe.backend.type).rescales_float16
        needed = ["build", *(["calibrate"] if recipe.scheme.calibrates or rescales else [])]
        if (converter := backend(recipe.backend.type).converter) is not None:
            needed.append(converter.extra)
        extras.require(*needed, what=f"compiling {recipe.name}")
        check_built(recipe)
        checkpoint = Checkpoint.open(
            resolve_checkpoint(recipe.frontend.checkpoint), recipe.merged_adapters, encoder=True
        )
        spec = _spec_for(recipe, checkpoint)
        check_against_model(recipe, checkpoint.config.max_position_embeddings, model_problems(spec, checkpoint.config))
        text = check_text(checkpoint)
        give_memory_back()  # of the tokenizer
        for note in dict.fromkeys((*checkpoint.notes, *checkpoint.config.warnings, *text.notes)):
            log.warning("%s", note)
        if misnamed := _other_generation(recipe.name, checkpoint.config.model_type) or _other_size(recipe, checkpoint):
            log.warning("%s", misnamed)
        if repeated := repeated_heads(checkpoint.config, spec.ranks):
            log.info("%s", repeated)
        return replace(cls.of(recipe, with_stops(checkpoint, text), out), chat_format=text.chat_format)

    @classmethod
    def of(cls, recipe: Recipe, checkpoint: Checkpoint, out: Path | None = None) -> Job:
        """The job of a recipe and a checkpoint that go together."""
        given, dataset, workspace = recipe.dataset.model_fields_set, recipe.dataset, recipe.workspace
        spec = _spec_for(recipe, checkpoint)
        if checkpoint.config.architecture.encoder:  # one length: there is no cache
            contract = backend(spec.backend).contract(spec, checkpoint.config)
            spec = replace(spec, prefill=contract.prefill, context=contract.context)
        return cls(
            name=recipe.name,
            out=out or Path(workspace.path) / recipe.name,
            spec=spec,
            checkpoint=checkpoint,
            dataset=Dataset(
                dataset.name,
                dataset.path,
                dataset.nsamples,
                dataset.seqlen,
                "nsamples" in given,
                "seqlen" in given,
            ),
            quantizer=_choices(recipe, encoder=checkpoint.config.architecture.encoder),
            workers=Workers(workspace.workers, workspace.processes, workspace.cluster),
            proof=ProofRequest(
                recipe.parity.text, recipe.parity.prompt_tokens, recipe.parity.decode_tokens, recipe.parity.gate
            ),
            record=recipe.resolved(),
            carried=recipe.vendor_keys(),
        )

    def with_windows(self, nsamples: int, seqlen: int) -> Job:
        """The same, calibrated on so many windows of so many tokens, whatever the defaults say; the record too."""
        dataset = {**self.record["dataset"], "nsamples": nsamples, "seqlen": seqlen}
        return replace(
            self,
            dataset=replace(self.dataset, nsamples=nsamples, seqlen=seqlen),
            record={**self.record, "dataset": dataset},
        )

    @property
    def config(self) -> ModelConfig:
        """The config of the checkpoint's model."""
        return self.checkpoint.config

    @property
    def scheme(self) -> Scheme:
        """How weights and cache are kept."""
        return self.spec.scheme

    @property
    def rescales(self) -> bool:
        """Whether calibration text chooses the powers of two that bring activations into float16."""
        return self.scheme.weights == "fp16" and self.backend.rescales_float16

    @cached_property
    def backend(self) -> Backend:
        """Who makes, proves and opens the artifact."""
        return backend(self.spec.backend)

    @cached_property
    def parts(self) -> tuple[ArtifactPart, ...]:
        """What the artifact is divided into: one part, or a rank of a stage each."""
        return parts_of(self.config.num_hidden_layers, self.spec.split_points, self.spec.ranks)

    @cached_property
    def storage(self) -> Storage:
        """What matrices are stored as, where they are codes."""
        return storage_of_model(self.spec, self.config)

    @cached_property
    def taken_over(self) -> Mapping[str, Codes]:
        """Matrices whose codes and scales are the checkpoint's, and their form; nothing where it has floats."""
        return taken_over(self.checkpoint, self.scheme, self.storage)

    @cached_property
    def code_form(self) -> CodeForm:
        """How codes lie in the file."""
        return self.backend.codes(self.spec)

    @cached_property
    def front(self) -> bytes:
        """What stands in the parameter file in front of its tensors, beside their table."""
        made = self.backend.front(self.spec, self.checkpoint, self.name)
        give_memory_back()  # of the tokenizer
        return made

    @cached_property
    def contract(self) -> GraphContract:
        """What the graphs take and give."""
        return self.backend.contract(self.spec, self.config)

    @cached_property
    def plans(self) -> tuple[tuple[ParamSpec, ...], ...]:
        """What the parameter file of each part holds."""
        return tuple(self.plan_of(part) for part in self.parts)

    def plan_of(self, part: ArtifactPart) -> tuple[ParamSpec, ...]:
        """What the parameter file of a part would hold, one of this artifact or of a model divided otherwise."""
        return build_plan(
            self.config,
            self.scheme.form,
            self.spec.context,
            part=part,
            storage=self.storage,
            int8_cache=self.scheme.int8_cache,
            form=self.code_form,
            factors=self.spec.adapter_rank is not None,
        )

    @property
    def graph_files(self) -> list[str]:
        """The file of every graph, by its path in the artifact."""
        naming = self.code_form.naming
        return [part.file(graph_file(graph, naming)) for part in self.parts for graph in self.contract.graph_names]

    @property
    def exported_files(self) -> list[str]:
        """The file of every graph, and what is made of them."""
        return [*self.graph_files, *self.contract.beside_graphs]


def _spec_for(recipe: Recipe, checkpoint: Checkpoint) -> BuildSpec:
    """What is to be built; of a checkpoint that has codes, in a form that takes over as many as the recipe leaves free.

    Kernels that the recipe asks for come first: where they want another form, the recipe's is kept.
    """
    spec = recipe.spec
    if not spec.scheme.codes or spec.scheme.calibrated or not checkpoint.quantized:
        return spec
    storage = spec.storage(checkpoint.config.hidden_size)
    four = storage.linears.bits == 4  # the recipe's groups are those of int4; int8 to nearest has none
    found = storage_like(
        checkpoint.quantized,
        storage,
        groups=spec.groupsize is None or not four,
        kept=spec.keep_w8 is None,
        table=spec.table is None,
        channels=tuple(input_channels(checkpoint.config, spec.ranks).values()),
    )
    made = replace(spec, own_storage=found)
    return spec if any(backend(spec.backend).contradictions(made)) else made


def _choices(recipe: Recipe, *, encoder: bool) -> QuantizerChoices:
    """What a recipe says; what a layer costs is measured in logits, which an encoder has not."""
    section, sensitivity = recipe.frontend.quantize, recipe.sensitivity and not encoder
    if section is None:
        return QuantizerChoices(sensitivity=sensitivity)
    args = section.calib_args
    return QuantizerChoices(
        true_sequential=args.true_sequential,
        percdamp=args.percdamp,
        act_order=args.act_order,
        blocksize=args.blocksize,
        keep_a16=args.keep_a16,
        sensitivity=sensitivity,
    )


def _other_generation(name: str, model_type: str) -> str | None:
    """A note about an artifact that would bear the name of another generation than its model's."""
    for row in ROWS[1:]:  # every name may hold the first one's
        other = row.model_type.removesuffix("_text")
        if row.model_type != model_type and re.search(rf"(?<![a-z0-9]){other}(?![a-z0-9])", name.lower()):
            return f"the artifact is called {name}, but the model is a {model_type}: set another with -s name=NAME"
    return None


def _other_size(recipe: Recipe, checkpoint: Checkpoint) -> str | None:
    """A note about an artifact whose name, `gemma-2b-it-int8`, says another size than the model's.

    A gemma-2b has 2.5 billion parameters and a gemma-7b 8.5: half as many again is the same size, and a third fewer.
    """
    said = re.search(r"(?<![a-z0-9.])(\d{1,3}(?:\.\d)?)([bm])(?![a-z0-9])", recipe.name.lower())
    if said is None:
        return None
    named = float(said[1]) * (1e9 if said[2] == "b" else 1e6)
    has = sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())
    if named / 1.5 <= has <= named * 1.5:
        return None
    size = f"{has / 1e9:.1f} billion" if has >= 1e9 else f"{has / 1e6:.3g} million"
    return f"the artifact is called {recipe.name}, but the model has {size} parameters: set another with -s name=NAME"


def _encoder_problems(spec: BuildSpec) -> list[str]:
    """What of a spec means nothing to an encoder, or is not built for one."""
    problems = []
    if spec.scheme.int8_cache:
        way = "leave +kv8 out" if spec.scheme.codes else "remove frontend.quantize"
        problems.append(f"frontend.quantize.type: the model is an encoder and has no cache: {way}")
    if spec.scheme.rounds_activations:
        problems.append("frontend.quantize.type: w8a8 is not built for encoders: set w8a16 or w8a16_gptq")
    if spec.ranks > 1 or spec.split_points:
        problems.append("split.points and model_kwargs.tp: the graph of an encoder is not divided: remove them")
    if spec.adapter_rank is not None:
        problems.append("adapters: an encoder takes none at run time: remove the section")
    return problems


def _drafter_problems(spec: BuildSpec) -> list[str]:
    """What of a spec means nothing to a drafter, or is not built for one."""
    problems, scheme = [], str(spec.scheme)
    if scheme not in ("fp32", "w8a16"):
        problems.append(
            f"frontend.quantize.type, backend.dtype: {scheme} is not built for drafters: set fp32, or int8 with w8a16"
        )
    if spec.ranks > 1 or spec.split_points:
        problems.append("split.points and model_kwargs.tp: the graph of a drafter is not divided: remove them")
    if spec.adapter_rank is not None:
        problems.append("adapters: a drafter takes none: remove the section")
    return problems


def model_problems(spec: BuildSpec, config: ModelConfig) -> list[str]:
    """What of a spec does not go with a model, a sentence for each key."""
    if config.architecture.encoder and (problems := _encoder_problems(spec)):
        return problems
    if config.drafting is not None and (problems := _drafter_problems(spec)):
        return problems
    problems = division_problems(config, spec.split_points, spec.ranks, align_qkv=spec.align_qkv)
    problems += backend(spec.backend).model_problems(spec, config)
    has_table = config.per_layer is not None and bool(config.per_layer.rows)
    if spec.per_layer_table is not None and not (spec.scheme.codes and has_table):
        why = f"{spec.scheme} has floats" if has_table else "this model has no table of per-layer vectors"
        problems.append(f"frontend.quantize.per_layer_table: {why}: remove it")
    if spec.scheme.codes:
        channels = input_channels(config, spec.ranks)
        problems += group_problems(storage_of_model(spec, config), channels, config.hidden_size)
    return problems


def storage_of_model(spec: BuildSpec, config: ModelConfig) -> Storage:
    """What the matrices of a model are stored as."""
    return spec.storage(config.hidden_size, config.per_layer)
