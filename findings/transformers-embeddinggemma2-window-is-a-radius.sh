#!/usr/bin/env bash
# The `sliding_window` of an EmbeddingGemma 2 is a radius, where that of an EmbeddingGemma (1) is a width that
# transformers halves: the same number in config.json means twice as many tokens on either side.
#
# version   transformers 5.23.0, torch 2.13.0, numpy 2.4.6.
# expected  One key, one meaning: `sliding_window` 8 in both files lets a token see equally far, and the config object
#           says of both what it says of the first.
# seen      With 8 in the file a token of EmbeddingGemma sees 4 tokens on either side (its config object says 5, the
#           first distance that is too far), one of EmbeddingGemma 2 sees 8 (its config object says 8). Beside it: the
#           sizes of full layers are saved as `per_layer_config` by numbers of one width, "05" in a model of 12 layers,
#           which a reader that looks for "5" passes by.
#
# Output:
#   EmbeddingGemma   file 8, object 5, sees 4 tokens on either side
#   EmbeddingGemma 2 file 8, object 8, sees 8 tokens on either side
#   EmbeddingGemma 2 per_layer_config of 12 layers: ['05', '11']
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
from transformers import AutoConfig, AutoModel

torch.set_num_threads(1)
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2,
         "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 8, "max_position_embeddings": 64}  # fmt: skip
FILES = {
    "EmbeddingGemma  ": {"model_type": "gemma3_text", "use_bidirectional_attention": True, "query_pre_attn_scalar": 16},
    "EmbeddingGemma 2": {"model_type": "embedding_gemma2_text", "hidden_size_per_layer_input": 8, "embedding_dim": 8,
                         "global_head_dim": 32},
}  # fmt: skip
MIDDLE = 24


def reach(config):
    """Tokens on either side that change what the middle token gives in a model of one sliding layer."""
    torch.manual_seed(0)
    model = AutoModel.from_config(config, attn_implementation="eager").eval()
    ids = torch.randint(3, 64, (1, 2 * MIDDLE + 1))
    layer = model.layers[0]
    found = {}
    layer.register_forward_hook(lambda module, args, out: found.update(out=out if torch.is_tensor(out) else out[0]))
    with torch.no_grad():
        model(ids)
        before, seen = found["out"][0, MIDDLE].clone(), []
        for distance in range(1, MIDDLE + 1):
            other = ids.clone()
            other[0, MIDDLE + distance] = (other[0, MIDDLE + distance] + 7) % 64
            model(other)
            seen.append(not torch.equal(found["out"][0, MIDDLE], before))
    return sum(seen)


found = {}
for name, file in FILES.items():
    two = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    config = AutoConfig.for_model(**file, **SIZES, **two)
    found[name] = config.sliding_window, reach(config)
    print(f"{name} file 8, object {found[name][0]}, sees {found[name][1]} tokens on either side")
first, second = FILES
numbers = list(AutoConfig.for_model(**FILES[second], **SIZES, num_hidden_layers=12).to_dict()["per_layer_config"])
print(f"{second} per_layer_config of 12 layers: {numbers}")
if found != {first: (5, 4), second: (8, 8)} or numbers != ["05", "11"]:
    sys.exit("CHANGED: the windows are said or seen otherwise, or layers are numbered otherwise")
PYTHON
