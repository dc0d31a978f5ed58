"""FunctionGemma: the turns of Gemma 3, and tool calls.

    <start_function_call>call:get_weather{city:<escape>Oslo<escape>,days:2}<end_function_call>

Behind its calls the model says `<start_function_response>`, where the results are to be filled in:
https://ai.google.dev/gemma/docs/functiongemma/formatting-and-best-practices
"""

from __future__ import annotations

from gemma_deploy.chat.format import CallMarks, ChatFormat

FUNCTION_GEMMA = ChatFormat(
    name="functiongemma",
    sign="<start_function_call>",
    turn="<start_of_turn>",
    stops=("<start_function_response>",),
    call=CallMarks("<start_function_call>", "<end_function_call>", quote="<escape>"),
)
