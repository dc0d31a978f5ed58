"""What each stage of a compile depends on, as keys that are known before any work."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gemma_deploy.calibration.pipeline import tokenizer_sha256
from gemma_deploy.calibration.sources import SOURCES
from gemma_deploy.job import Job
from gemma_deploy.params.layout import Place
from gemma_deploy.provenance import digest, stage_key
from gemma_deploy.quantization.rescaling import Rescaling
from gemma_deploy.reading import open_regular

# Modules that do the work of a stage; what they import counts as well (provenance.py).
RANGES = ("gemma_deploy.parity.maxima",)
TEXT = "gemma_deploy.calibration.pipeline"  # reads and cuts what a stage calibrates on
QUANTIZE = (
    *(
        "gemma_deploy.quantization.layers",
        "gemma_deploy.quantization.table",
        "gemma_deploy.quantization.mixed_precision",
    ),
    TEXT,
)
CACHE = ("gemma_deploy.quantization.cache", TEXT)
PARAMETERS = ("gemma_deploy.params.writer", "gemma_deploy.params.taken_over")
FILES = ("gemma_deploy.stages.files",)
SENSITIVITY = ("gemma_deploy.parity.sensitivity", TEXT)
GATE = ("gemma_deploy.proving.prove",)
MEASURING = ("sensitivity", "gate")
# Of a config: no graph depends on them, and fine-tuned models of one shape differ in them.
UNREAD = frozenset((
    *("warnings", "bos_token_id", "pad_token_id", "eos_token_id", "eos_token_ids"),
    *("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache"),
))  # fmt: skip


@dataclass(frozen=True)
class StageKeys:
    """The key of every stage; None where a job has no such stage."""

    ranges: str | None
    quantize: str | None
    cache: str | None
    parameters: str
    graphs: str
    files: str
    sensitivity: str | None
    gate: str

    @property
    def artifact(self) -> str:
        """Of everything an artifact holds but what is measured about it."""
        return digest([self.parameters, self.graphs, self.files])

    def built(self) -> dict[str, str]:
        """Stage -> key, of the stages there are that make what an artifact holds."""
        return {stage: key for stage, key in asdict(self).items() if key is not None and stage not in MEASURING}

    def measured(self, *, gate: bool) -> dict[str, str]:
        """Stage -> key, of those that measure; gate: whether that runs."""
        asked = {"sensitivity": self.sensitivity, "gate": self.gate if gate else None}
        return {stage: key for stage, key in asked.items() if key is not None}


def stage_keys(job: Job, dataset: Mapping[str, Any] | None) -> StageKeys:
    """The keys of a job.

    Args:
        dataset: the calibration text as `dataset_record` describes it, None where the job looks at none.
    """
    spec, scheme, weights = job.spec, job.scheme, job.checkpoint.weights_fingerprint()
    text = None if dataset is None else dataset["fingerprint"]
    looked = {"weights": weights, "text": text, "embed_scale": spec.embed_scale}
    ranges = quantize = cache = sensitivity = None
    if job.rescales:
        ranges = stage_key("ranges", code=RANGES, inputs=looked | {"context": spec.context})
    if scheme.calibrated:
        choices = {key: value for key, value in asdict(job.quantizer).items() if key != "sensitivity"}
        storage = job.storage.to_json()
        inputs = looked | {"choices": choices, "storage": storage, "scheme": str(scheme), "backend": spec.backend}
        quantize = stage_key("quantize", code=QUANTIZE, inputs=inputs)
    elif scheme.int8_cache:
        cache = stage_key("cache", code=CACHE, inputs=looked)
    reads = {name: key for name, key in (("ranges", ranges), ("quantize", quantize), ("cache", cache)) if key}
    parameters = stage_key("parameters", code=PARAMETERS, inputs={"weights": weights, **_asked(job)}, reads=reads)
    graphs = stage_key("graphs", code=job.backend.code, inputs=_of_graphs(job), reads=reads)
    converter = job.backend.converter
    files = stage_key("files", code=(*FILES, *([converter.module] if converter else ())), inputs=_beside(job))
    if job.quantizer.sensitivity:
        sensitivity = stage_key(
            "sensitivity", code=SENSITIVITY, inputs=looked, reads={"parameters": parameters, **reads}
        )
    gate = stage_key(
        "gate",
        code=(*GATE, *job.backend.proof_code),
        inputs={
            "weights": weights,
            "tokenizer": tokenizer_sha256(job.checkpoint),
            "prompt_tokens": job.proof.prompt_tokens,
            "decode_tokens": job.proof.decode_tokens,
            "text": _sha256(SOURCES["c4"].sample if job.proof.text is None else Path(job.proof.text)),
        },
        reads={"parameters": parameters, "graphs": graphs},
    )
    return StageKeys(ranges, quantize, cache, parameters, graphs, files, sensitivity, gate)


def graph_cache_key(
    job: Job, tensors: Mapping[str, Sequence[Place]], rescaling: Rescaling | None, *, unrounded: Sequence[str] | None
) -> str:
    """What graphs depend on, as values: the same for every checkpoint of a shape.

    Args:
        tensors, unrounded: as in `backends.base.ExportJob`.
    """
    rescaled = None if rescaling is None else [rescaling.residual, list(rescaling.wide)]  # the rest is in the file
    laid_out = {file: [asdict(place) for place in rows] for file, rows in tensors.items()}
    chosen = {"rescaled": rescaled, "kept": None if unrounded is None else sorted(unrounded), "tensors": laid_out}
    return stage_key("graphs", code=job.backend.code, inputs=_of_graphs(job) | chosen)


def _of_graphs(job: Job) -> dict[str, Any]:
    """Everything of a job that decides what its graphs look like, but what is measured."""
    spec = job.spec
    return _asked(job) | {
        "config": _facts(job),
        "embed_scale": spec.embed_scale,
        "contract": job.contract.to_json(),
        "backend": spec.backend,
        "options": spec.options.model_dump(),
        "kernels": job.backend.kernels(spec, job.config, None),
    }


def _beside(job: Job) -> dict[str, Any]:
    """What the files beside graphs and parameters say."""
    config = job.config
    return {
        "config": {**job.checkpoint.config_dict(), **job.backend.config_keys(job.spec, config)},
        "tokens": [config.bos_token_id, config.eos_token_ids, config.pad_token_id],
        "text": job.checkpoint.text_fingerprint(),
        "backend": {
            name: hashlib.sha256(content.read_bytes()).hexdigest() if isinstance(content, Path) else content
            for name, content in job.backend.files(job.spec, config).items()
        },
    }


def _asked(job: Job) -> dict[str, Any]:
    """How values are stored and divided."""
    spec, scheme = job.spec, job.scheme
    return {
        "form": scheme.form,
        "int8_cache": scheme.int8_cache,
        "storage": job.storage.to_json() if scheme.codes else None,
        "code_form": asdict(job.code_form),
        "context": spec.context,
        "split_points": spec.split_points,
        "ranks": spec.ranks,
        "factors": spec.adapter_rank is not None,
        **({"front": hashlib.sha256(job.front).hexdigest()} if job.front else {}),
    }


def _facts(job: Job) -> dict[str, Any]:
    """What of a config decides what is computed: what was understood, and all keys, some of which layers read alone."""
    known = {key: value for key, value in job.config.to_dict().items() if key not in UNREAD}
    return known | {"keys": {key: value for key, value in job.config.raw.items() if key not in UNREAD}}


def _sha256(file: Path) -> str | None:
    """Of a text; None where it cannot be read, which the gate tells with its name."""
    try:
        with open_regular(file) as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError:
        return None
