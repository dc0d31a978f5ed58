"""What is evaluated: an artifact in strict sessions, or a checkpoint in transformers, float32, eager attention.

Both turn prompts into final hidden states, and hidden states into logits a few positions at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from gemma_deploy import extras
from gemma_deploy.artifact.adapters import beside_of
from gemma_deploy.artifact.check import byte_problems, open_whole, refuse
from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.artifact.origin import checkpoint_of
from gemma_deploy.backends import backend_of
from gemma_deploy.backends.base import BesideAdapter
from gemma_deploy.checkpoint import AdapterRef, Checkpoint
from gemma_deploy.engine import open_engine
from gemma_deploy.errors import CheckpointError, UsageError
from gemma_deploy.machine import give_memory_back
from gemma_deploy.names import CONFIG, MANIFEST, PARAMETER_FILES
from gemma_deploy.parity.cases import Case
from gemma_deploy.parity.sources import LogitSource
from gemma_deploy.reading import exists, expand
from gemma_deploy.text import Tokenizer

TOKENS_AT_ONCE = 2048  # positions that go through the layers together: a matrix is read once for all of them
LOGITS_BYTES = 128 << 20  # logits of one model; a larger block means fewer passes over the table
Tokens = tuple[int, ...]
STRICT = "strict"


@dataclass(frozen=True)
class Evaluated:
    """Something to evaluate.

    Args:
        path: of the artifact or checkpoint, as it was named.
        kind: what it is; scheme: how its weights are stored ("fp32" of a checkpoint: what it is computed in).
        batch: rows that run together, no fewer; width: positions a row costs, None for as many as it has.
        longest: tokens of a prompt at most.
        embed_scale: rounding of the embedding scale, see docs/gemma-facts.md.
        artifact, checkpoint: whichever it is.
        kernels: of an artifact, what computes it.
        beside: an adapter that is computed beside the weights; of a checkpoint by PEFT.
    """

    path: Path
    kind: Literal["artifact", "checkpoint"]
    scheme: str
    batch: int
    width: int | None
    longest: int
    vocab_size: int
    embed_scale: str
    source: LogitSource
    artifact: Artifact | None = None
    checkpoint: Checkpoint | None = None
    kernels: str = STRICT
    beside: BesideAdapter | None = None

    @property
    def title(self) -> str:
        """The name that tables and reports show."""
        how = f"{self.scheme}, {self.kernels}"
        if self.kind == "checkpoint":
            how = f"{'transformers' if self.beside is None else 'peft'}, float32"
        added = [one.adapter.path for one in self.checkpoint.adapters] if self.checkpoint else []
        added += [] if self.beside is None else [self.beside.directory]
        return "".join((str(self.path), *(f" + {path}" for path in added), f" ({how})"))

    def to_json(self) -> dict[str, str]:
        """What identifies the model in eval.json."""
        if self.artifact is not None:
            identity = {"key": self.artifact.manifest.key, "kernels": self.kernels}
        else:
            assert self.checkpoint is not None
            identity = {"fingerprint": self.checkpoint.fingerprint(times=False)}
        if self.beside is not None:
            identity |= {"adapter": self.beside.kept.name, "adapter_fingerprint": self.beside.kept.record.fingerprint}
        return {"path": str(self.path), "kind": self.kind, "scheme": self.scheme, **identity}

    def encoder(self) -> tuple[Callable[[str], list[int]], int]:
        """Text -> ids without BOS, and the id of BOS.

        Raises:
            ArtifactError, CheckpointError: there is no tokenizer, or the model has no BOS.
        """
        if self.artifact is not None:
            tokenizer = Tokenizer(self.path)
            return (lambda text: without_bos(tokenizer.bos_id, tokenizer.encode(text))), tokenizer.bos_id
        assert self.checkpoint is not None
        bos = self.checkpoint.config.bos_token_id
        if bos is None:
            raise CheckpointError(
                "bos_token_id is null, but every Gemma sequence begins with BOS",
                where=str(self.path / CONFIG),
                next_step="set bos_token_id in config.json (2 in every Gemma)",
            )
        loaded = Tokenizer.of(self.checkpoint)
        return (lambda text: without_bos(bos, loaded.encode_more(text))), bos

    def features(self, prompts: Sequence[Tokens]) -> list[np.ndarray]:
        """Final hidden states [tokens, H] of every prompt; a last batch that is not full is filled and cut again."""
        groups = [list(prompts[at : at + self.batch]) for at in range(0, len(prompts), self.batch)]
        groups[-1] += [groups[-1][-1]] * (self.batch - len(groups[-1]))
        found = self.source.run([Case("text", tuple(group), ((),) * self.batch) for group in groups])
        give_memory_back()
        return [row for case in found for row in case][: len(prompts)]


def is_artifact(path: Path) -> bool:
    """Whether a directory is one, finished or not."""
    return any(exists(path / name) for name in (MANIFEST, *PARAMETER_FILES))


def open_model(
    spec: str, embed_scale: str = "exact", kernels: str | None = None, *, adapters: Sequence[AdapterRef] = ()
) -> Evaluated:
    """Open an artifact, a checkpoint's directory, a .gguf file or `demo`.

    Args:
        adapters: added to a checkpoint; one that is computed beside the weights of an artifact that takes adapters;
            those that were merged into an artifact are there already.
        embed_scale: of a checkpoint; an artifact has its own.
        kernels: of an artifact, one that its back end names; None for the first of them.

    Raises:
        ArtifactError, CheckpointError: it is not there, incomplete or damaged. UsageError: it takes no adapter.
    """
    path = expand(spec)
    if is_artifact(path):
        return _open_artifact(path, kernels, adapters)
    return _of_checkpoint(Checkpoint.open(spec, adapters), embed_scale)


def reference_of(model: Evaluated, checkpoint: str | None, adapters: Sequence[AdapterRef] = ()) -> Evaluated:
    """The checkpoint an artifact was made from, in transformers, float32; with its adapter beside it in PEFT.

    Args:
        adapters: where those are now that were merged into the artifact.

    Raises:
        UsageError: it is not there any more, or has changed since.
    """
    assert model.artifact is not None
    if model.beside is None:
        return _of_checkpoint(checkpoint_of(model.artifact, checkpoint, adapters), model.embed_scale)
    extras.require("adapters", what="an adapter beside the checkpoint")
    return _of_checkpoint(checkpoint_of(model.artifact, checkpoint), model.embed_scale, model.beside)


def refuse_other_vocabularies(model: Evaluated, other: Evaluated, text: str) -> None:
    """Two models are compared on the same tokens, so both have to make the same of a text.

    Raises:
        UsageError: they do not.
    """
    if model.vocab_size != other.vocab_size:
        found = f"{model.vocab_size} and {other.vocab_size} tokens"
    else:
        made = []
        for one in (model, other):
            encode, bos = one.encoder()
            made.append((bos, encode(text)))
            give_memory_back()  # 200 MiB of a vocabulary of 262,144
        if made[0] == made[1]:
            return
        found = "the same text becomes other tokens"
    raise UsageError(
        f"the two models have different vocabularies: {found}",
        where=f"{model.path}, {other.path}",
        expected="two forms of one model, or of models with one tokenizer",
        next_step="evaluate each alone (--against none) and compare what does not depend on tokens",
    )


def in_chunks(models: Sequence[Evaluated], prompts: Sequence[Tokens]) -> Iterator[tuple[int, list[list[np.ndarray]]]]:
    """Run all models over prompts, some at a time: (index of the first, features of each model).

    Args:
        prompts: none longer than the one before it.
    """
    at = 0
    while at < len(prompts):
        count = 1
        for model in models:
            cost = model.batch * max(model.width or 0, len(prompts[at]))
            count = max(count, model.batch * (TOKENS_AT_ONCE // cost))
        chunk = prompts[at : at + count]
        yield at, [model.features(chunk) for model in models]
        at += len(chunk)


def positions_at_once(vocab_size: int) -> int:
    """How many positions' logits are made together."""
    return max(1, LOGITS_BYTES // (4 * vocab_size))


def without_bos(bos: int, ids: Sequence[int]) -> list[int]:
    """A text may spell BOS; a window has one, at its front."""
    return [token for token in ids if token != bos]


def _open_artifact(path: Path, kernels: str | None, adapters: Sequence[AdapterRef]) -> Evaluated:
    artifact = open_whole(path)
    directory, beside = beside_of(artifact, adapters), None
    engine = open_engine(artifact)
    if directory is None:
        source = engine.source(kernels)
    else:
        kept = backend_of(artifact.manifest).keep_adapter(artifact, directory)
        beside, source = BesideAdapter(kept, directory), engine.source(kernels, engine.load_adapter(kept.name))
    refuse(artifact, byte_problems(artifact))  # the figures of a damaged one would be believed
    contract = artifact.manifest.contract
    dynamic = contract.dynamic
    return Evaluated(
        path,
        "artifact",
        artifact.manifest.scheme,
        1 if dynamic else contract.batch,
        None if dynamic else contract.prefill,
        engine.limits.prompt if dynamic else contract.prefill,
        contract.vocab_size,
        artifact.manifest.embed_scale,
        source,
        artifact=artifact,
        kernels=kernels or engine.kernel_names[0],
        beside=beside,
    )


def _of_checkpoint(checkpoint: Checkpoint, embed_scale: str, beside: BesideAdapter | None = None) -> Evaluated:
    extras.require("build", what="a checkpoint in transformers")
    from gemma_deploy.parity.adapted import PeftSource
    from gemma_deploy.parity.reference import TorchSource

    config = checkpoint.config
    if beside is None:
        source = TorchSource(checkpoint, "hf", embed_scale=embed_scale)
    else:
        adapters = [(beside.directory, 1.0)]
        source = PeftSource(checkpoint, adapters, vocab_size=config.vocab_size, embed_scale=embed_scale)
    return Evaluated(
        checkpoint.path,
        "checkpoint",
        "fp32",
        1,
        None,
        config.max_position_embeddings,
        config.vocab_size,
        embed_scale,
        source,
        checkpoint=checkpoint,
        beside=beside,
    )
