#!/usr/bin/env bash
# bitsandbytes in transformers quantizes a mixture of experts but for its experts, and rounds the router, which is what
# everybody leaves in full precision.
#
# version   transformers 5.23.0, bitsandbytes 0.50.2, accelerate 1.15.0, torch 2.13.0, numpy 2.4.6.
# expected  load_in_8bit and load_in_4bit make a model about two and four times smaller; what is not quantized is told,
#           or listed (llm_int8_skip_modules), as `lm_head` is.
# seen      The experts of Gemma 4 26B-A4B are two parameters of three dimensions in a module that is no nn.Linear: they
#           stay bfloat16, which is most of the model (of the published shape 45.7 of the layers' 49.0 GB). The router,
#           0.04 % of it, is an nn.Linear and becomes codes. Nothing is said.
#
# Output:
#   load_in_8bit: experts torch.bfloat16, router torch.int8; bytes of the layers' matrices 192 % of those of all codes
#   load_in_4bit: experts torch.bfloat16, router torch.uint8; bytes of the layers' matrices 377 % of those of all codes
#   warnings about experts: 0
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-cache-dir --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 bitsandbytes==0.50.2 accelerate==1.15.0 numpy==2.4.6

cd "$work"
HOME="$work" OMP_NUM_THREADS=1 "$work/venv/bin/python" - <<'PYTHON'
import logging
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
import transformers
from transformers import BitsAndBytesConfig, Gemma4ForCausalLM, Gemma4TextConfig

heard = []
keep = logging.Handler(logging.WARNING)
keep.emit = lambda record: heard.append(record.getMessage())
transformers.utils.logging.disable_default_handler()
transformers.utils.logging.add_handler(keep)
torch.manual_seed(0)
config = Gemma4TextConfig(
    vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=32, global_head_dim=32, hidden_size_per_layer_input=0, sliding_window=8,
    enable_moe_block=True, num_experts=32, top_k_experts=3, moe_intermediate_size=64, max_position_embeddings=64,
    layer_types=["sliding_attention", "full_attention"],
)
Gemma4ForCausalLM(config).bfloat16().save_pretrained("model")
wrong = []
for name, bits in (("load_in_8bit", 8), ("load_in_4bit", 4)):
    how = BitsAndBytesConfig(**{name: True})
    model = Gemma4ForCausalLM.from_pretrained("model", dtype=torch.bfloat16, quantization_config=how)
    layer, plain = model.model.layers[0], Gemma4ForCausalLM(config).model.layers
    held = sum(one.numel() * one.element_size() for one in model.model.layers.parameters() if one.dim() > 1)
    codes = sum(one.numel() for one in plain.parameters() if one.dim() > 1) * bits / 8
    experts, router = layer.experts.gate_up_proj.dtype, layer.router.proj.weight.dtype
    share = f"{100 * held / codes:.0f} % of those of all codes"
    print(f"{name}: experts {experts}, router {router}; bytes of the layers' matrices {share}")
    wrong.append(experts == torch.bfloat16 and router in (torch.int8, torch.uint8) and held > 1.5 * codes)
told = [text for text in heard if "expert" in text]
print("warnings about experts:", len(told))
if not all(wrong) or told:
    sys.exit("CHANGED: experts are quantized, or the router is not, or it is told")
PYTHON
