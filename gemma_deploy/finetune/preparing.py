"""Everything about a base, settings and examples that can be told before the model is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.errors import NotBuiltError, UsageError
from gemma_deploy.finetune.data import read_examples
from gemma_deploy.finetune.encoding import Examples, encode_examples, split
from gemma_deploy.finetune.model import targets_of
from gemma_deploy.finetune.settings import FinetuneSettings
from gemma_deploy.text import Tokenizer

if TYPE_CHECKING:
    from gemma_deploy.artifact.weights import ArtifactWeights

LENGTH = 1024  # tokens of an example at most, unless the settings say otherwise


@dataclass(frozen=True)
class Prepared:
    """What a training is made from.

    Args:
        settings: of the run, with the length that is meant; checkpoint: the base; tokenizer: its own.
        train: examples; held_out: for evaluation, or None.
        base: the artifact's weights that it is trained on, or None: the checkpoint's own.
    """

    settings: FinetuneSettings
    checkpoint: Checkpoint
    tokenizer: Tokenizer
    train: Examples
    held_out: Examples | None
    base: ArtifactWeights | None = None


def prepare(settings: FinetuneSettings, checkpoint: Checkpoint, data: str) -> Prepared:
    """Read and tokenize the examples; everything about them that can be wrong is told here."""
    if checkpoint.config.has_experts:
        raise NotBuiltError(
            "training a model with experts (Gemma 4 26B-A4B) is not built in this version",
            where=str(checkpoint.path),
            expected="a model without experts",
            next_step="train another model, or this one with TRL",
        )
    context = checkpoint.config.max_position_embeddings
    length = settings.max_length or min(LENGTH, context)
    if length > context:
        raise UsageError(
            f"{length} tokens are more than the model was made for, which is {context}",
            where="finetune.max_length (--max-length)",
            expected=f"at most {context}",
            next_step="lower it",
        )
    settings = settings.model_copy(update={"max_length": length})
    if settings.method != "full":
        targets_of(settings, checkpoint)
    base = None if settings.base is None else _base(settings, settings.base, checkpoint)
    tokenizer = Tokenizer.of(checkpoint)

    def encoded(file: str) -> Examples:
        examples = read_examples(file, format=settings.format, field=settings.field)
        return encode_examples(examples, tokenizer, length, where=file, loss=settings.loss, too_long=settings.too_long)

    every = encoded(data)
    held_out: Examples | None
    if settings.eval_data is not None:
        train_on, held_out = every, encoded(settings.eval_data)
    else:
        train_on, held_out = split(every, settings.validation, int(settings.sft.get("seed", 42)))
    if settings.patience is not None and held_out is None:
        raise UsageError(
            "early stopping needs examples that are held out, and there are none",
            where="finetune.patience (--patience)",
            next_step="give some with --eval-data, or let --validation hold some out",
        )
    return Prepared(settings, checkpoint, tokenizer, train_on, held_out, base)


def _base(settings: FinetuneSettings, artifact: str, checkpoint: Checkpoint) -> ArtifactWeights:
    from gemma_deploy.finetune.codes import open_base

    if settings.method != "lora" or settings.lora.dora:
        raise UsageError(
            f"{'DoRA' if settings.method == 'lora' else settings.method} on the codes of an artifact is not built",
            where="finetune.base (--base)",
            expected="--method lora without DoRA",
            next_step="leave --base out, or train plain LoRA",
        )
    return open_base(artifact, checkpoint, settings.lora.r)
