"""What a token has to read, and what this machine's memory can deliver.

Decoding one sequence reads every weight once a token, of experts those that it is given: bytes a token x tokens a
second / bandwidth is the share that is used of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

from gemma_deploy import child
from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.artifact.weights import config_of
from gemma_deploy.errors import DeployError
from gemma_deploy.names import PER_LAYER_TABLE

if TYPE_CHECKING:
    from gemma_deploy.checkpoint import ModelConfig

ROTARY, TABLE = "model.rotary_emb.", "model.embed_tokens."
BANDWIDTH = """
import sys, time
from concurrent.futures import ThreadPoolExecutor
import numpy as np
threads = int(sys.argv[1])
x = np.ones(1 << 28, np.float32)
parts, pool = np.array_split(x, threads), ThreadPoolExecutor(threads)
def once():
    started = time.perf_counter(); list(pool.map(np.max, parts)); return x.nbytes / (time.perf_counter() - started)
print(max(once() for _ in range(12)))
"""


def bandwidth_bytes_s(threads: int) -> float:
    """Bytes that `threads` threads read in a second: the best of 12 looks for the largest of 1 GiB of float32.

    Measured in a process of its own, with NumPy.

    Raises:
        DeployError: the process ended without an answer.
    """
    done = child.run("-c", BANDWIDTH, str(threads), capture_output=True, text=True)
    if done.returncode:
        raise DeployError(
            "the memory bandwidth could not be measured",
            problems=done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"],
            next_step="free 1.5 GiB of memory and try again",
        )
    return float(done.stdout)


def weight_bytes(artifact: Artifact, rows: int = 1) -> int:
    """Bytes of parameters that decoding a token has to read: codes and scales as the file has them.

    Every tensor but those of which it reads a row (rotary tables, the table of per-layer vectors); of experts those
    that tokens of `rows` sequences are given, which may all be other ones; and the token table only as LM head, so not
    at all where the head is a tensor of its own. Of a screened head the high half of every code, and the low halves of
    one sequence's candidates.

    Raises:
        CheckpointError: the artifact's config.json is missing or damaged.
    """
    manifest = artifact.manifest
    tied, candidates = manifest.model.tie_word_embeddings, manifest.contract.candidates
    return bytes_read(manifest.table.rows, config_of(artifact), rows=rows, candidates=candidates, tied=tied)


class Stored(Protocol):
    """A tensor in a parameter file, or one that will be in it."""

    @property
    def name(self) -> str:
        """Its path in the model."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As it lies in the file."""

    @property
    def nbytes(self) -> int:
        """In the file."""


def experts_read(config: ModelConfig, rows: int) -> dict[str, tuple[int, int]]:
    """Stacks of experts, by their paths: how many experts tokens of `rows` sequences are given, and how many it has."""
    return {
        f"{layer.prefix}{stack}": (min(layer.experts.count, rows * layer.experts.chosen), layer.experts.count)
        for layer in config.layers
        if layer.experts is not None
        for stack in layer.experts.stacks(layer.hidden_size)
    }


def bytes_read(
    tensors: Iterable[Stored],
    config: ModelConfig,
    *,
    rows: int = 1,
    candidates: int | None = None,
    tied: bool | None = None,
) -> int:
    """As `weight_bytes`, of tensors of a model that may not be written yet.

    Args:
        candidates: of a screened head; None for one of whole rows.
        tied: the LM head is the token table; None: as the config says.
    """
    skipped = [ROTARY, f"{PER_LAYER_TABLE}."]
    if not (config.tie_word_embeddings if tied is None else tied):
        skipped.append(TABLE)
    given, read = experts_read(config, rows), 0
    for row in tensors:
        if candidates is not None and row.name == config.head_weight:
            read += row.nbytes // 2 + min(candidates, row.shape[0]) * row.shape[1] // 2
            continue
        if not row.name.startswith(tuple(skipped)):
            chosen, count = given.get(row.name.removesuffix(".scale"), (1, 1))
            read += row.nbytes * chosen // count
    return read


def artifact_bytes(artifact: Artifact) -> int:
    """Bytes of all its files."""
    return sum(file.stat().st_size for file in artifact.path.rglob("*") if file.is_file())
