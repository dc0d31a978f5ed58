"""Greedy text from a static artifact (`backend.type: tvm_vacc`) with ONNX Runtime and NumPy, and without gemma-deploy.

Use: python examples/static_ort.py workspace/NAME "Return the" [NEW_TOKENS]

docs/plain-onnxruntime.md explains it. Undivided artifacts of one sequence (`frontend.shape.batch: 1`), any dtype.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer


def generate(artifact: Path, prompt: list[int], new_tokens: int, stop_ids: set[int]) -> Iterator[int]:
    """Yield greedy tokens until a stop token, `new_tokens` of them or the end of the cache.

    Args:
        artifact: directory with iter0.onnx, iter1.onnx and params.safetensors.
        prompt: token ids, BOS first: at least one, at most P.
    """
    prefill, decode = (ort.InferenceSession(artifact / f"{name}.onnx") for name in ("iter0", "iter1"))
    ports = {port.name: port for port in (*prefill.get_inputs(), *decode.get_inputs())}
    numpy_types = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}
    P = prefill.get_inputs()[0].shape[1]  # tokens that the prefill graph takes
    C = decode.get_inputs()[1].shape[1] - 1  # slots of the cache
    assert 0 < len(prompt) <= P, f"1 to {P} tokens"

    # The prompt stands at the right end: the prefill graph returns the logits of its last position.
    padding = P - len(prompt)
    ids = np.array([[0] * padding + prompt], np.int64)
    mask = np.array([[0] * padding + [1] * len(prompt)], np.int64)
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)  # 0, 1, 2, ... from the first real token on
    names = [port.name for port in prefill.get_outputs()]
    feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    outputs = dict(zip(names, prefill.run(None, feeds), strict=True))

    # Caches of C slots; the prompt, its padding included, fills the first P.
    caches = {name: port for name, port in ports.items() if name.startswith("past_key_values.")}
    past = {name: np.zeros(port.shape, numpy_types[port.type]) for name, port in caches.items()}
    for name, cache in past.items():
        cache[:, :, :P] = outputs[name.replace("past_key_values", "present")]

    # C + 1 columns: one for each slot of the cache, and the last for the token that is being read.
    mask = np.concatenate([mask, np.zeros((1, C - P), np.int64), np.ones((1, 1), np.int64)], axis=1)
    names = [port.name for port in decode.get_outputs()]
    for slot in range(P, min(P + new_tokens, C + 1)):
        token = int(outputs["logits"][0, -1].argmax())
        if token in stop_ids:
            return
        yield token
        if slot == C:
            return
        position = len(prompt) + slot - P
        feeds = {"input_ids": [[token]], "attention_mask": mask, "position_ids": [[position]]}
        feeds = {name: np.asarray(value, np.int64) for name, value in feeds.items()}
        outputs = dict(zip(names, decode.run(None, feeds | past), strict=True))
        # The graph returns the new token's keys and values alone. They go into the next free slot.
        for name, cache in past.items():
            cache[:, :, slot] = outputs[name.replace("past_key_values", "present")][:, :, 0]
        mask[:, slot] = 1


def main(artifact: Path, text: str, new_tokens: int = 32) -> None:
    """Print the text and what the model adds to it."""
    tokenizer = Tokenizer.from_file(str(artifact / "tokenizer.json"))
    config = json.loads((artifact / "generation_config.json").read_text(encoding="utf-8"))
    bos, stops = config["bos_token_id"], config["eos_token_id"]
    prompt = tokenizer.encode(text, add_special_tokens=False).ids
    new = generate(artifact, [bos, *prompt], new_tokens, set(stops if isinstance(stops, list) else [stops]))
    print(tokenizer.decode([*prompt, *new]))


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:4]))
