"""Time and memory of quantizing some layers in threads, processes or on a Ray cluster, and a hash of the result.

    python benchmarks/calibration_workers.py CHECKPOINT [--processes 2] [--cluster HOST:PORT] [--layers 2]

The hash is the same whatever computes the shards. OMP_NUM_THREADS sets the threads of this process.
"""

from __future__ import annotations

import hashlib
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import click


@click.command()
@click.argument("checkpoint")
@click.option("--processes", default=1, show_default=True)
@click.option("--cluster")
@click.option("--layers", default=2, show_default=True, help="First layers to quantize.")
@click.option("--nsamples", default=16, show_default=True)
@click.option("--seqlen", default=512, show_default=True)
def main(checkpoint: str, processes: int, cluster: str | None, layers: int, nsamples: int, seqlen: int) -> None:
    """Quantize the first layers of CHECKPOINT on random tokens."""
    import numpy as np
    import psutil

    from gemma_deploy.calibration.executors import open_executor
    from gemma_deploy.checkpoint import Checkpoint
    from gemma_deploy.machine import peak_rss_bytes
    from gemma_deploy.quantization.layers import quantize_layers
    from gemma_deploy.quantization.solver import Settings

    opened = Checkpoint.open(checkpoint)
    kinds = tuple(opened.config.layer_types[:layers])
    opened = replace(opened, config=replace(opened.config, num_hidden_layers=layers, layer_types=kinds))
    ids = np.random.default_rng(0).integers(4, opened.config.vocab_size, (nsamples, seqlen))
    ids[:, 0] = 2
    others, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.1):
            resident = 0
            for child in psutil.Process().children(recursive=True):
                try:
                    resident = max(resident, child.memory_info().rss)
                except psutil.NoSuchProcess:
                    continue
            others[0] = max(others[0], resident)

    threading.Thread(target=watch, daemon=True).start()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "q"
        started = time.perf_counter()
        with open_executor(folder / "shards", processes=processes, cluster=cluster) as executor:
            quantize_layers(opened, ids, Settings(), folder=folder, key="benchmark", executor=executor)
        seconds = time.perf_counter() - started
        files = sorted(folder.glob("layer-*.safetensors"))
        digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
    stop.set()
    click.echo(
        f"{seconds:7.1f} s  peak {peak_rss_bytes() / 2**20:.0f} MiB, largest child {others[0] / 2**20:.0f} MiB  "
        f"{len(files)} layers {digest}"
    )


if __name__ == "__main__":
    main()
