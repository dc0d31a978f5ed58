"""The checkpoint that an artifact was made from."""

from __future__ import annotations

from collections.abc import Sequence

from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.checkpoint import AdapterRef, Checkpoint, resolve_checkpoint
from gemma_deploy.checkpoint.adapters.merging import adapter_refs
from gemma_deploy.errors import UsageError
from gemma_deploy.reading import expand, why_absent


def checkpoint_of(artifact: Artifact, given: str | None, adapters: Sequence[AdapterRef] = ()) -> Checkpoint:
    """Open the checkpoint an artifact was made from, or a copy of it: what a copy changed, the comparison finds.

    Args:
        given: where it is now; None for where the recipe says.
        adapters: likewise those that were added to it; () for where the recipe says.

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
    refs = tuple(adapters) or adapter_refs(artifact.manifest.recipe.frontend.adapter)
    if gone := [str(ref.path) for ref in refs if why_absent(expand(ref.path))]:
        raise UsageError(
            f"its adapter {', '.join(gone)} is not there",
            where=str(artifact.path),
            next_step="say where it is now with --adapter DIR"
            if artifact.manifest.contract.adapters is None
            else "put it back there: --adapter names one beside the weights of this artifact",
        )
    checkpoint = Checkpoint.open(path, refs, encoder=True)
    if checkpoint.fingerprint(times=False) != artifact.manifest.checkpoint.fingerprint_without_times:
        what, options = "checkpoint", "--checkpoint PATH"
        if refs:
            what, options = "checkpoint and adapter", "--checkpoint PATH and --adapter DIR"
        raise UsageError(
            f"is not the {what} this artifact was made from (or has changed since)",
            where=", ".join(map(str, (path, *(ref.path for ref in refs)))),
            expected=f"the one of {artifact.path}",
            next_step=f"name the right one with {options}, or compile again",
        )
    return checkpoint
