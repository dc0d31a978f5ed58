"""What stands around the layers of a drafter, which guesses for a larger model and reads its keys and values."""

from __future__ import annotations

from dataclasses import dataclass

PRE_PROJECTION, POST_PROJECTION = "pre_projection.weight", "post_projection.weight"
CENTROIDS, TOKEN_ORDERING = "masked_embedding.centroids.weight", "masked_embedding.token_ordering"


@dataclass(frozen=True)
class Drafting:
    """How a drafter is joined to the model it guesses for.

    Args:
        backbone: hidden size of that model.
        centroids: groups of as many tokens each, of which a guess looks at the `chosen` likeliest; 0: at all tokens.
    """

    backbone: int
    centroids: int = 0
    chosen: int = 0

    def tensors(self, hidden_size: int, vocab_size: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes beside those of layers, table and norm.

        Args:
            hidden_size: the drafter's own.
        """
        found: dict[str, tuple[int, ...]] = {
            PRE_PROJECTION: (hidden_size, 2 * self.backbone),
            POST_PROJECTION: (self.backbone, hidden_size),
        }
        if self.centroids:
            found |= {CENTROIDS: (self.centroids, hidden_size), TOKEN_ORDERING: (vocab_size,)}
        return found
