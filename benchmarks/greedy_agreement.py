"""How often an artifact chooses the token that float32 chooses, while float32 decodes greedily.

    python benchmarks/greedy_agreement.py ARTIFACT --checkpoint DIR --text wikitext2_valid.txt --json result.json

Prompts are passages of the text, evenly spread, BOS in front. Float32 is transformers' class with eager attention and a
cache; it decodes on where it gives EOS. The artifact, strict, then sees float32's own tokens, and at every decoded
position its largest logit counts. A base model that decodes greedily ends in loops, where everybody agrees, so the
first 32 tokens of each prompt stand apart. Every difference is listed: a near-tie is one where the artifact's logits
are off by more than what separates float32's choice from its second.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from gemma_deploy.evaluation.models import in_chunks, positions_at_once
from gemma_deploy.evaluation.tasks import Comparison, open_pair
from gemma_deploy.evaluation.texts import read_text

FIRST = 32


def prompts_of(text: Path, pair: Comparison, count: int, length: int) -> list[list[int]]:
    """`count` passages of `length` tokens, BOS included."""
    whole, _ = read_text(text)
    encode, bos = pair.target.encoder()
    step = len(whole) // count
    return [[bos, *encode(whole[i * step : i * step + 16 * length])][:length] for i in range(count)]


def decoded(checkpoint: Path, prompts: list[list[int]], tokens: int) -> list[tuple[int, ...]]:
    """Prompts with what float32 makes of them."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager", dtype=torch.float32).eval()
    ids = torch.tensor(prompts)
    with torch.inference_mode():
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens
        )
    return [tuple(row) for row in made.tolist()]


def compare(pair: Comparison, sequences: list[tuple[int, ...]], start: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Whether the choices are the same, [sequences, decoded], and what is known about those that are not."""
    same = np.zeros((len(sequences), len(sequences[0]) - start), bool)
    listed, block = [], positions_at_once(pair.target.vocab_size)
    for first, found in in_chunks(pair.models, sequences):
        at = [(i, p) for i in range(len(found[0])) for p in range(start - 1, len(sequences[0]) - 1)]
        for begin in range(0, len(at), block):
            part = at[begin : begin + block]
            exact, test = (
                model.source.head(np.stack([rows[i][p] for i, p in part]))
                for model, rows in zip(pair.models, found, strict=True)
            )
            for (i, p), reference, tested in zip(part, exact, test, strict=True):
                choice, other = int(reference.argmax()), int(tested.argmax())
                same[first + i, p + 1 - start] = choice == other
                if choice != other:
                    margin = float(reference[choice] - np.partition(reference, -2)[-2])
                    listed.append(
                        {
                            "prompt": first + i,
                            "decoded": p + 1 - start,
                            "float32": choice,
                            "artifact": other,
                            "margin": margin,
                            "near_tie": margin < float(np.abs(reference - tested).max()),
                        }
                    )
    return same, listed


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--decode", type=int, default=512)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    pair = open_pair(str(arguments.artifact), "hf", str(arguments.checkpoint), task="ppl")
    room = pair.longest - arguments.prompt_tokens
    if arguments.decode > room:
        parser.error(f"the artifact takes {pair.longest} tokens in all: give --decode {room}")
    prompts = prompts_of(arguments.text, pair, arguments.prompts, arguments.prompt_tokens)
    sequences = decoded(arguments.checkpoint, prompts, arguments.decode)
    same, listed = compare(pair, sequences, arguments.prompt_tokens)
    result = {
        "scheme": pair.target.scheme,
        "prompts": len(prompts),
        "decoded_tokens_each": arguments.decode,
        "agreement": float(same.mean()),
        f"agreement_first_{FIRST}": float(same[:, :FIRST].mean()),
        "prefix": [int(np.argmin(row)) if not row.all() else len(row) for row in same],
        "disagreements": len(listed),
        "near_ties": sum(one["near_tie"] for one in listed),
        "listed": listed,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))
    for one in listed:
        kind = "near-tie" if one["near_tie"] else "DIFFERS"
        print(f"prompt {one['prompt']:2} token {one['decoded']:3}: float32 {one['float32']}, artifact "
              f"{one['artifact']}, margin {one['margin']:.3f}  {kind}")  # fmt: skip
    print(json.dumps({key: value for key, value in result.items() if key != "listed"}, indent=1))


if __name__ == "__main__":
    main()
