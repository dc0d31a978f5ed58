#!/usr/bin/env bash
# An adapter of PEFT on the token table of a model that was resized and whose head is its own keeps the larger table and
# not the larger head, even with save_embedding_layers=True.
#
# version   peft 0.21.2, transformers 5.23.0, torch 2.13.0, numpy 2.4.6.
# expected  "If True, save the embedding layers in addition to adapter weights" (get_peft_model_state_dict, which looks at
#           get_input_embeddings() and get_output_embeddings()): both, as without embed_tokens in target_modules.
# seen      With embed_tokens in target_modules only what is targeted is saved: the table. Loading the adapter onto the
#           base, resized again, gives the new tokens other logits; nothing is said. With lm_head in target_modules it is
#           the table that is lost.
#
# Output:
#   saved, q_proj alone           : ['lm_head.weight', 'model.embed_tokens.weight']
#   saved, q_proj and embed_tokens: ['model.embed_tokens.base_layer.weight']
#   logits after loading, largest difference: old tokens 0.0e+00, new tokens 6.8e+00; warnings about it: []
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
from safetensors.torch import load_file
from transformers import Gemma2Config, Gemma2ForCausalLM

torch.set_num_threads(1)
OLD, NEW = 32, 36
ids = torch.tensor([[2, *range(4, 27)]])


def resized(seed):
    """The same base each time; the new rows are drawn, as they are for a user who resizes again."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=OLD, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=64, sliding_window=6, initializer_range=0.5,
        tie_word_embeddings=False,
    )
    config._attn_implementation = "eager"
    model = Gemma2ForCausalLM(config).eval()
    torch.manual_seed(seed)
    model.resize_token_embeddings(NEW, mean_resizing=False)
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(ids).logits


def saved(name, targets):
    torch.manual_seed(1)
    model = get_peft_model(resized(seed=1), LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    model.save_pretrained(name, save_embedding_layers=True)
    names = load_file(f"{name}/adapter_model.safetensors")
    return model, sorted(one.removeprefix("base_model.model.") for one in names if "lora" not in one)


plain = saved("plain", ["q_proj"])[1]
trained, table = saved("table", ["q_proj", "embed_tokens"])
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    loaded = PeftModel.from_pretrained(resized(seed=2), "table")
about = [str(one.message) for one in said if "lm_head" in str(one.message)]
apart = (logits(loaded) - logits(trained)).abs()
old, new = float(apart[..., :OLD].max()), float(apart[..., OLD:].max())
print(f"saved, q_proj alone           : {plain}")
print(f"saved, q_proj and embed_tokens: {table}")
print(f"logits after loading, largest difference: old tokens {old:.1e}, new tokens {new:.1e}; warnings about it: {about}")
if not (len(plain) == 2 and len(table) == 1 and old == 0 and new > 0.1 and not about):
    sys.exit("CHANGED: the head is saved with the table, or its absence is told")
PYTHON
