"""Which tensors of a checkpoint a stage has, and what they are called there: strict in both directions."""

from __future__ import annotations

from collections.abc import Iterable

from gemma_deploy.checkpoint import ModelConfig, expected_tensors
from gemma_deploy.errors import CheckpointError
from gemma_deploy.names import EMBEDDING_WEIGHT, HEAD_WEIGHT, LAYERS
from gemma_deploy.partition.spans import Span, shares_of


class ParameterMapper:
    """Filters and renumbers: layer `start + k` of the model is layer k of the stage.

    Args:
        config: of the whole model.
        stage: a stage of it.

    Attributes:
        sources: name in the stage -> name in the checkpoint, in model order. The tied table is `lm_head.weight` of a
            stage that has no embedding.
        shares: by names in the checkpoint, tensors of which the stage has what belongs to its layers.
        shapes: by names in the checkpoint, of what the stage has.
    """

    def __init__(self, config: ModelConfig, span: Span) -> None:
        self.span, self.tied = span, config.tie_word_embeddings
        self.shares = shares_of(config, span)
        self.shapes = expected_tensors(config)
        self.shapes |= {name: share.of_shape(self.shapes[name]) for name, share in self.shares.items()}
        self.sources = {local: name for name in self.shapes if (local := self.local(name)) is not None}

    def local(self, name: str) -> str | None:
        """A checkpoint tensor's name in the stage, None when the stage does not have it."""
        if not self.span.holds(name, self.tied, own_vectors=True):
            return None
        if name.startswith(LAYERS):
            number, _, rest = name.removeprefix(LAYERS).partition(".")
            return f"{LAYERS}{int(number) - self.span.start}.{rest}"
        return HEAD_WEIGHT if name == EMBEDDING_WEIGHT and not self.span.embeds else name

    def check(self, parameters: Iterable[str], where: str) -> None:
        """See that a stage's module or file has exactly the tensors it must have.

        Raises:
            CheckpointError: naming everything that is missing or left over.
        """
        found = set(parameters)
        problems = [f"missing: {name}" for name in self.sources if name not in found]
        problems += [f"left over: {name}" for name in sorted(found - set(self.sources))]
        if problems:
            raise CheckpointError(
                f"{len(problems)} tensor(s) do not fit the part {self.span.name} "
                f"(layers {self.span.start} to {self.span.stop - 1})",
                where=where,
                problems=problems,
                next_step="split the checkpoint again with `gemma-deploy split`",
            )

    def check_shape(self, local: str, shape: tuple[int, ...], where: str) -> None:
        """See that a tensor of the stage has the shape that the config says.

        Raises:
            CheckpointError: it has another.
        """
        expected = self.shapes[self.sources[local]]
        if shape != expected:
            raise CheckpointError(
                f"{local} is {list(shape)}, expected {list(expected)}",
                where=where,
                next_step="split the checkpoint again with `gemma-deploy split`",
            )
