"""A checkpoint directory for llama.cpp's converter: CHECKPOINT OUT; links, and a tokenizer.model of tokenizer.json.

The converter takes Gemma's vocabulary from `tokenizer.model` only. Pieces keep their ids; scores fall with the id, as
those of merges do in Gemma's own file. Only ids are fed to the model here, so nothing measured depends on the scores.
"""

import json
import re
import sys
from pathlib import Path

from sentencepiece import sentencepiece_model_pb2

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
checkpoint, out = map(Path, sys.argv[1:])
out.mkdir(parents=True, exist_ok=True)
for file in checkpoint.iterdir():
    if not (out / file.name).exists():
        (out / file.name).symlink_to(file.resolve())
if not (checkpoint / "tokenizer.model").exists():
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
    added = {one["id"]: one for one in tokenizer["added_tokens"]}
    words = {index: word for word, index in tokenizer["model"]["vocab"].items()}
    words |= {index: one["content"] for index, one in added.items()}
    vocabulary = sentencepiece_model_pb2.ModelProto()
    vocabulary.trainer_spec.model_type = 2  # BPE
    vocabulary.trainer_spec.byte_fallback = True
    vocabulary.normalizer_spec.add_dummy_prefix = False
    unknown = tokenizer["model"].get("unk_token") or "<unk>"
    for index in range(max(words) + 1):
        word = words.get(index, f"<unused-{index}>")
        kind = NORMAL
        if word == unknown:
            kind = UNKNOWN
        elif index in added or index not in words:
            kind = CONTROL if index not in added or added[index]["special"] else USER_DEFINED
        elif re.fullmatch(r"<0x[0-9A-F]{2}>", word):
            kind = BYTE
        vocabulary.pieces.add(piece=word, score=-float(index), type=kind)
    (out / "tokenizer.model").write_bytes(vocabulary.SerializeToString())
