#!/usr/bin/env bash
# An adapter of PEFT whose alpha_pattern or rank_pattern has two keys for one module is another adapter after it was
# saved and loaded.
#
# version   peft 0.21.2, transformers 5.23.0, torch 2.13.0, numpy 2.4.6.
# expected  from_pretrained(save_pretrained(model)) computes what the model computed.
# seen      The first key that matches a module counts, in the order of the dictionary, and saving sorts the dictionary:
#           "q_proj" first, "layers.0.self_attn.q_proj" second is 16 in training and 2 after loading, because l sorts
#           before q. Nothing is said; logits differ. (With rank_pattern the shapes differ, and loading fails.)
#
# Output:
#   alpha of layers.0.self_attn.q_proj: 16 in training, 2 after loading
#   largest difference of logits: 1.3e-01 of the largest; warnings about it: []
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
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Gemma2Config, Gemma2ForCausalLM

torch.set_num_threads(1)
ids = torch.tensor([[2, *range(4, 27)]])


def base():
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=64, sliding_window=6,
    )
    config._attn_implementation = "eager"
    return Gemma2ForCausalLM(config).eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(ids).logits


def alpha(model):
    return model.base_model.model.model.layers[0].self_attn.q_proj.lora_alpha["default"]


pattern = {"q_proj": 16, "layers.0.self_attn.q_proj": 2}
config = LoraConfig(r=2, target_modules=["q_proj"], alpha_pattern=pattern, init_lora_weights=False)
trained = get_peft_model(base(), config)
trained.save_pretrained("adapter")
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    loaded = PeftModel.from_pretrained(base(), "adapter")
about = [str(one.message) for one in said if "pattern" in str(one.message)]
apart = float((logits(trained) - logits(loaded)).abs().max() / logits(trained).abs().max())
print(f"alpha of layers.0.self_attn.q_proj: {alpha(trained)} in training, {alpha(loaded)} after loading")
print(f"largest difference of logits: {apart:.1e} of the largest; warnings about it: {about}")
if not (alpha(trained) == 16 and alpha(loaded) == 2 and apart > 1e-3 and not about):
    sys.exit("CHANGED: the order of the keys is kept, or two keys for a module are told")
PYTHON
