"""A small random EmbeddingGemma in the folders of sentence-transformers, and what transformers makes of it."""

import functools
import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from gemma_deploy import paths
from gemma_deploy.testing import write_tiny_encoder

VOCABULARY = 4096  # of the bundled tokenizer
# A window of 10: config.json says 10, transformers' config object 6, and a token sees 5 others on either side.
WINDOW = 10


def write_encoder(path: Path, *, ends=True, **changes) -> Path:
    """The checkpoint with the bundled tokenizer, which puts <bos> in front of a text and, with `ends`, <eos> behind."""
    given = {"dtype": "F32", "dense": (320, 160), "vocab_size": VOCABULARY, "sliding_window": WINDOW} | changes
    write_tiny_encoder(path, **given)
    demo = paths.demo_checkpoint_dir()
    shutil.copy(demo / "tokenizer_config.json", path)
    tokenizer = json.loads((demo / "tokenizer.json").read_text())
    if ends:
        processor = tokenizer["post_processor"]
        processor["single"].append({"SpecialToken": {"id": "<eos>", "type_id": 0}})
        processor["special_tokens"]["<eos>"] = {"id": "<eos>", "ids": [1], "tokens": ["<eos>"]}
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    return path


@functools.cache
def stock(path: Path):
    """Transformers' class, eager, float32."""
    import torch
    from transformers import AutoModel

    return AutoModel.from_pretrained(path, attn_implementation="eager", dtype=torch.float32).eval()


def stock_states(path: Path, ids) -> np.ndarray:
    """[tokens, hidden] of one text alone, without padding."""
    import torch

    with torch.no_grad():
        return stock(path)(torch.tensor([list(ids)]), use_cache=False).last_hidden_state[0].numpy()


def stock_vector(path: Path, ids) -> np.ndarray:
    """The text's vector in float64: mean over its tokens, 2_Dense, 3_Dense, length 1."""
    vector = stock_states(path, ids).astype(np.float64).mean(0)
    for folder in ("2_Dense", "3_Dense"):
        vector = load_file(path / folder / "model.safetensors")["linear.weight"].astype(np.float64) @ vector
    return vector / np.linalg.norm(vector)


def texts(lengths=(60, 41, 7, 1), seed=3) -> list[list[int]]:
    """Token ids of texts of unequal lengths: six windows and less."""
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCABULARY, length).tolist() for length in lengths]
