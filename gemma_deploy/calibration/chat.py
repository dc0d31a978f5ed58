"""Conversations as the text an instruction-tuned model was trained on: the checkpoint's own chat template."""

from __future__ import annotations

from gemma_deploy.calibration.sources.reading import Turns
from gemma_deploy.errors import CheckpointError
from gemma_deploy.text import ChatTemplate, ChatTemplateError
from gemma_deploy.text.files import TEMPLATE
from gemma_deploy.text.template import REFUSES


class Chat:
    """Renders whole conversations of a data set.

    Args:
        template: of the checkpoint, with its special tokens.
    """

    joint = ""  # a turn ends in a line break, and the next conversation begins as the next turn would

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template

    def render(self, turns: Turns) -> str:
        """A whole conversation, BOS spelled at its front where the template does so.

        Raises:
            CheckpointError: the template refuses it.
        """
        try:
            return self._template.render(turns, add_generation_prompt=False)
        except ChatTemplateError as error:
            raise CheckpointError(
                f"the chat template refuses a user's and a model's turn: {error.what.removeprefix(REFUSES)}",
                where=error.where,
                expected="a template for conversations of `user` and `assistant`",
                next_step=f"copy {TEMPLATE} from where the weights came from, or remove it to use Alpaca's own prompt",
            ) from error
