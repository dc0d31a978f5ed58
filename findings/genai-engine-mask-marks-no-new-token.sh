#!/usr/bin/env bash
# onnxruntime-genai's Engine gives shorter rows of a batch an attention mask whose last column is 0 while their newest
# token is read.
#
# version   onnxruntime-genai 0.18.0, onnxruntime 1.32.0, onnx 1.23.2, numpy 2.4.6; CPU.
# expected  At a step of one token for each row the last column of attention_mask belongs to that token, as in genai's
#           own Generator and in transformers: it is 1 in every row that has one.
# seen      Engine writes as many ones as a row has tokens side by side from the first column and zeros behind, for
#           prompts (right padding) and for single tokens alike. A graph that learns from the last column whether the
#           new token is real takes those of all rows but the longest for padding; only the number of ones is right.
#           The graph here answers with what its mask holds.
#
# Output:
#   row 0 (7 tokens),  prompt: Engine last column 1, ones 7; Generator alone last column 1, ones 7
#   row 0 (7 tokens), 1 token: Engine last column 1, ones 8; Generator alone last column 1, ones 8
#   row 0 (7 tokens), 1 token: Engine last column 1, ones 9; Generator alone last column 1, ones 9
#   row 0 (7 tokens), 1 token: Engine last column 1, ones 10; Generator alone last column 1, ones 10
#   row 1 (2 tokens),  prompt: Engine last column 0, ones 2; Generator alone last column 1, ones 2
#   row 1 (2 tokens), 1 token: Engine last column 0, ones 3; Generator alone last column 1, ones 3
#   row 1 (2 tokens), 1 token: Engine last column 0, ones 4; Generator alone last column 1, ones 4
#   row 1 (2 tokens), 1 token: Engine last column 0, ones 5; Generator alone last column 1, ones 5
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-cache-dir --disable-pip-version-check \
    onnxruntime-genai==0.18.0 onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6

cd "$work"
HOME="$work" OMP_NUM_THREADS=1 "$work/venv/bin/python" - <<'PYTHON'
import json
import sys

import numpy as np
import onnx
import onnxruntime_genai as og
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper as nh

# A "model" whose greedy token is 32 times the last column of the mask plus the number of ones in it.
VOCAB, PROMPTS, TOKENS = 64, [[5, 6, 7, 8, 9, 10, 11], [5, 6]], 4
nodes = [
    h.make_node("ReduceSum", ["attention_mask", "one"], ["ones"], keepdims=1),
    h.make_node("Gather", ["attention_mask", "last"], ["column"], axis=1),
    h.make_node("Mul", ["column", "half"], ["shifted"]),
    h.make_node("Add", ["shifted", "ones"], ["token"]),
    h.make_node("Shape", ["input_ids"], ["shape"]),
    h.make_node("Expand", ["token", "shape"], ["tokens"]),
    h.make_node("OneHot", ["tokens", "vocab", "values"], ["logits"], axis=-1),
    h.make_node("Cast", ["input_ids"], ["float_ids"], to=T.FLOAT),
    h.make_node("Unsqueeze", ["float_ids", "around"], ["new"]),
]
inputs = [h.make_tensor_value_info(name, T.INT64, ["batch", size]) for name, size in
          {"input_ids": "new", "attention_mask": "total"}.items()]
outputs = [h.make_tensor_value_info("logits", T.FLOAT, ["batch", "new", VOCAB])]
for kind in ("key", "value"):
    past, present = f"past_key_values.0.{kind}", f"present.0.{kind}"
    nodes.append(h.make_node("Concat", [past, "new"], [present], axis=2))
    inputs.append(h.make_tensor_value_info(past, T.FLOAT, ["batch", 1, "past", 1]))
    outputs.append(h.make_tensor_value_info(present, T.FLOAT, ["batch", 1, "total", 1]))
numbers = {"one": [1], "last": [-1], "half": [32], "vocab": VOCAB, "around": [1, 3]}
constants = [nh.from_array(np.array(value, np.int64), name) for name, value in numbers.items()]
constants.append(nh.from_array(np.array([0, 1], np.float32), "values"))
model = h.make_model(
    h.make_graph(nodes, "g", inputs, outputs, constants), opset_imports=[h.make_opsetid("", 21)], ir_version=10
)
onnx.checker.check_model(model, full_check=True)
onnx.save(model, "model.onnx")
decoder = {
    "session_options": {"intra_op_num_threads": 1},
    "filename": "model.onnx",
    "head_size": 1,
    "hidden_size": 1,
    "num_attention_heads": 1,
    "num_hidden_layers": 1,
    "num_key_value_heads": 1,
    "inputs": {
        "input_ids": "input_ids",
        "attention_mask": "attention_mask",
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
    },
    "outputs": {
        "logits": "logits",
        "present_key_names": "present.%d.key",
        "present_value_names": "present.%d.value",
    },
}
config = {
    "model": {"type": "gemma", "vocab_size": VOCAB, "context_length": 64, "bos_token_id": 2, "eos_token_id": [1],
              "pad_token_id": 0, "decoder": decoder},
    "search": {"do_sample": False, "max_length": 64, "past_present_share_buffer": False},
}
with open("genai_config.json", "w") as file:
    json.dump(config, file)


def told(token):
    return f"last column {token // 32}, ones {token % 32}"


loaded = og.Model(".")
engine, requests, seen = og.Engine(loaded), [], [[] for _ in PROMPTS]
for prompt in PROMPTS:
    options = og.RequestOptions()
    options.set_max_session_tokens(32)
    request = engine.create_request(options=options)
    turn = og.TurnOptions(request)
    turn.set_max_generated_tokens(TOKENS)
    turn.set_do_sample(False)
    request.begin_turn(np.array(prompt, np.int32), turn)
    requests.append(request)
events = engine.create_event_buffer(64)
for _ in range(50):
    if not engine.has_pending_requests():
        break
    for event in engine.run(events):
        if int(event.flags) & int(og.EngineEventFlags.TOKEN):
            seen[next(n for n, request in enumerate(requests) if request == event.request)].append(event.token)

alone = []
for prompt in PROMPTS:
    params = og.GeneratorParams(loaded)
    params.set_search_options(max_length=len(prompt) + TOKENS, do_sample=False)
    generator = og.Generator(loaded, params)
    generator.append_tokens(np.array(prompt, np.int32))
    alone.append([])
    for _ in range(TOKENS):
        generator.generate_next_token()
        alone[-1].append(int(generator.get_next_tokens()[0]))
for row, prompt in enumerate(PROMPTS):
    for step in range(TOKENS):
        what = "prompt" if step == 0 else "1 token"
        print(f"row {row} ({len(prompt)} tokens), {what:>7}: Engine {told(seen[row][step])}; "
              f"Generator alone {told(alone[row][step])}")
counts = [[token % 32 for token in row] for row in seen]
if not (
    counts == [[token % 32 for token in row] for row in alone]
    and all(token >= 32 for row in alone for token in row)
    and all(token >= 32 for token in seen[0])
    and all(token < 32 for token in seen[1])
):
    sys.exit("CHANGED: Engine fills the mask otherwise")
PYTHON
