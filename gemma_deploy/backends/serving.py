"""The command that serves an artifact in this program's own server."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gemma_deploy.backends.base import Serving
from gemma_deploy.errors import UsageError

if TYPE_CHECKING:
    from gemma_deploy.artifact.opened import Artifact


def own_server(artifact: Artifact, how: Serving) -> list[str]:
    """Words of `gemma-deploy serve`.

    Raises:
        UsageError: several devices are asked for.
    """
    refuse_devices(artifact, how)
    return ["gemma-deploy", "serve", str(artifact.path), "--host", how.host, "--port", str(how.port)]


def refuse_devices(artifact: Artifact, how: Serving) -> None:
    """Of what one process serves.

    Raises:
        UsageError: several devices are asked for, or what vLLM alone has to be told.
    """
    if how.tensor > 1 or how.pipeline > 1 or how.ray or how.cpu:
        raise UsageError(
            f"backend.type {artifact.manifest.recipe.backend.type} is served by one process",
            where=str(artifact.path),
            expected="no --tensor-parallel-size, --pipeline-parallel-size, --ray or --cpu",
            next_step="compile it for backend.type vllm, which divides a model over devices",
        )
