#!/usr/bin/env bash
# transformers' parse_response, told how Gemma 4 answers, loses what the model says before a tool call, and raises on a
# text inside a call that holds the marker of its end.
#
# version   transformers 5.23.0; the response template of Gemma 4 that trl 1.16.0 has.
# expected  Of "Let me see.<|tool_call>call:look{}<tool_call|>Wait." the content is both texts, or an error; a text between
#           <|"|> may hold anything, as Google's page on the format says.
# seen      A field that occurs twice keeps the last one, without a word: the content is "Wait." alone. The end of a
#           call is looked for without regard to texts, so that a text with <tool_call|> in it raises ValueError, and so do
#           None, which four of the five published chat templates show the model for null, and a name with a colon.
#
# Output:
#   text before and behind a call: content 'Wait.', calls ['look']
#   a text that holds the marker: ValueError
#   None for null: ValueError
#   a name with a colon: ValueError
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-cache-dir --disable-pip-version-check transformers==5.23.0
"$work/venv/bin/pip" install --quiet --no-cache-dir --disable-pip-version-check --no-deps trl==1.16.0

cd "$work"
HOME="$work" HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PYTHON'
import ast
import sys
from pathlib import Path

from transformers.utils.chat_parsing import parse_response

file = next(Path(sys.prefix).glob("lib/python3*/site-packages/trl/chat_template_utils.py"))
template = next(
    ast.literal_eval(node.value)
    for node in ast.parse(file.read_text()).body
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "gemma4_template"
)
found = parse_response("Let me see.<|tool_call>call:look{}<tool_call|>Wait.", template, prefix="")
calls = [one["function"]["name"] for one in found["tool_calls"]]
print(f"text before and behind a call: content {found['content']!r}, calls {calls}")
holds = found["content"] == "Wait." and calls == ["look"]
for name, call in {
    "a text that holds the marker": 'look{at:<|"|>print("<tool_call|>")<|"|>}',
    "None for null": "look{at:None}",
    "a name with a colon": "mcp:look{at:1}",
}.items():
    try:
        seen = repr(parse_response(f"<|tool_call>call:{call}<tool_call|>", template, prefix=""))
        holds = False
    except ValueError as error:
        seen = type(error).__name__
    print(f"{name}: {seen}")
if not holds:
    sys.exit("CHANGED: all of the text is kept, or those calls are read")
PYTHON
