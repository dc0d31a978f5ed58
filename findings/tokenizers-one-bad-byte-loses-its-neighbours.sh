#!/usr/bin/env bash
# One byte token that is no UTF-8 makes tokenizers' ByteFallback lose the good characters beside it, which
# SentencePiece keeps.
#
# version   tokenizers 0.23.3, sentencepiece 0.2.3.
# expected  Gemma writes characters without a piece of their own as byte tokens <0xNN>. ByteFallback's text promises a
#           replacement character for each byte token that cannot be decoded; SentencePiece, whose decoder this stands
#           for, keeps the characters around it.
# seen      A run of byte tokens is decoded as a whole or not at all: of two good characters with one stray byte
#           between them seven replacement characters are left, where SentencePiece gives both characters and one
#           replacement. A reply that is cut within a character loses those before it too.
#
# Output:
#   one character: SentencePiece '\u4f60', tokenizers '\u4f60'
#   two, and a stray byte between them: SentencePiece '\u4f60\ufffd\u4f60', tokenizers '\ufffd\ufffd\ufffd\ufffd\ufffd\ufffd\ufffd'
#   one, and half of another: SentencePiece '\u4f60\ufffd\ufffd', tokenizers '\ufffd\ufffd\ufffd\ufffd\ufffd'
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-cache-dir --disable-pip-version-check \
    tokenizers==0.23.3 sentencepiece==0.2.3

cd "$work"
HOME="$work" OMP_NUM_THREADS=1 "$work/venv/bin/python" - <<'PYTHON'
import sys

import sentencepiece
from tokenizers import decoders

with open("text.txt", "w") as file:
    file.write("\n".join("abc bca cab abcabc bcabca " * 8 for _ in range(50)))
sentencepiece.SentencePieceTrainer.train(
    input="text.txt", model_prefix="tiny", vocab_size=275, model_type="bpe", byte_fallback=True, minloglevel=2,
    normalization_rule_name="identity", add_dummy_prefix=False, num_threads=1,
)
model = sentencepiece.SentencePieceProcessor(model_file="tiny.model")
decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])  # as in Gemma's tokenizer.json
GOOD = "\u4f60".encode()
holds = True
for name, run in {"one character": GOOD, "two, and a stray byte between them": GOOD + b"\xff" + GOOD,
                  "one, and half of another": GOOD + GOOD[:2]}.items():
    pieces = [f"<0x{byte:02X}>" for byte in run]
    theirs = model.decode([model.piece_to_id(piece) for piece in pieces])
    seen = decoder.decode(pieces)
    print(f"{name}: SentencePiece {ascii(theirs)}, tokenizers {ascii(seen)}")
    if run == GOOD:
        holds &= theirs == seen == GOOD.decode()
    else:
        holds &= GOOD.decode() in theirs and seen == "\ufffd" * len(run)
if not holds:
    sys.exit("CHANGED: both decode alike now")
PYTHON
