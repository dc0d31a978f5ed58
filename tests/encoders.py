"""Small random EmbeddingGemmas in the folders of sentence-transformers, and what transformers makes of them."""

import functools
import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from gemma_deploy import paths
from gemma_deploy.testing import write_tiny_encoder, write_tiny_encoder2

VOCABULARY = 4096  # of the bundled tokenizer
# A window of 10: config.json says 10, transformers' config object 6, and a token sees 5 others on either side.
WINDOW = 10
# Of EmbeddingGemma 2 config.json says how many others a token sees on either side.
RADIUS = 5
FIRST, SECOND = "EmbeddingGemma", "EmbeddingGemma 2"


def write_encoder(path: Path, *, which=FIRST, ends=True, **changes) -> Path:
    """The checkpoint with the bundled tokenizer, which puts <bos> in front of a text and, with `ends`, <eos> behind."""
    given = {"dtype": "F32", "vocab_size": VOCABULARY}
    if which == FIRST:
        write_tiny_encoder(path, **given | {"dense": (320, 160), "sliding_window": WINDOW} | changes)
    else:
        write_tiny_encoder2(path, **given | {"sliding_window": RADIUS} | changes)
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
def whole(path: Path):
    """Transformers' class of a checkpoint, eager, float32."""
    import torch
    from transformers import AutoModel

    return AutoModel.from_pretrained(path, attn_implementation="eager", dtype=torch.float32).eval()


def stock(path: Path):
    """That of its text model."""
    return getattr(whole(path), "language_model", whole(path))


def stock_states(path: Path, ids) -> np.ndarray:
    """[tokens, hidden] of one text alone, without padding."""
    import torch

    with torch.no_grad():
        return whole(path)(torch.tensor([list(ids)]), use_cache=False).last_hidden_state[0].numpy()


def stock_vector(path: Path, ids) -> np.ndarray:
    """The text's vector in float64: mean over its tokens, dense layers, length 1."""
    vector = stock_states(path, ids).astype(np.float64).mean(0)
    for folder in sorted(one.name for one in path.glob("*_Dense")):
        vector = load_file(path / folder / "model.safetensors")["linear.weight"].astype(np.float64) @ vector
    return vector / np.linalg.norm(vector)


def texts(lengths=(60, 41, 7, 1), seed=3) -> list[list[int]]:
    """Token ids of texts of unequal lengths: six windows and less."""
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCABULARY, length).tolist() for length in lengths]
