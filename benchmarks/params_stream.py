"""Speed and memory of the parameter stage against the disk: read once, write once, stream.

    python benchmarks/params_stream.py CHECKPOINT --scheme w8a16 --out DIR

The checkpoint's cached pages are dropped before each timing (posix_fadvise), so no root is needed.
"""

from __future__ import annotations

import os
import resource
import tempfile
import time
from pathlib import Path

import click

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.params import build_plan, write_params
from gemma_deploy.params.layout import lay_out
from gemma_deploy.params.writer import BLOCK_BYTES

CHUNK_BYTES = 4 << 20


def drop(paths: list[Path] | tuple[Path, ...]) -> None:
    """Forget the files' cached pages."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def read_seconds(paths: tuple[Path, ...]) -> float:
    """Time to read the files once, from disk."""
    drop(paths)
    start, block = time.perf_counter(), bytearray(CHUNK_BYTES)
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(block):
                pass
    return time.perf_counter() - start


def write_seconds(directory: Path, count: int) -> float:
    """Time to write that many bytes and have them on disk."""
    block, path = os.urandom(CHUNK_BYTES), directory / "write_once.bin"
    start = time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        for begin in range(0, count, CHUNK_BYTES):
            file.write(block[: count - begin])
        os.fdatasync(file.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return seconds


def peak_mib() -> float:
    """Peak RSS of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@click.command()
@click.argument("checkpoint")
@click.option("--scheme", default="w8a16", type=click.Choice(["fp32", "fp16", "bf16", "w8a16"]))
@click.option("--context", default=2048)
@click.option("--workers", default=2)
@click.option("--block-mib", default=BLOCK_BYTES / 2**20)
@click.option("--out", type=click.Path(path_type=Path), default=None, help="directory on the disk to measure")
@click.option("--limits/--no-limits", default=True, help="measure read-once and write-once too")
def main(
    checkpoint: str, scheme: str, context: int, workers: int, block_mib: float, out: Path | None, limits: bool
) -> None:
    """Print one line per measurement."""
    source = Checkpoint.open(checkpoint)
    plan = build_plan(source.config, scheme, context)  # type: ignore[arg-type]
    total_in = sum(path.stat().st_size for path in source.weight_files)
    total_out = lay_out(plan).file_bytes
    import torch  # noqa: F401  the compile has it in memory anyway

    with tempfile.TemporaryDirectory(dir=out) as name:
        directory = Path(name)
        reads = writes = 0.0
        if limits:
            reads = read_seconds(source.weight_files)
            click.echo(f"read once   {reads:7.2f} s  {total_in / 1e9:6.2f} GB  {total_in / 1e9 / reads:5.2f} GB/s")
            writes = write_seconds(directory, total_out)
            click.echo(f"write once  {writes:7.2f} s  {total_out / 1e9:6.2f} GB  {total_out / 1e9 / writes:5.2f} GB/s")
        drop(source.weight_files)
        before, start, cpu = peak_mib(), time.perf_counter(), time.process_time()
        write_params(
            source, plan, directory / "p", workers=workers, journal=directory / "j", block_bytes=int(block_mib * 2**20)
        )
        seconds = time.perf_counter() - start
        ratio = f", {seconds / (reads + writes):.2f} x (read + write)" if limits else ""
        click.echo(
            f"stream      {seconds:7.2f} s  {scheme}, {workers} workers, cpu {time.process_time() - cpu:.2f} s{ratio}"
        )
        click.echo(f"peak RSS    {peak_mib():7.0f} MiB, {before:.0f} before the stream (torch imported)")
        start = time.perf_counter()
        write_params(source, plan, directory / "p", workers=workers, journal=directory / "j")
        click.echo(f"second run  {time.perf_counter() - start:7.2f} s")


if __name__ == "__main__":
    main()
