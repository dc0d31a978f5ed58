"""What an actor asks of its node before anything is computed there: the same artifact, the same program."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gemma_deploy import cluster
from gemma_deploy.artifact.check import open_whole
from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.errors import ArtifactError, DeployError
from gemma_deploy.names import MANIFEST

MODULES = ("gemma_deploy.serve.cluster.replica", "gemma_deploy.serve.cluster.stage")
LIBRARIES = (
    "numpy",
    "onnxruntime",
    "onnxruntime-genai",
    "openvino",
    "llguidance",
    "ray",
)  # on which what is computed depends


@dataclass(frozen=True)
class Wanted:
    """What a node must have.

    Args:
        path: of the artifact, absolute; manifest: sha256 of its manifest, which has those of all its files.
        versions: of the program and its libraries; threads: of an operator.
    """

    path: str
    manifest: str
    versions: Mapping[str, str]
    threads: int


def wanted_of(artifact: Artifact, threads: int) -> Wanted:
    """What other nodes must have of an artifact that is open here."""
    path = artifact.path.absolute()
    return Wanted(str(path), _sha256(path / MANIFEST), versions(), threads)


def versions() -> dict[str, str]:
    """Of this program and its libraries, here."""
    return cluster.versions(MODULES, LIBRARIES)


def node_name() -> str:
    """This node, for people: its host, address and the beginning of its id, by which `ray list nodes` knows it."""
    import ray

    return f"{socket.gethostname()} ({ray.util.get_node_ip_address()}, node {_node_id()[:8]})"


def _node_id() -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())


def here(error: DeployError) -> DeployError:
    """The same, that names this node."""
    name = node_name()
    if not (error.where or "").startswith(name):
        error.where = f"{name}: {error.where}" if error.where else name
    return error


def opened_here(wanted: Wanted) -> Artifact:
    """The artifact on this node.

    Raises:
        DeployError: by the node's name: it has another version of this program, no artifact there, another one, or a
            damaged one.
    """
    node, found = node_name(), versions()
    if found != wanted.versions:
        other = [f"{name} {found.get(name)}" for name in wanted.versions if found.get(name) != wanted.versions[name]]
        raise DeployError(
            f"this Ray node has {', '.join(other)}",
            where=node,
            expected=", ".join(f"{name} {version}" for name, version in wanted.versions.items()),
            next_step="install the same versions on every node",
        )
    where, copy = f"{node}: {wanted.path}", "copy the artifact to the same path on every node"
    if not (Path(wanted.path) / MANIFEST).is_file():
        raise ArtifactError("this Ray node has no artifact there", where=where, next_step=copy)
    if _sha256(Path(wanted.path) / MANIFEST) != wanted.manifest:
        raise ArtifactError("this Ray node has another version of the artifact there", where=where, next_step=copy)
    return open_whole(wanted.path, hashes=True)


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
