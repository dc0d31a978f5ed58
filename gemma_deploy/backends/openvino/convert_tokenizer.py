"""Run with an artifact's folder: makes of its tokenizer what openvino-genai reads, and says how much memory that took.

In a process of its own: transformers and the conversion hold 0.8 GB of a vocabulary of 262,144.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from gemma_deploy.machine import give_memory_back, peak_rss_bytes
from gemma_deploy.text import Tokenizer

TOKENIZER, DETOKENIZER = "openvino_tokenizer", "openvino_detokenizer"
FILES = tuple(f"{name}{suffix}" for name in (TOKENIZER, DETOKENIZER) for suffix in (".xml", ".bin"))
# Both have to make the same tokens of these: BOS, spaces, bytes, other scripts, turns of a chat.
SAMPLES = (
    "The window",
    "  two  spaces\n\nand\tlines \u00e9",
    "\u65e5\u672c\u8a9e \U0001f642",
    "<start_of_turn>user\nHi<end_of_turn>\n",
)


def main(folder: Path) -> None:
    """Write `FILES` there; texts get a BOS in front, as the tokenizer's own files say, and are padded on the left."""
    import openvino as ov
    from openvino_tokenizers import convert_tokenizer
    from transformers import PreTrainedTokenizerFast

    own = Tokenizer(folder)
    expected = [[int(token) for token in own.encode(text)] for text in SAMPLES]
    del own
    give_memory_back()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True, padding_side="left")
    made = convert_tokenizer(tokenizer, with_detokenizer=True)
    for name, model in zip((TOKENIZER, DETOKENIZER), made, strict=True):
        ov.save_model(model, folder / f"{name}.xml")
    ready = ov.Core().compile_model(made[0], "CPU")
    notes = []
    for text, ids in zip(SAMPLES, expected, strict=True):
        found = [int(token) for token in ready([text])["input_ids"][0]]
        if found != ids:
            notes.append(f"openvino-genai makes the tokens {found[:8]} of {text!r}, and this program {ids[:8]}")
    sys.stdout.write(json.dumps({"peak": peak_rss_bytes(), "notes": notes[:1]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
