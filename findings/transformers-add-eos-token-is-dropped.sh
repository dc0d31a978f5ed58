#!/usr/bin/env bash
# transformers drops add_bos_token and add_eos_token of tokenizer_config.json where there is a tokenizer.json.
#
# version   transformers 5.23.0, tokenizers 0.23.3.
# expected  `"add_eos_token": true` in tokenizer_config.json, which GemmaTokenizer documents and save_pretrained writes,
#           puts <eos> behind a text; `"add_bos_token": false` leaves <bos> out.
# seen      Both are read only where there is no tokenizer.json. Where there is one, its post-processor decides alone,
#           with GemmaTokenizer and with PreTrainedTokenizerFast alike; with "post_processor": null neither token is
#           put anywhere, whatever the settings say. Set after loading (tokenizer.add_eos_token = True) they work. What
#           an encoder pools over (EmbeddingGemma: <bos> ... <eos>) is thus said in tokenizer.json alone.
#
# Output:
#   GemmaTokenizer, tokenizer.json puts <bos>: settings true, true: <bos> a
#   GemmaTokenizer, tokenizer.json puts <bos>: settings false, false: <bos> a
#   GemmaTokenizer, tokenizer.json puts nothing: settings true, true: a
#   GemmaTokenizer, tokenizer.json puts nothing: set after loading: <bos> a <eos>
#   PreTrainedTokenizerFast, tokenizer.json puts <bos>: settings true, true: <bos> a
#   PreTrainedTokenizerFast, tokenizer.json puts <bos>: settings false, false: <bos> a
#   PreTrainedTokenizerFast, tokenizer.json puts nothing: settings true, true: a
#   PreTrainedTokenizerFast, tokenizer.json puts nothing: set after loading: <bos> a <eos>
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-cache-dir --disable-pip-version-check transformers==5.23.0 tokenizers==0.23.3

cd "$work"
HOME="$work" HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error "$work/venv/bin/python" - 2>/dev/null <<'PYTHON'
import json
import sys
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, models, processors
from transformers import AutoTokenizer

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
found = []


def tokens(kind, template, settings, later=False):
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*SPECIAL, "a"])}, merges=[], unk_token="<unk>"))
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    if template:
        backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    folder = Path("tokenizer")
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind, **names, **settings}))
    loaded = AutoTokenizer.from_pretrained(folder)
    if later:
        loaded.add_bos_token = loaded.add_eos_token = True
    return " ".join(loaded.convert_ids_to_tokens(loaded("a")["input_ids"]))


for kind in ("GemmaTokenizer", "PreTrainedTokenizerFast"):
    for template, flag, later, expected in (
        (True, True, False, "<bos> a"), (True, False, False, "<bos> a"), (False, True, False, "a"),
        (False, True, True, "<bos> a <eos>"),
    ):
        given = tokens(kind, template, {"add_bos_token": flag, "add_eos_token": flag}, later)
        said = "set after loading" if later else f"settings {str(flag).lower()}, {str(flag).lower()}"
        print(f"{kind}, tokenizer.json puts {'<bos>' if template else 'nothing'}: {said}: {given}")
        found.append(given == expected)
sys.exit(not all(found))
PYTHON
