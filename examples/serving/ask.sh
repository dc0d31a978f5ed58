#!/bin/sh
# What a server can be asked, with curl:
#     gemma-deploy serve workspace/NAME
#     sh examples/serving/ask.sh http://127.0.0.1:9000 [FILE-WITH-A-KEY]
set -eu
[ $# -ge 1 ] || { echo "Use: sh examples/serving/ask.sh http://127.0.0.1:9000 [FILE-WITH-A-KEY]" >&2; exit 2; }
url=$1
key=none
[ $# -lt 2 ] || key=$(head -n 1 "$2")

ask() { # PATH [curl's options]: the key comes from standard input, so that no list of processes shows it
    path=$1
    shift
    echo "== $path"
    printf 'header = "Authorization: Bearer %s"\n' "$key" |
        curl --config - --silent --show-error --fail-with-body --no-buffer "$@" "$url$path"
    echo
}

ask /health
ask /v1/models
ask /v1/completions --json '{"prompt": "The list of", "max_tokens": 12, "temperature": 0}'
ask /v1/completions --json '{"prompt": "The list of", "max_tokens": 0, "echo": true, "logprobs": 1}'
ask /tokenize --json '{"prompt": "The list of"}'
# From here on a model that was taught to talk.
ask /v1/chat/completions --json '{
  "messages": [{"role": "user", "content": "Name a colour."}], "max_tokens": 12, "stream": true,
  "stream_options": {"include_usage": true}}'
ask /v1/chat/completions --json '{
  "messages": [{"role": "user", "content": "Name a colour."}],
  "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": {
    "type": "object", "properties": {"colour": {"enum": ["red", "green", "blue"]}}, "required": ["colour"],
    "additionalProperties": false}}}}'
ask /v1/responses --json '{"input": "Name a colour.", "max_output_tokens": 12}'
