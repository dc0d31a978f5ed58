"""Log-probabilities of transformers' class in float32 with eager attention: CHECKPOINT IDS.json OUT.npy THREADS.

OUT: float32 [windows, 511, vocabulary], of every position that predicts a token of its window.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from protocol import BLOCK, windows
from transformers import AutoModelForCausalLM

checkpoint, ids, out, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
texts = windows(json.loads(Path(ids).read_text()))
model = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager", dtype=torch.float32).eval()
partial = Path(f"{out}.partial")
shape = (len(texts), len(texts[0]) - 1, model.config.vocab_size)
file = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape)
with torch.inference_mode():
    for number, window in enumerate(texts):
        logits = model(torch.tensor([window]), use_cache=False).logits[0, :-1]
        for at in range(0, len(logits), BLOCK):
            file[number, at : at + BLOCK] = logits[at : at + BLOCK].log_softmax(-1).numpy()
file.flush()
partial.rename(out)
