#!/usr/bin/env bash
# After a training with bf16=True the model goes on computing in bfloat16 for everybody, also outside of the trainer.
#
# version   transformers 5.23.0, accelerate 1.15.0, torch 2.13.0, numpy 2.4.6.
# expected  bf16 is a setting of the training: a model whose weights are float32 and have not changed (learning rate 0)
#           gives the logits that it gave before.
# seen      The trainer puts autocast around the model's forward and leaves it there. Weights and logits are float32 before
#           and after, nothing is said, and a loss measured before the training is of another precision than the one after.
#
# Output:
#   weights the same: True; dtypes of weights and logits: float32
#   largest difference of logits before and after: 1.2e-02 of the largest
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-cache-dir --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6

cd "$work"
HOME="$work" OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PYTHON'
import sys

import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, Trainer, TrainingArguments

torch.set_num_threads(1)
torch.manual_seed(0)
config = Gemma2Config(
    vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, max_position_embeddings=64, sliding_window=6,
)
config._attn_implementation = "eager"
model = Gemma2ForCausalLM(config)
ids = torch.tensor([[2, *range(4, 27)]])


def logits():
    with torch.no_grad():
        return model.eval()(ids).logits


weights = {name: value.clone() for name, value in model.state_dict().items()}
before = logits()
arguments = TrainingArguments(
    output_dir="out", bf16=True, use_cpu=True, max_steps=1, learning_rate=0.0, per_device_train_batch_size=1,
    report_to="none", save_strategy="no", disable_tqdm=True,
)
Trainer(model=model, args=arguments, train_dataset=[{"input_ids": ids[0], "labels": ids[0]}]).train()
after = logits()
same = all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
apart = float((after - before).abs().max() / before.abs().max())
kinds = sorted({str(value.dtype).removeprefix("torch.") for value in (*weights.values(), before, after)})
print(f"weights the same: {same}; dtypes of weights and logits: {', '.join(kinds)}")
print(f"largest difference of logits before and after: {apart:.1e} of the largest")
if not (same and kinds == ["float32"] and apart > 1e-4):
    sys.exit("CHANGED: after a training in bfloat16 the model computes in float32 again")
PYTHON
