"""What a model says, taken apart: text, thinking and tool calls, in every form that a Gemma speaks.

A format is a file with its markers (`gemma4.py`) and a row in `FORMATS`; one parser reads all of them.
"""

from gemma_deploy.chat.choosing import FORMATS, PLAIN, choose_format, format_named, known_format
from gemma_deploy.chat.events import ChatEvent, Text, Thinking, ToolCall, joined
from gemma_deploy.chat.format import CallMarks, Channel, ChatFormat
from gemma_deploy.chat.functiongemma import FUNCTION_GEMMA
from gemma_deploy.chat.gemma3 import GEMMA3
from gemma_deploy.chat.gemma4 import GEMMA4
from gemma_deploy.chat.parser import ChatParser, parse

__all__ = [
    "FORMATS",
    "FUNCTION_GEMMA",
    "GEMMA3",
    "GEMMA4",
    "PLAIN",
    "CallMarks",
    "Channel",
    "ChatEvent",
    "ChatFormat",
    "ChatParser",
    "Text",
    "Thinking",
    "ToolCall",
    "choose_format",
    "format_named",
    "joined",
    "known_format",
    "parse",
]
