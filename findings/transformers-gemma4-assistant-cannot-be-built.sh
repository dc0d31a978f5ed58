#!/usr/bin/env bash
# transformers has classes for Gemma 4's assistants, and no config that builds one.
#
# version   transformers 5.23.0, torch 2.13.0, numpy 2.4.6.
# expected  Gemma4AssistantForCausalLM(Gemma4AssistantConfig(...)) makes a drafter all of whose layers read the keys and
#           values of the model it guesses for; so does from_pretrained of a published assistant.
# seen      The config demands that all layers share (num_kv_shared_layers equal to num_hidden_layers), and the text
#           model looks among its own layers for one that makes the keys and values, and raises. With fewer shared
#           layers the config is refused. With the property that raises replaced ("reuse" for every layer) the class
#           works. Gemma4UnifiedAssistantForCausalLM, for the 12B, is the same.
#           A target without shared layers of its own (12B, 31B) hands over no keys and values for an assistant either.
#
# Output:
#   all layers share: ValueError The set of layer types producing a cache is different than the set of layer types using them
#   half of them share: StrictDataclassClassValidationError
#   with the property replaced: logits [1, 1, 64]
#   keys that a model without shared layers hands over: []
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-cache-dir --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 numpy==2.4.6

cd "$work"
HOME="$work" OMP_NUM_THREADS=1 "$work/venv/bin/python" - <<'PYTHON'
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
from transformers import Gemma4AssistantConfig, Gemma4AssistantForCausalLM, Gemma4TextConfig

KINDS = ["sliding_attention", "full_attention"] * 2
TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "layer_types": KINDS,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "global_head_dim": 32, "sliding_window": 8,
        "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}  # fmt: skip


def build(shared):
    text = Gemma4TextConfig(**TEXT, num_kv_shared_layers=shared)
    return Gemma4AssistantForCausalLM(Gemma4AssistantConfig(text_config=text, backbone_hidden_size=48)).eval()


seen = []
for name, shared in (("all layers share", 4), ("half of them share", 2)):
    try:
        build(shared)
        seen.append("built")
    except Exception as error:
        said = str(error) if isinstance(error, ValueError) and shared == 4 else ""
        seen.append(type(error).__name__)
    print(f"{name}: {seen[-1]} {said}".rstrip())
Gemma4TextConfig.kv_sharing_modes = property(lambda config: ["reuse"] * config.num_hidden_layers)
drafter = build(4)
shared = {kind: tuple(torch.randn(1, 1, 5, size) for _ in range(2)) for kind, size in zip(KINDS, (16, 32))}
with torch.no_grad():
    out = drafter(inputs_embeds=torch.randn(1, 1, 96), position_ids=torch.tensor([[5]]), shared_kv_states=shared)
print("with the property replaced: logits", list(out.logits.shape))
if "built" in seen:
    sys.exit("CHANGED: an assistant can be built")
PYTHON
HOME="$work" OMP_NUM_THREADS=1 "$work/venv/bin/python" - <<'PYTHON'
import sys

import torch
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

config = Gemma4TextConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=6, head_dim=16,
                          num_attention_heads=2, num_key_value_heads=1, global_head_dim=32, sliding_window=8,
                          hidden_size_per_layer_input=0)  # fmt: skip
with torch.no_grad():
    out = Gemma4ForCausalLM(config).eval()(torch.tensor([[2, 3, 4]]), return_shared_kv_states=True)
handed = sorted(out.shared_kv_states or {})
print("keys that a model without shared layers hands over:", handed)
if handed:
    sys.exit("CHANGED: it hands over keys")
PYTHON
