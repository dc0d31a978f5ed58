#!/usr/bin/env bash
# PEFT merges a LoRA on the token table of a tied model twice into the table when ensure_weight_tying is set, which is
# what its own warning advises.
#
# version   peft 0.21.2, transformers 5.23.0, torch 2.13.0, numpy 2.4.6.
# expected  merge_and_unload gives the model that computed before it, as for every other LoRA. Without
#           ensure_weight_tying a warning says that merging a tied layer may change the result, and names
#           ensure_weight_tying=True as the way that adapts both ends alike.
# seen      With it the adapter is on the table and, tied, on the head; each merges its update into the weight that both
#           share: the table moves by twice the update. Without it the table moves once, and with it the head, which had
#           no adapter. Neither merged model computes what it computed before; on an untied model it does.
#
# Output:
#   tied, ensure_weight_tying=True: the update is in the merged table 2.0 times; logits move by 2.1e-01 of the largest
#   tied: the update is in the merged table 1.0 times; logits move by 1.2e-01 of the largest
#   untied: the update is in the merged table 1.0 times; logits move by 2.4e-07 of the largest
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-cache-dir --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 peft==0.21.2 numpy==2.4.6

cd "$work"
HOME="$work" OMP_NUM_THREADS=1 "$work/venv/bin/python" - <<'PYTHON'
import os
import sys
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"
warnings.simplefilter("ignore")
import torch
from peft import LoraConfig, get_peft_model
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

torch.set_num_threads(1)
ids = torch.tensor([[2, *range(4, 27)]])


def run(tied, **settings):
    """How many times the update is in the merged table, and how far logits move, relative to the largest."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=64, sliding_window=6, tie_word_embeddings=tied, initializer_range=0.5,
    )
    config._attn_implementation = "eager"
    model = Gemma3ForCausalLM(config).eval()
    before = model.model.embed_tokens.weight.detach().clone()
    lora = LoraConfig(r=2, lora_alpha=0.1, target_modules=["embed_tokens"], init_lora_weights=False, **settings)
    adapted = get_peft_model(model, lora).eval()
    table = adapted.get_input_embeddings()
    update = table.get_delta_weight("default").detach().clone()
    with torch.no_grad():
        unmerged = adapted(ids).logits
        merged_model = adapted.merge_and_unload()
        merged = merged_model(ids).logits
    moved = merged_model.model.embed_tokens.weight.detach() - before
    times = float((moved * update).sum() / (update * update).sum())
    return times, float((unmerged - merged).abs().max() / unmerged.abs().max())


found = {
    "tied, ensure_weight_tying=True": run(True, ensure_weight_tying=True),
    "tied": run(True),
    "untied": run(False),
}
for name, (times, error) in found.items():
    print(f"{name}: the update is in the merged table {times:.1f} times; logits move by {error:.1e} of the largest")
asked, plain, untied = found.values()
if not (abs(asked[0] - 2) < 0.01 and asked[1] > 1e-3 and plain[1] > 1e-3 and untied[1] < 1e-5):
    sys.exit("CHANGED: the update is merged once, or merging is refused")
PYTHON
