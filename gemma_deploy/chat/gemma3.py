"""Gemma 1 to 3: turns of text and nothing else.

A tool call of theirs has no form of its own: it looks as the prompt asked for, and is text.
"""

from __future__ import annotations

from gemma_deploy.chat.format import ChatFormat

GEMMA3 = ChatFormat(name="gemma3", sign="<start_of_turn>", turn="<start_of_turn>")
