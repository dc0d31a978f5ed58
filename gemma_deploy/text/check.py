"""What can be known about a checkpoint's tokenizer and chat template before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from gemma_deploy.errors import CheckpointError
from gemma_deploy.text.stops import stop_tokens
from gemma_deploy.text.tokenizer import Tokenizer, has_tokenizer

if TYPE_CHECKING:
    from gemma_deploy.checkpoint import Checkpoint


@dataclass(frozen=True)
class TextCheck:
    """What was found.

    Args:
        stop_ids: tokens that end a text, see stops.py.
        notes: what the user should know: a template that cannot be used, a turn that nothing ends.
        chat_format: name of the form that the model's replies have (`gemma_deploy/chat`); None of one that has no chat
            template.
    """

    stop_ids: tuple[int, ...]
    notes: tuple[str, ...] = ()
    chat_format: str | None = None


def check_text(checkpoint: Checkpoint) -> TextCheck:
    """Build the tokenizer, render a trial conversation, and collect the stop tokens.

    Takes a second and some 500 MiB for a vocabulary of 262,144; give the memory back afterwards.

    Raises:
        CheckpointError: a file of the tokenizer is damaged, or an adapter's has tokens that the model lacks. What a
            GGUF file holds is damaged for text alone: a note.
    """
    declared = checkpoint.config.eos_token_ids
    if not has_tokenizer(checkpoint):
        return TextCheck(declared)
    try:
        tokenizer = Tokenizer.of(checkpoint)
    except CheckpointError as error:
        if checkpoint.format != "gguf" or checkpoint.tokenizer_files():
            raise
        return TextCheck(declared, (f"the tokenizer inside cannot be used: {error.what}",))
    if any(one.adapter.path == tokenizer.path for one in checkpoint.adapters):
        _refuse_more_tokens(checkpoint, tokenizer)
    found, form = stop_tokens(tokenizer, declared), tokenizer.chat_format()
    return TextCheck(found.ids, found.notes, form.name if form else None)


def _refuse_more_tokens(checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    """Refuse tokens that were added for an adapter whose larger table was not saved with it."""
    size = checkpoint.config.vocab_size
    outside = {number: str(tokenizer.backend.id_to_token(number)) for number in tokenizer.added_ids if number >= size}
    if outside and has_tokenizer(own := replace(checkpoint, adapters=())):  # every Gemma 3 has one of its own
        before = Tokenizer.of(own)
        outside = {number: name for number, name in outside.items() if before.id_of(name) != number}
    if outside:
        raise CheckpointError(
            f"has tokens that the model lacks: {', '.join(map(repr, list(outside.values())[:5]))}",
            where=str(tokenizer.path),
            expected=f"at most the {size} tokens of table and adapter",
            next_step="save the larger table with the adapter (modules_to_save, or save_embedding_layers=True)",
        )


def with_stops(checkpoint: Checkpoint, check: TextCheck) -> Checkpoint:
    """The checkpoint with all stop tokens in its config."""
    return replace(checkpoint, config=replace(checkpoint.config, eos_token_ids=check.stop_ids))
