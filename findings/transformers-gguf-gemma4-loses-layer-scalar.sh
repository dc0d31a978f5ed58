#!/usr/bin/env bash
# transformers reads a Gemma 4 GGUF file without the number that multiplies each layer, and calls it missing.
#
# version   transformers 5.23.0 (with accelerate 1.15.0), gguf 0.19.0, torch 2.13.0, numpy 2.4.6.
# expected  llama.cpp's converter writes layers.N.layer_scalar as blk.N.layer_output_scale.weight;
#           from_pretrained(gguf_file=...) gives a model with the logits of the one that was written, or refuses what it
#           cannot read.
# seen      The state has `layer_scalar` without `.weight`, so the tensor is not found: every layer keeps 1, and the
#           logits of a tiny model with all defaults of Gemma4TextConfig differ. Putting the numbers back makes them
#           exact. The load report says that they are missing from the checkpoint, which has them. A file with a number
#           of key/value heads for each layer, as the converter writes for the 12B, 26B and 31B, ends in a TypeError.
#
# Output:
#   layer_scalar written [0.3, 0.7], read [1.0, 1.0]
#   largest difference of logits 2.8, with the numbers put back 0
#   called missing: True
#   heads for each layer: StrictDataclassFieldValidationError
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-cache-dir --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 gguf==0.19.0 numpy==2.4.6

cd "$work"
HOME="$work" OMP_NUM_THREADS=1 "$work/venv/bin/python" - <<'PYTHON'
import logging
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"
import gguf
import torch
import transformers
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

heard = []
keep = logging.Handler(logging.WARNING)
keep.emit = lambda record: heard.append(record.getMessage())
transformers.utils.logging.disable_default_handler()
transformers.utils.logging.add_handler(keep)
torch.manual_seed(0)
torch.set_num_threads(1)
WORDS = 32
config = Gemma4TextConfig(vocab_size=WORDS, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
                          num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
config._attn_implementation = "eager"
model = Gemma4ForCausalLM(config).eval()
with torch.no_grad():
    for name, weight in model.named_parameters():
        weight.normal_(1.0 if "norm" in name else 0.0, 0.1)
    model.model.embed_tokens_per_layer.weight.zero_()
    for layer, number in zip(model.model.layers, (0.3, 0.7)):
        layer.layer_scalar.fill_(number)


def write(path, heads):
    file = gguf.GGUFWriter(path, "gemma4")
    file.add_context_length(config.max_position_embeddings)
    file.add_embedding_length(config.hidden_size)
    file.add_block_count(config.num_hidden_layers)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_head_count(config.num_attention_heads)
    file.add_head_count_kv(heads)
    file.add_key_length(512)
    file.add_key_length_swa(256)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    file.add_sliding_window(config.sliding_window)
    file.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
    file.add_embedding_length_per_layer_input(256)
    file.add_rope_freq_base(1e6)
    file.add_rope_freq_base_swa(1e4)
    file.add_tokenizer_model("llama")
    file.add_token_list(["<pad>", "<eos>", "<bos>", "<unk>", *(f"t{n}" for n in range(WORDS - 4))])
    file.add_token_scores([0.0] * WORDS)
    file.add_token_types([3, 3, 3, 2] + [1] * (WORDS - 4))
    file.add_bos_token_id(2)
    file.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA4, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name != "lm_head.weight":  # tied
            name = name if name.endswith(".weight") else f"{name}.weight"  # as the converter does
            value = weight.half() if "embed_tokens_per_layer" in name else weight
            file.add_tensor(names.get_name(name, try_suffixes=(".weight",)), value.numpy())
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def read():
    return Gemma4ForCausalLM.from_pretrained(
        ".", gguf_file="model.gguf", attn_implementation="eager", dtype=torch.float32
    ).eval()


ids = torch.tensor([[2, *range(4, 27)]])
write("model.gguf", 1)
found = read()
numbers = [[round(layer.layer_scalar.item(), 2) for layer in one.model.layers] for one in (model, found)]
print(f"layer_scalar written {numbers[0]}, read {numbers[1]}")
with torch.no_grad():
    logits = model(ids).logits
    before = (logits - found(ids).logits).abs().max().item()
    for layer, right in zip(found.model.layers, model.model.layers):
        layer.layer_scalar.copy_(right.layer_scalar)
    after = (logits - found(ids).logits).abs().max().item()
print(f"largest difference of logits {before:.2g}, with the numbers put back {after:.2g}")
missing = any("layer_scalar" in text and "MISSING" in text for text in heard)
print("called missing:", missing)
write("model.gguf", [1, 1])
try:
    read()
    refused = "read"
except Exception as error:
    refused = type(error).__name__
print("heads for each layer:", refused)
if after > 1e-5:
    sys.exit("CHANGED: something else differs too")
if before < 0.01 or not missing or refused == "read":
    sys.exit("CHANGED: the numbers are read, their loss is told otherwise, or heads for each layer are read")
PYTHON
