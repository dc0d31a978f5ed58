"""The checkpoint that an artifact was made from."""

from __future__ import annotations

from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.checkpoint import Checkpoint, resolve_checkpoint
from gemma_deploy.errors import UsageError
from gemma_deploy.reading import why_absent


def checkpoint_of(artifact: Artifact, given: str | None) -> Checkpoint:
    """Open the checkpoint an artifact was made from, or a copy of it: what a copy changed, the comparison finds.

    Raises:
        UsageError: it is not there any more, or has changed since.
    """
    spec = given or artifact.manifest.recipe.frontend.checkpoint
    path = resolve_checkpoint(spec)
    if absent := why_absent(path):
        raise UsageError(
            f"its checkpoint {spec} is not there ({absent})",
            where=str(artifact.path),
            next_step="say where it is now with --checkpoint PATH",
        )
    checkpoint = Checkpoint.open(path)
    if checkpoint.fingerprint(times=False) != artifact.manifest.checkpoint.fingerprint_without_times:
        raise UsageError(
            "is not the checkpoint this artifact was made from (or has changed since)",
            where=str(path),
            expected=f"the one of {artifact.path}",
            next_step="name the right one with --checkpoint PATH, or compile again",
        )
    return checkpoint
