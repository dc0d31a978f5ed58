"""Gemma 4: thinking in a channel, and tool calls.

    <|channel>thought
    ...
    <channel|><|tool_call>call:get_weather{city:<|"|>Oslo<|"|>,days:2}<tool_call|>

Behind its calls the model says `<|tool_response>`, where the results are to be filled in:
https://ai.google.dev/gemma/docs/core/prompt-formatting-gemma4
"""

from __future__ import annotations

from gemma_deploy.chat.format import CallMarks, Channel, ChatFormat

GEMMA4 = ChatFormat(
    name="gemma4",
    sign="<|turn>",
    turn="<|turn>",
    stops=("<|tool_response>",),
    channel=Channel("<|channel>", "<channel|>", name="thought"),
    call=CallMarks("<|tool_call>", "<tool_call|>", quote='<|"|>'),
)
