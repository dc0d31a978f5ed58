"""Text in and out: tokenizer, chat template, stop tokens, streamed text. Imports neither torch nor transformers."""

from typing import TYPE_CHECKING

from gemma_deploy.offering import offering

if TYPE_CHECKING:
    from gemma_deploy.text.check import TextCheck, check_text, with_stops
    from gemma_deploy.text.stop_strings import StopStrings
    from gemma_deploy.text.stops import Stops, end_of_turn, stop_tokens, unended
    from gemma_deploy.text.stream import TextStream
    from gemma_deploy.text.template import ChatTemplate, ChatTemplateError
    from gemma_deploy.text.tokenizer import Tokenizer, has_tokenizer, template_of

__all__ = [
    "ChatTemplate",
    "ChatTemplateError",
    "StopStrings",
    "Stops",
    "TextCheck",
    "TextStream",
    "Tokenizer",
    "check_text",
    "end_of_turn",
    "has_tokenizer",
    "stop_tokens",
    "template_of",
    "unended",
    "with_stops",
]
__getattr__ = offering(
    __name__,
    {
        "ChatTemplate": "gemma_deploy.text.template",
        "ChatTemplateError": "gemma_deploy.text.template",
        "StopStrings": "gemma_deploy.text.stop_strings",
        "Stops": "gemma_deploy.text.stops",
        "TextCheck": "gemma_deploy.text.check",
        "TextStream": "gemma_deploy.text.stream",
        "Tokenizer": "gemma_deploy.text.tokenizer",
        "check_text": "gemma_deploy.text.check",
        "end_of_turn": "gemma_deploy.text.stops",
        "has_tokenizer": "gemma_deploy.text.tokenizer",
        "stop_tokens": "gemma_deploy.text.stops",
        "template_of": "gemma_deploy.text.tokenizer",
        "unended": "gemma_deploy.text.stops",
        "with_stops": "gemma_deploy.text.check",
    },
)
