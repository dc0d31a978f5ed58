"""Text in and out: tokenizer, chat template, stop tokens, streamed text. Imports neither torch nor transformers."""

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
