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

from gemma_deploy.evaluation.perplexity import measure
from gemma_deploy.evaluation.tasks import SEQLEN, open_pair
from gemma_deploy.evaluation.texts import make_windows, read_text
from gemma_deploy.parity.gates import sqnr_line


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=16384)
    arguments = parser.parse_args()
    started = time.perf_counter()
    pair = open_pair(str(arguments.artifact), "hf", str(arguments.checkpoint), task="ppl")
    artifact = pair.target.artifact
    seqlen = min(SEQLEN, pair.longest)
    text, name = read_text(arguments.text)
    encode, bos = pair.target.encoder()
    texts = make_windows(text, encode, bos, count=-(-arguments.tokens // (seqlen - 1)), seqlen=seqlen, name=name)
    metrics = measure(pair.target, pair.reference, texts).metrics
    sqnr = {row.name: row.sqnr_db for row in artifact.manifest.params if row.sqnr_db is not None}
    layers = {name: value for name, value in sqnr.items() if ".layers." in name}
    stored = sum(file.stat().st_size for file in arguments.artifact.iterdir())
    parameters = (arguments.artifact / "params.safetensors").stat().st_size
    weights = sum(prod(row.shape) for row in artifact.manifest.params if row.dtype == "int8")
    scales = sum(row.nbytes for row in artifact.manifest.params if row.name.endswith(".scale"))
    print(
        json.dumps(
            {
                "scheme": artifact.manifest.scheme,
                "windows": len(texts.ids),
                "positions": metrics.positions,
                "perplexity_fp32": metrics.ppl_reference,
                "perplexity": metrics.ppl_test,
                "perplexity_change": metrics.ppl_delta,
                "perplexity_change_standard_error": metrics.ppl_error,
                "mean_kl": metrics.kl_mean,
                "top1": metrics.top1,
                "lowest_layer_sqnr_db": sqnr_line(artifact.manifest.params).value,
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
