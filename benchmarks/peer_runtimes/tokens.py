"""A text as token ids, without BOS: CHECKPOINT TEXT OUT.json COUNT; BOS is written beside them, from the config."""

import json
import sys
from pathlib import Path

from tokenizers import Tokenizer

checkpoint, text, out, count = sys.argv[1:]
whole = Path(text).read_text(encoding="utf-8")
ids = Tokenizer.from_file(f"{checkpoint}/tokenizer.json").encode(whole, add_special_tokens=False).ids
bos = json.loads((Path(checkpoint) / "config.json").read_text()).get("bos_token_id", 2)
Path(out).write_text(json.dumps({"bos": bos, "ids": ids[: int(count)]}))
