#!/usr/bin/env bash
# transformers keeps samples that are packed into one row apart by their position_ids, but not with its own default
# use_cache=True: then, without a word, each sample attends to those before it.
#
# version   transformers 5.23.0, torch 2.13.0, numpy 2.4.6.
# expected  masking_utils finds packed rows by position_ids that begin anew where no attention_mask is given; a training
#           step (model.train(), labels) on such a row has the loss of the samples alone.
# seen      A model makes a cache first (config.use_cache is True, in training mode as well), and rows are looked at only
#           where there is none. With use_cache=False the loss is that of the samples alone; by default it is another,
#           and tokens of the first sample change logits of the second. An attention_mask of ones does the same.
#
# Output:
#   loss of the samples alone 6.0915
#   packed, use_cache=False: loss 6.0915; another first sample moves the second's logits by 0
#   packed, by default: loss 6.2496; another first sample moves the second's logits by 2.4
#   packed, use_cache=False, a mask of ones: loss 6.2496; another first sample moves the second's logits by 2.4
#   warnings: []
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-cache-dir --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 numpy==2.4.6

cd "$work"
HOME="$work" OMP_NUM_THREADS=1 "$work/venv/bin/python" - <<'PYTHON'
import logging
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
import transformers
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

heard = []
keep = logging.Handler(logging.WARNING)
keep.emit = lambda record: heard.append(record.getMessage())
transformers.utils.logging.disable_default_handler()
transformers.utils.logging.add_handler(keep)
torch.manual_seed(0)
torch.set_num_threads(1)
config = Gemma3TextConfig(
    vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, max_position_embeddings=64, sliding_window=6, initializer_range=0.3,
)
config._attn_implementation = "eager"
model = Gemma3ForCausalLM(config).train()
first, second = torch.randint(3, 32, (1, 9)), torch.randint(3, 32, (1, 13))
positions = torch.cat([torch.arange(9), torch.arange(13)])[None]


def packed(one, **how):
    """Loss of the two samples in a row (none for the first token of each), and logits of the second."""
    ids = torch.cat([one, second], dim=1)
    labels = ids.clone()
    labels[:, [0, 9]] = -100
    with torch.no_grad():
        out = model(ids, position_ids=positions, labels=labels, **how)
    return out.loss.item(), out.logits[:, 9:]


with torch.no_grad():
    alone = (model(first, labels=first).loss * 8 + model(second, labels=second).loss * 12).item() / 20
print(f"loss of the samples alone {alone:.4f}")
found = {}
for name, how in {
    "use_cache=False": {"use_cache": False},
    "by default": {},
    "use_cache=False, a mask of ones": {"use_cache": False, "attention_mask": torch.ones(1, 22, dtype=torch.long)},
}.items():
    loss, logits = packed(first, **how)
    _, others = packed(first.flip(1), **how)
    found[name] = abs(loss - alone), (logits - others).abs().max().item()
    print(f"packed, {name}: loss {loss:.4f}; another first sample moves the second's logits by {found[name][1]:.2g}")
print("warnings:", heard)
right, default, masked = found.values()
if not (max(right) < 1e-5 and min(default) > 1e-3 and min(masked) > 1e-3 and not heard):
    sys.exit("CHANGED: packed rows are kept apart with a cache or a mask too, or it is told")
PYTHON
