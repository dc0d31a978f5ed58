"""What can be known about a checkpoint's tokenizer and chat template before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.errors import CheckpointError
from gemma_deploy.text.stops import stop_tokens
from gemma_deploy.text.tokenizer import Tokenizer, has_tokenizer


@dataclass(frozen=True)
class TextCheck:
    """What was found.

    Args:
        stop_ids: tokens that end a text, see stops.py.
        notes: what the user should know: a template that cannot be used, a turn that nothing ends.
    """

    stop_ids: tuple[int, ...]
    notes: tuple[str, ...] = ()


def check_text(checkpoint: Checkpoint) -> TextCheck:
    """Build the tokenizer, render a trial conversation, and collect the stop tokens.

    Takes a second and some 500 MiB for a vocabulary of 262,144; give the memory back afterwards.

    Raises:
        CheckpointError: a file of the tokenizer is damaged. What a GGUF file holds is damaged for text alone: a note.
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
    found = stop_tokens(tokenizer, declared)
    return TextCheck(found.ids, found.notes)


def with_stops(checkpoint: Checkpoint, check: TextCheck) -> Checkpoint:
    """The checkpoint with all stop tokens in its config."""
    return replace(checkpoint, config=replace(checkpoint.config, eos_token_ids=check.stop_ids))
