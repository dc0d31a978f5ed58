#!/usr/bin/env bash
# transformers reads a Gemma 3 GGUF file without its rope scaling and says nothing.
#
# version   transformers 5.23.0 (with accelerate 1.15.0), gguf 0.19.0, torch 2.13.0, numpy 2.4.6.
# expected  llama.cpp's converter writes gemma3.rope.scaling.type = linear and .factor = 8 for the 4B, 12B and 27B
#           models; from_pretrained(gguf_file=...) gives a model with the logits of the one that was written, or
#           refuses what it cannot read.
# seen      The factor is dropped: global layers have rope_type default, and the logits of a tiny random model differ,
#           without a warning. The same model without scaling comes back exactly; setting the factor in the config
#           that was loaded makes it exact too.
#
# Output:
#   without scaling: read as {'rope_type': 'default', 'rope_theta': 1000000.0}
#       largest difference of logits 0, with the factor put back 0
#   linear, factor 8: read as {'rope_type': 'default', 'rope_theta': 1000000.0}
#       largest difference of logits 0.12, with the factor put back 0
#   warnings about it: []
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-cache-dir --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 gguf==0.19.0 numpy==2.4.6

cd "$work"
HOME="$work" OMP_NUM_THREADS=1 "$work/venv/bin/python" - <<'PYTHON'
import copy
import logging
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"
import gguf
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
SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 7,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "sliding_window": 6,
}
LOCAL = {"rope_type": "default", "rope_theta": 10000.0}
ROPES = {
    "without scaling": {"rope_type": "default", "rope_theta": 1e6},
    "linear, factor 8": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
}


def made(rope):
    config = Gemma3TextConfig(rope_parameters={"sliding_attention": LOCAL, "full_attention": rope}, **SIZES)
    config._attn_implementation = "eager"
    model = Gemma3ForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(0, 0.1 if "norm" in name else 0.3)
    return model


def write(model, path, rope):
    config, words = model.config, model.config.vocab_size
    file = gguf.GGUFWriter(path, "gemma3")
    file.add_context_length(config.max_position_embeddings)
    file.add_embedding_length(config.hidden_size)
    file.add_block_count(config.num_hidden_layers)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_head_count(config.num_attention_heads)
    file.add_head_count_kv(config.num_key_value_heads)
    file.add_key_length(config.head_dim)
    file.add_value_length(config.head_dim)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    file.add_sliding_window(config.sliding_window)
    file.add_rope_freq_base(rope["rope_theta"])
    if "factor" in rope:
        file.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        file.add_rope_scaling_factor(rope["factor"])
    file.add_tokenizer_model("llama")
    file.add_token_list(["<pad>", "<eos>", "<bos>", "<unk>", *(f"t{n}" for n in range(words - 4))])
    file.add_token_scores([0.0] * words)
    file.add_token_types([3, 3, 3, 2] + [1] * (words - 4))
    file.add_bos_token_id(2)
    file.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name != "lm_head.weight":  # tied
            value = weight + 1 if name.endswith("norm.weight") else weight  # llama.cpp stores 1 + w
            file.add_tensor(names.get_name(name, try_suffixes=(".weight",)), value.numpy())
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


ids = torch.tensor([[2, *range(4, 27)]])
found = {}
for name, rope in ROPES.items():
    model = made(rope)
    write(model, "model.gguf", rope)
    read = Gemma3ForCausalLM.from_pretrained(
        ".", gguf_file="model.gguf", attn_implementation="eager", dtype=torch.float32
    ).eval()
    mended = Gemma3ForCausalLM(copy.deepcopy(read.config)).eval()
    mended.config.rope_parameters["full_attention"] = rope
    mended = Gemma3ForCausalLM(mended.config).eval()
    mended.load_state_dict(read.state_dict())
    with torch.no_grad():
        logits = model(ids).logits
        found[name] = (logits - read(ids).logits).abs().max().item()
        after = (logits - mended(ids).logits).abs().max().item()
    print(f"{name}: read as {read.config.rope_parameters['full_attention']}")
    print(f"    largest difference of logits {found[name]:.2g}, with the factor put back {after:.2g}")
    if after > 1e-5:
        sys.exit("CHANGED: something else differs too")
about = [text for text in heard if "rope" in text.lower() or "scaling" in text.lower()]
print("warnings about it:", about)
if found["without scaling"] > 1e-5 or found["linear, factor 8"] < 0.01 or about:
    sys.exit("CHANGED: the factor is read, or its loss is told")
PYTHON
