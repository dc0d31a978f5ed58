#!/usr/bin/env bash
# Where Gemma 4 says something before it calls a tool, its chat template closes the turn behind the tool's result, and
# the prompt ends without a turn of the model's.
#
# version   the five revisions of google/gemma-4-E2B-it's chat template that trl 1.16.0 carries (April to July 2026);
#           jinja2 3.1.6.
# expected  {"role": "assistant", "content": "Let me see.", "tool_calls": [...]}, which the OpenAI API allows and the model
#           says, is shown in that order, and with its result and add_generation_prompt the prompt ends where the
#           model goes on: behind <tool_response|>, as it does where `content` is empty.
# seen      The text stands behind the result, the turn is closed, and none is opened: the model goes on behind
#           <turn|>. As a message of its own before the calls the text has its place in the newest revision alone; in
#           the three before it <|tool_call> stands behind a closed turn then.
#
# Output:
#   gemma4_v2   text and call: ...<tool_response|>Let me see.<turn|>\n   two messages: ...Let me see.<turn|>\n<|turn>model\n<|tool_call>...
#   gemma4_v3   text and call: ...<tool_response|>Let me see.<turn|>\n   two messages: ...Let me see.<turn|>\n<|tool_call>...
#   gemma4      text and call: ...<tool_response|>Let me see.<turn|>\n   two messages: ...Let me see.<turn|>\n<|tool_call>...
#   gemma4_v4   text and call: ...<tool_response|>Let me see.<turn|>\n   two messages: ...Let me see.<turn|>\n<|tool_call>...
#   gemma4_v5   text and call: ...<tool_response|>Let me see.<turn|>\n   two messages: ...Let me see.<|tool_call>...
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-cache-dir --disable-pip-version-check --no-deps \
    trl==1.16.0 jinja2==3.1.6 markupsafe==3.0.3

cd "$work"
HOME="$work" "$work/venv/bin/python" - <<'PYTHON'
import sys
from pathlib import Path

import jinja2

folder = next(Path(sys.prefix).glob("lib/python3*/site-packages/trl/chat_templates"))
CALL = {"id": "a", "type": "function", "function": {"name": "look", "arguments": {}}}
TEXT = "Let me see."
user = {"role": "user", "content": "What is there?"}
both = {"role": "assistant", "content": TEXT, "tool_calls": [CALL]}
silent = {**both, "content": ""}
result = {"role": "tool", "tool_call_id": "a", "name": "look", "content": "a cat"}
holds = True
for revision in ("gemma4_v2", "gemma4_v3", "gemma4", "gemma4_v4", "gemma4_v5"):
    source = (folder / f"{revision}.jinja").read_text()
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(source)

    def prompt(*messages):
        if "tool_call_id" not in source:  # the first revision has results in the message of the calls
            messages = (*messages[:-2], {**messages[-2], "tool_responses": [{"name": "look", "response": "a cat"}]})
        return template.render(messages=messages, add_generation_prompt=True, bos_token="<bos>")

    seen, without = prompt(user, both, result), prompt(user, silent, result)
    apart = prompt(user, {"role": "assistant", "content": TEXT}, silent, result)
    between = apart.partition(TEXT)[2].partition("<|tool_call>")[0]
    tail = "..." + seen[seen.index("<tool_response|>"):]
    print(f"{revision:<12}text and call: {tail!r}   two messages: {'...' + TEXT + between + '<|tool_call>...'!r}".replace("'", ""))
    holds &= without.endswith("<tool_response|>") and seen.endswith(f"<tool_response|>{TEXT}<turn|>\n")
    ends = {"gemma4_v2": "<turn|>\n<|turn>model\n", "gemma4_v5": ""}
    holds &= between == ends.get(revision, "<turn|>\n")
if not holds:
    sys.exit("CHANGED: the turn stays open, or text before a call has another place")
PYTHON
