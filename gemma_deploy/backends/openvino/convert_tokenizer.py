"""Run with an artifact's folder: makes of its tokenizer what openvino-genai reads, and says how much memory that took.

In a process of its own: transformers and the conversion hold 0.9 GB of a vocabulary of 262,144.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from gemma_deploy.machine import peak_rss_bytes

TOKENIZER, DETOKENIZER = "openvino_tokenizer", "openvino_detokenizer"
FILES = tuple(f"{name}{suffix}" for name in (TOKENIZER, DETOKENIZER) for suffix in (".xml", ".bin"))


def main(folder: Path) -> None:
    """Write `FILES` there; texts get a BOS in front, as the tokenizer's own files say."""
    import openvino as ov
    from openvino_tokenizers import convert_tokenizer
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    made = convert_tokenizer(tokenizer, with_detokenizer=True)
    for name, model in zip((TOKENIZER, DETOKENIZER), made, strict=True):
        ov.save_model(model, folder / f"{name}.xml")
    sys.stdout.write(json.dumps({"peak": peak_rss_bytes()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
