"""Perplexity, KL and top-1 agreement of an artifact against its float32 checkpoint, and the artifact's size.

    python benchmarks/quality.py ARTIFACT --checkpoint DIR --text wikitext2_valid.txt --tokens 16384

The text is cut into windows as long as the artifact's prefill (at most 512), BOS in front of each. The artifact runs in
strict sessions, its own graphs layer by layer; the reference is transformers' class with eager attention.
"""

from __future__ import annotations

import argparse
import json
import time
from math import prod
from pathlib import Path

from gemma_deploy.artifact import Artifact
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.parity.cases import Case
from gemma_deploy.parity.compare import BLOCK_BYTES
from gemma_deploy.parity.gates import sqnr_line
from gemma_deploy.parity.metrics import Comparison
from gemma_deploy.parity.reference import TorchSource
from gemma_deploy.parity.segments import StrictSource
from gemma_deploy.runtime import Tokenizer

WINDOWS_AT_ONCE = 4


def windows(path: Path, tokenizer: Tokenizer, length: int, tokens: int) -> list[tuple[int, ...]]:
    """Windows of `length` ids, BOS included, `tokens` scored ids in all."""
    bos, *ids = tokenizer.encode(path.read_text(encoding="utf-8"))
    step = length - 1
    return [(bos, *ids[at : at + step]) for at in range(0, min(tokens, len(ids) - step), step)]


def measure(artifact: Artifact, checkpoint: Checkpoint, texts: list[tuple[int, ...]]) -> Comparison:
    """Compare all positions of all windows."""
    hf, strict, comparison = TorchSource(checkpoint, "hf"), StrictSource(artifact.path), Comparison()
    block = max(1, BLOCK_BYTES // (4 * checkpoint.config.vocab_size)) * 4
    batch = strict.contract.batch
    for first in range(0, len(texts), WINDOWS_AT_ONCE * batch):
        chunk = texts[first : first + WINDOWS_AT_ONCE * batch]
        rows = [chunk[i : i + batch] for i in range(0, len(chunk) - len(chunk) % batch, batch)]
        cases = [Case("text", tuple(group), ((),) * batch) for group in rows]
        reference, test = hf.run(cases), strict.run(cases)
        for c, case in enumerate(cases):
            for row, prompt in enumerate(case.prompts):
                for start in range(0, len(prompt) - 1, block):
                    stop = min(start + block, len(prompt) - 1)
                    expected = hf.head(reference[c][row][start:stop])
                    got = strict.head(test[c][row][start:stop])
                    for i in range(stop - start):
                        comparison.add(expected[i], got[i], prompt[start + i + 1], first + c * batch + row)
    return comparison


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=16384)
    arguments = parser.parse_args()
    artifact, checkpoint = Artifact.open(arguments.artifact), Checkpoint.open(arguments.checkpoint)
    length = min(512, artifact.manifest["contract"]["prefill"])
    texts = windows(arguments.text, Tokenizer(arguments.artifact), length, arguments.tokens)
    started = time.perf_counter()
    metrics = measure(artifact, checkpoint, texts).result()
    sqnr = {row.name: row.sqnr_db for row in artifact.params.rows if row.sqnr_db is not None}
    layers = {name: value for name, value in sqnr.items() if ".layers." in name}
    stored = sum(file.stat().st_size for file in arguments.artifact.iterdir())
    parameters = (arguments.artifact / "params.safetensors").stat().st_size
    weights = sum(prod(row.shape) for row in artifact.params.rows if row.dtype == "int8")
    scales = sum(row.nbytes for row in artifact.params.rows if row.name.endswith(".scale"))
    print(
        json.dumps(
            {
                "scheme": artifact.manifest["scheme"],
                "windows": len(texts),
                "positions": metrics.positions,
                "perplexity_fp32": metrics.ppl_reference,
                "perplexity": metrics.ppl_test,
                "perplexity_change": metrics.ppl_delta,
                "perplexity_change_standard_error": metrics.ppl_error,
                "mean_kl": metrics.kl_mean,
                "top1": metrics.top1,
                "lowest_layer_sqnr_db": sqnr_line(artifact.manifest["params"]).value,
                "lowest_matrix_sqnr_db": min(layers.values(), default=None),
                "table_sqnr_db": sqnr.get("model.embed_tokens.weight"),
                "artifact_bytes": stored,
                "params_bytes": parameters,
                "int8_weights_and_scales_bytes": weights + scales,
                "params_bytes_ratio": parameters / (weights + scales) if weights else None,
                "seconds": round(time.perf_counter() - started, 1),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
