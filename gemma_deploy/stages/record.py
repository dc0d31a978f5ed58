"""The manifest of an artifact in the making: everything that is known before it is proven."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma_deploy.artifact.census import op_census
from gemma_deploy.artifact.manifest import FORMAT_VERSION, Manifest
from gemma_deploy.artifact.tools import tool_versions
from gemma_deploy.graph.contract import GraphContract
from gemma_deploy.job import Job
from gemma_deploy.params import ParamTable
from gemma_deploy.params.taken_over import arrived
from gemma_deploy.partition import ArtifactPart
from gemma_deploy.quantization.rescaling import Rescaling
from gemma_deploy.stages.calibration import Quantized
from gemma_deploy.stages.keys import StageKeys


def describe(
    job: Job,
    out: Path,
    *,
    keys: StageKeys,
    dataset: Mapping[str, Any] | None,
    table: ParamTable,
    rescaling: Rescaling | None,
    quantized: Quantized | None,
) -> Manifest:
    """The manifest, without parity, stages and file hashes."""
    config, unrounded = job.config, quantized.unrounded if quantized else None
    manifest = Manifest.of(
        {
            "format_version": FORMAT_VERSION,
            "name": job.name,
            "key": keys.artifact,
            "keys": keys.built(),
            "tool": tool_versions(),
            "recipe": dict(job.record),
            "carried_for_the_vendor": list(job.carried),
            "checkpoint": {
                "path": job.checkpoint.path.name,
                "format": job.checkpoint.format,
                "fingerprint": job.checkpoint.fingerprint(),
                "fingerprint_without_times": job.checkpoint.fingerprint(times=False),
                "adapters": [one.to_json() for one in job.checkpoint.adapters],
                "arrived": arrived(job.checkpoint, job.scheme, job.storage),
            },
            "model": config.to_dict(),
            "chat_format": job.chat_format,
            "scheme": job.scheme.weights,
            "int8_cache": job.scheme.int8_cache,
            "storage": job.storage.to_json() if job.scheme.codes else None,
            "contract": job.contract.to_json(),
            "parts": [describe_part(part, job.contract) for part in job.parts] if len(job.parts) > 1 else [],
            "op_census": {file.removesuffix(".onnx"): op_census(out / file) for file in job.graph_files},
            "calibration": dataset,
            "quantization": quantized.to_json() if quantized else None,
            "params": table.to_json(),
            "rescaling": None if rescaling is None else rescaling.to_json(),
            "kernels": job.backend.kernels(job.spec, config, unrounded),
            "parity": None,
            "stages": [],
            "ledger": [],
            "files": {},
        }
    )
    return manifest.but(ledger=job.backend.ledger(manifest))


def describe_part(part: ArtifactPart, contract: GraphContract) -> dict[str, Any]:
    """One rank of one stage: its folder, layers [start, stop), and what its graphs take and give."""
    span = part.span
    return {
        "folder": part.folder,
        "stage": span.name,
        "layers": [span.start, span.stop],
        "rank": part.rank,
        "ranks": part.ranks,
        "contract": contract.of_part(part).to_json(),
    }
