"""Wall time, CPU time and peak RSS of the weightless export of both graphs, each shape in a process of its own.

    python benchmarks/export_time.py

Imports are part of the time: a user waits for them as well.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

SHAPES = {
    "gemma-2b, 18 layers": {
        "model_type": "gemma", "vocab_size": 256000, "hidden_size": 2048, "intermediate_size": 16384,
        "num_hidden_layers": 18, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256,
        "max_position_embeddings": 8192, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
    },
    "27B, 46 layers, two kinds": {
        "model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 4608, "intermediate_size": 36864,
        "num_hidden_layers": 46, "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128,
        "query_pre_attn_scalar": 144, "sliding_window": 4096, "max_position_embeddings": 8192, "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
    },
}  # fmt: skip


def export(shape: str, scheme: str, prefill: int, context: int) -> dict[str, float]:
    """Export in this process and measure it."""
    started, cpu = time.perf_counter(), time.process_time()
    from gemma_deploy.checkpoint import ModelConfig
    from gemma_deploy.graph.contract import GraphContract
    from gemma_deploy.graph.export import export_graphs

    config = ModelConfig.from_dict(SHAPES[shape], shape)
    imported = time.perf_counter()
    graphs = export_graphs(config, scheme, GraphContract.of(config, scheme, 1, prefill=prefill, context=context))  # type: ignore[arg-type]
    return {
        "wall": time.perf_counter() - started,
        "cpu": time.process_time() - cpu,
        "imports": imported - started,
        "nodes": sum(len(graph.graph) for graph in graphs.values()),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    """Measure every shape in a child process, three times."""
    if len(sys.argv) > 1:
        print(json.dumps(export(sys.argv[1], "w8a16", 1024, 2048)))
        return
    print(f"{'shape':28} {'wall s':>18} {'cpu s':>18} {'nodes':>7} {'peak MiB':>9}   load {os.getloadavg()[0]:.1f}")
    for shape in SHAPES:
        runs = [
            json.loads(
                subprocess.run(
                    [sys.executable, str(Path(__file__)), shape], check=True, capture_output=True, text=True
                ).stdout.splitlines()[-1]
            )
            for _ in range(3)
        ]
        walls, cpus = ([round(run[key], 1) for run in runs] for key in ("wall", "cpu"))
        print(f"{shape:28} {walls!s:>18} {cpus!s:>18} {runs[0]['nodes']:>7} {runs[0]['peak_mib']:>9.0f}")


if __name__ == "__main__":
    main()
