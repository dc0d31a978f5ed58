"""The one way to open an artifact in order to run it: `open_engine`; of an encoder, `open_embedder`."""

from __future__ import annotations

from pathlib import Path

from gemma_deploy.artifact.check import open_whole
from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.backends import backend_of
from gemma_deploy.errors import ArtifactError, UsageError
from gemma_deploy.runtime.embedding import Embedder
from gemma_deploy.runtime.engine import Engine, Limits, Session
from gemma_deploy.text import Tokenizer

__all__ = ["Embedder", "Engine", "Limits", "Session", "open_embedder", "open_engine"]


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
        UsageError: it cannot be run like this here, or makes vectors and no text.
    """
    opened = artifact if isinstance(artifact, Artifact) else open_whole(artifact, hashes=True)
    refuse_encoder(opened)
    return backend_of(opened.manifest).engine(opened, threads=threads, strict=strict, one_reply=one_reply)


def refuse_encoder(artifact: Artifact) -> None:
    """Refuse what makes no text.

    Raises:
        UsageError: it is an encoder.
    """
    if artifact.manifest.model.sentence is not None:
        raise UsageError(
            "this artifact is an encoder: it makes vectors of texts, and no text of tokens",
            where=str(artifact.path),
            expected="an artifact of a model that generates text",
            next_step=f"`gemma-deploy embed {artifact.path} -p TEXT`, or `open_embedder` from Python",
        )


def open_embedder(artifact: Artifact | str | Path, *, threads: int = 0, strict: bool = False) -> Embedder:
    """Open the artifact of an encoder. Imports no torch.

    Args:
        artifact, threads: see `open_engine`; strict: compute exactly what the graph says, slowly.

    Raises:
        ArtifactError: it is not there, not finished, or damaged. UsageError: it generates text.
    """
    opened = artifact if isinstance(artifact, Artifact) else open_whole(artifact, hashes=True)
    head = opened.manifest.model.sentence
    if head is None:
        raise UsageError(
            "this artifact generates text: it makes no vectors",
            where=str(opened.path),
            expected="an artifact of an encoder, such as EmbeddingGemma",
            next_step=f"`gemma-deploy run {opened.path} -p TEXT` generates, or compile an encoder",
        )
    graph = backend_of(opened.manifest).encoder(opened, threads=threads, strict=strict)
    if graph.dimensions != head.dimensions:
        raise ArtifactError(
            f"says vectors of {head.dimensions} channels, and its graph gives {graph.dimensions}",
            where=str(opened.path),
            next_step="copy the artifact again, or compile the recipe again with --force",
        )
    return Embedder(graph, Tokenizer(opened.path), head, path=opened.path)
