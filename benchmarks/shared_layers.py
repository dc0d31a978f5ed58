"""What a prompt costs with layers that share keys and values computed for its last token alone, beside all tokens.

usage: shared_layers.py ARTIFACT [--tokens 512] [--repeats 3]

Weights must be random: ONNX Runtime keeps packed matrices of equal content once, which those of zeros all have.

ARTIFACT is one of `backend.type: onnxruntime` of a Gemma 4 E2B or E4B, with a context of 16 more. Both graphs are
its own: in the second the last token is chosen behind the last layer, as in graphs of other models. Also told: memory
behind a prompt as `run` reads it in ONNX Runtime (`run_...`, without tokenizer), and of a plain session, beside the
file's bytes without the table of per-layer vectors: what is its own (`held`), and what is resident with the pages of
mapped files that were read, which the system may take back (the table's rows are looked up there).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from gemma_deploy.artifact.manifest import Manifest
from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.backends.onnxruntime.decoder import NORMED
from gemma_deploy.backends.onnxruntime.exact import CHOSEN
from gemma_deploy.backends.onnxruntime.in_place import OrtModel
from gemma_deploy.backends.onnxruntime.options import GRAPH
from gemma_deploy.backends.onnxruntime.window import empty_caches
from gemma_deploy.machine import give_memory_back
from gemma_deploy.names import GIB, PER_LAYER_TABLE
from gemma_deploy.runtime.session import load_file, open_graph


def chosen_late(model: ir.Model) -> None:
    """Choose the token behind the last layer. In place."""
    graph = model.graph
    early = [node for node in graph if str(node.outputs[0].name).endswith(CHOSEN)]
    wanted = early[0].inputs[1]
    for node in early:
        whole = node.inputs[0]
        assert whole is not None
        ir.convenience.replace_all_uses_with([node.outputs[0]], [whole])
        graph.remove(node, safe=True)
    normed = next(value for node in graph for value in node.outputs if value.name == NORMED)
    users = list(normed.uses())
    late = ir.node("GatherND", [normed, wanted], {"batch_dims": 1})
    late.outputs[0].name = f"{NORMED}{CHOSEN}"
    graph.insert_after(normed.producer(), late)  # type: ignore[arg-type]
    for user, index in users:
        user.replace_input_with(index, late.outputs[0])


def resident() -> np.ndarray:
    """Bytes of this process that are in memory: pages of mapped files among them, and without."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return np.array([int(fields[name].split()[0]) << 10 for name in ("VmRSS", "RssAnon")])


def seconds(session: Any, tokens: int, repeats: int) -> tuple[float, np.ndarray]:
    """Median of a prompt, and the logits it gives."""
    ids = np.random.default_rng(0).integers(3, 262144, (1, tokens))
    feeds = {"input_ids": ids, "attention_mask": np.ones((1, tokens), np.int64)} | empty_caches(session, {})
    session.run(["logits"], feeds)
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        (logits,) = session.run(["logits"], feeds)
        times.append(time.perf_counter() - started)
    return statistics.median(times), logits


def as_run(artifact: Path, manifest: Manifest, tokens: int) -> np.ndarray:
    """Bytes as of `resident` that a prompt leaves in the engine, weights and cache included."""
    before = resident()
    sequence = OrtModel(artifact, manifest).sequence(tokens + 16)
    give_memory_back()
    sequence.read(np.random.default_rng(0).integers(3, 262144, tokens).tolist())
    return resident() - before


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    manifest = Artifact.open(args.artifact).manifest
    table = sum(row.nbytes for row in manifest.params if row.name.startswith(f"{PER_LAYER_TABLE}."))
    rest = manifest.table.file_bytes - table
    engine = as_run(args.artifact, manifest, args.tokens)
    own = load_file(args.artifact / GRAPH)
    before = resident()
    session = open_graph(own, args.artifact.resolve(), strict=False)
    early, first = seconds(session, args.tokens, args.repeats)
    mapped_too, held = (int(size) for size in resident() - before)
    del session
    late_graph = load_file(args.artifact / GRAPH)
    chosen_late(late_graph)
    late, second = seconds(open_graph(late_graph, args.artifact.resolve(), strict=False), args.tokens, args.repeats)
    error = float(np.abs(first - second).max()) / max(1.0, float(np.abs(second).max()))
    found = {
        "tokens": args.tokens, "last_alone_s": round(early, 3), "all_s": round(late, 3),
        "times": round(late / early, 2), "relative_error": error, "resident_gib": round(mapped_too / GIB, 2),
        "held_gib": round(held / GIB, 2), "run_resident_gib": round(int(engine[0]) / GIB, 2),
        "run_held_gib": round(int(engine[1]) / GIB, 2), "run_resident_to_file": round(int(engine[0]) / rest, 2),
        "run_held_to_file": round(int(engine[1]) / rest, 2),
        "file_without_table_gib": round(rest / GIB, 2), "table_gib": round(table / GIB, 2),
        "resident_to_file": round(mapped_too / rest, 2), "held_to_file": round(held / rest, 2),
    }  # fmt: skip
    print("RESULT " + json.dumps(found))


if __name__ == "__main__":
    main()
