"""What every runtime refuses before it computes: tokens that the model does not have."""

from __future__ import annotations

from collections.abc import Sequence

from gemma_deploy.errors import UsageError

REBUILD = "compile the artifact again, or copy it whole"


def check_tokens(ids: Sequence[int], vocab_size: int, where: str) -> None:
    """Refuse ids that are no tokens of a model: runtimes read beside the table, or crash.

    Raises:
        UsageError: naming one of them.
    """
    low, high = min(ids), max(ids)
    if low < 0 or high >= vocab_size:
        raise UsageError(
            f"token {low if low < 0 else high} is not in the vocabulary",
            where=where,
            expected=f"0 to {vocab_size - 1}",
            next_step="use the tokenizer of this artifact",
        )
