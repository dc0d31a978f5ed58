"""The one way to open an artifact in order to run it: `open_engine`."""

from __future__ import annotations

from pathlib import Path

from gemma_deploy.artifact.check import open_whole
from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.backends import backend_of
from gemma_deploy.runtime.engine import Engine, Limits, Session

__all__ = ["Engine", "Limits", "Session", "open_engine"]


def open_engine(
    artifact: Artifact | str | Path,
    *,
    threads: int = 0,
    strict: bool = False,
    one_reply: bool = False,
) -> Engine:
    """Open an artifact in order to run it. Imports no torch.

    Args:
        artifact: its directory, whose files are compared with the manifest (sizes, and the hashes of small files;
            weights are `verify`'s work); or an `Artifact` as it is.
        threads: of one operator; 0 for as many as there are cores.
        strict: compute exactly what the graph says; slow, and for static artifacts alone.
        one_reply: there will be one: memory that only the prompt takes is given back after it.

    Raises:
        ArtifactError: it is not there, not finished, or damaged.
        UsageError: it cannot be run like this here.
    """
    opened = artifact if isinstance(artifact, Artifact) else open_whole(artifact, hashes=True)
    return backend_of(opened.manifest).engine(opened, threads=threads, strict=strict, one_reply=one_reply)
