"""Streams a checkpoint into params.safetensors: flat memory, several tensors at once, resumable after kill -9.

Workers run jobs (stream.py); the calling thread makes what they finished durable, notes it in the journal, and reports
progress. The bytes written depend on the plan and the checkpoint only, not on workers, block size or interruptions.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path

from gemma_deploy.checkpoint import WeightSource
from gemma_deploy.errors import ParamsError
from gemma_deploy.machine import one_torch_thread
from gemma_deploy.params import gguf
from gemma_deploy.params.journal import Journal, read_finished
from gemma_deploy.params.layout import Layout, lay_out
from gemma_deploy.params.plan import ParamSpec
from gemma_deploy.params.stream import BadTensorError, Buffers, WriteJob, run_job
from gemma_deploy.params.table import ParamRow, ParamTable, hash_span, in_file_order
from gemma_deploy.progress import Tick
from gemma_deploy.provenance import code_of
from gemma_deploy.schemes import Naming
from gemma_deploy.writing import sync

logger = logging.getLogger(__name__)

BLOCK_BYTES = 2 << 20
# Written pages are dropped from the page cache this often: recycled pages made writing 2 to 5 times as fast as
# fresh ones on a virtual machine, and the machine's cache is left to others.
DROP_BYTES = 64 << 20
POLL_SECONDS = 0.05
MOST_BAD = 20


def write_params(
    checkpoint: WeightSource,
    plan: Sequence[ParamSpec],
    out_path: Path,
    *,
    workers: int = 2,
    progress: Tick | None = None,
    journal: Path,
    block_bytes: int = BLOCK_BYTES,
    naming: Naming = "own",
    front: bytes = b"",
) -> ParamTable:
    """Write every tensor of the plan and return the table of what was written.

    A finished file is recognised by the journal's key and the file's size and time, and left alone; an interrupted one
    is continued (its finished tensors are hashed again). A file of another key under `out_path` is removed at once, so
    that it cannot be taken for the result. Until all is written the file is called `out_path` + ".partial".

    Args:
        checkpoint: where the weights come from.
        plan: what to write (`build_plan`).
        out_path: the finished file.
        workers: threads, each working on one tensor at a time.
        progress: called from this thread with (bytes written, bytes in all).
        journal: file that remembers what is finished; keep it beside `out_path` or in the workspace.
        block_bytes: source bytes per row block.
        naming: what tensors are called in the file; front: what stands in front of them there (layout.py).

    Raises:
        ParamsError: NaN or infinity in a weight (all tensors are named), disk full, not writable, or the checkpoint
            changed on the way.
    """
    layout = lay_out(plan, naming, front=front)
    ahead = _front_rows(layout, front)
    fingerprint = checkpoint.weights_fingerprint()
    with _disk_errors(out_path, layout), contextlib.closing(Journal(journal, _key(plan, layout, fingerprint))) as log:
        if _is_finished(log.file, out_path, layout):
            return in_file_order([*ahead, *(row for rows in log.finished.values() for row in rows)])
        run = _Run(checkpoint, plan, layout, out_path=out_path, log=log)
        if not _is_finished(log.file, run.partial, layout):
            run.prepare()
            run.write(workers, block_bytes, progress)
            if checkpoint.weights_fingerprint() != fingerprint:
                raise ParamsError(
                    "the checkpoint changed while it was read",
                    where=str(checkpoint.path),
                    next_step="leave it alone and start again",
                )
        return in_file_order([*ahead, *run.commit().rows])


def finished_table(
    checkpoint: WeightSource,
    plan: Sequence[ParamSpec],
    out_path: Path,
    *,
    journal: Path,
    naming: Naming = "own",
    front: bytes = b"",
) -> ParamTable | None:
    """The table of a file that `write_params` would leave alone, else None. Reads no tensor and changes nothing."""
    layout = lay_out(plan, naming, front=front)
    rows, record = read_finished(journal, _key(plan, layout, checkpoint.weights_fingerprint()))
    return in_file_order([*_front_rows(layout, front), *rows]) if _is_finished(record, out_path, layout) else None


def refuse_bad_tensors(checkpoint: WeightSource, plan: Sequence[ParamSpec], *, block_bytes: int = BLOCK_BYTES) -> None:
    """Read everything the plan reads and write nothing.

    Raises:
        ParamsError: as `write_params`, where a value is NaN or infinite.
    """
    bad: list[str] = []
    buffers, nowhere = Buffers(), os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        for job in _jobs(plan, lay_out(plan)):
            try:
                run_job(job, checkpoint, nowhere, buffers=buffers, block_bytes=block_bytes, wrote=lambda count: None)
            except BadTensorError as error:
                bad.append(str(error))
            if len(bad) >= MOST_BAD:
                break
    finally:
        os.close(nowhere)
    if bad:
        raise _bad_tensors(checkpoint, bad, all_of_them=len(bad) < MOST_BAD)


class _Run:
    """One file being written."""

    def __init__(
        self, checkpoint: WeightSource, plan: Sequence[ParamSpec], layout: Layout, *, out_path: Path, log: Journal
    ) -> None:
        self.checkpoint, self.layout, self.out_path, self.log = checkpoint, layout, out_path, log
        self.partial = out_path.with_name(out_path.name + ".partial")
        self.jobs = _jobs(plan, layout)
        self.stop, self.lock = threading.Event(), threading.Lock()
        self.written = self.flushed = 0
        self.local = threading.local()

    def prepare(self) -> None:
        """Continue the partial file, or begin one with all its space reserved, so that a full disk shows at once."""
        self.out_path.parent.mkdir(parents=True, exist_ok=True)
        size = self.partial.stat().st_size if self.partial.is_file() else 0
        resume = self.log.matched and size == self.layout.file_bytes
        self.out_path.unlink(missing_ok=True)
        self.log.start(afresh=not resume)
        if not resume:
            self.partial.unlink(missing_ok=True)
        self.fd = os.open(self.partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if not resume:
                _reserve(self.fd, self.layout.file_bytes)
            os.pwrite(self.fd, self.layout.header, 0)
        except BaseException:
            os.close(self.fd)
            self.partial.unlink(missing_ok=True)
            raise

    def write(self, workers: int, block_bytes: int, progress: Tick | None) -> None:
        """Run all jobs; whatever ends this early leaves a journal of what is finished."""
        bad: list[str] = []
        try:
            with one_torch_thread(), ThreadPoolExecutor(max(1, workers), "params") as pool:
                try:
                    pending = {pool.submit(self.run, job, block_bytes) for job in self.jobs}
                    while pending:
                        ready, pending = wait(pending, POLL_SECONDS, FIRST_COMPLETED)
                        self.note(ready, bad)
                        if self.written - self.flushed >= DROP_BYTES:
                            self.flush()
                        if progress:
                            progress(min(self.written, self.layout.file_bytes), self.layout.file_bytes)
                        if len(bad) >= MOST_BAD:
                            break
                except BaseException:
                    self.stop.set()
                    pool.shutdown(wait=True, cancel_futures=True)
                    raise
                if pending:
                    self.stop.set()
                    pool.shutdown(wait=True, cancel_futures=True)
        finally:
            os.close(self.fd)
        if bad:
            raise _bad_tensors(self.checkpoint, bad, all_of_them=not pending)

    def run(self, job: WriteJob, block_bytes: int) -> tuple[WriteJob, list[ParamRow]]:
        """In a worker: write one job, unless a run before this one did."""
        rows = self.log.finished.get(job.name)
        if rows and all(hash_span(self.partial, row.offset, row.nbytes) == row.sha256 for row in rows):
            self.wrote(job.nbytes)
            return job, rows
        if rows:
            logger.warning("%s in %s is not what was written: writing it again", job.name, self.partial)
        if not hasattr(self.local, "buffers"):
            self.local.buffers = Buffers()
        return job, run_job(
            job, self.checkpoint, self.fd, buffers=self.local.buffers, block_bytes=block_bytes, wrote=self.wrote
        )

    def wrote(self, count: int) -> None:
        """Count bytes for the progress, and end the worker when the run is being stopped."""
        if self.stop.is_set():
            raise _StoppedError
        with self.lock:
            self.written += count

    def flush(self) -> None:
        """Wait until what is written is on disk, and let the system reuse its page cache."""
        self.flushed = self.written
        os.fdatasync(self.fd)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def note(self, ready: set[Future[tuple[WriteJob, list[ParamRow]]]], bad: list[str]) -> None:
        """Make finished jobs durable: first the data, then their lines. Collect bad tensors, pass other failures on."""
        done, failure = [], None
        for future in ready:
            error = future.exception()
            if error is None:
                done.append(future.result())
            elif isinstance(error, BadTensorError):
                bad.append(str(error))
            else:
                failure = error
        fresh = [(job.name, rows) for job, rows in done if self.log.finished.get(job.name) != rows]
        if fresh:
            self.flush()
            self.log.finish_jobs(fresh)
            self.log.finished.update(fresh)
        if failure is not None:
            raise failure

    def commit(self) -> ParamTable:
        """Everything durable, then noted, then renamed (which keeps the time that was noted)."""
        fd = os.open(self.partial, os.O_RDONLY | os.O_CLOEXEC)
        os.fsync(fd)
        if self.log.file is None:
            self.log.finish_file(os.fstat(fd))
        os.close(fd)
        os.replace(self.partial, self.out_path)
        sync(self.out_path.parent)
        return in_file_order([row for rows in self.log.finished.values() for row in rows])


def _bad_tensors(checkpoint: WeightSource, bad: Sequence[str], *, all_of_them: bool) -> ParamsError:
    return ParamsError(
        f"{len(bad)} tensor(s){'' if all_of_them else ' or more'} hold values that cannot be stored",
        where=str(checkpoint.path),
        problems=sorted(bad),
        expected="finite numbers within the range of the stored dtype",
        next_step="copy or download the checkpoint again; what is only too large for float16 fits bf16 or int8",
    )


def _front_rows(layout: Layout, front: bytes) -> list[ParamRow]:
    """The row of what stands in front, where there is anything: `verify` compares it by that."""
    if (at := layout.front) is None:
        return []
    digest = hashlib.sha256(front).hexdigest()
    return [ParamRow(at.name, "uint8", at.shape, at.offset, at.nbytes, digest, gguf.FRONT_KIND)]


class _StoppedError(Exception):
    """Ends a worker whose run has failed elsewhere."""


def _jobs(plan: Sequence[ParamSpec], layout: Layout) -> list[WriteJob]:
    """The plan's tensors grouped by source, largest first, so that no worker ends long after the others."""
    groups: dict[str, list[ParamSpec]] = {}
    for spec in plan:
        groups.setdefault(spec.source or spec.name, []).append(spec)
    jobs = [
        WriteJob(name, tuple(specs), tuple(layout.offsets[s.name] for s in specs)) for name, specs in groups.items()
    ]
    return sorted(jobs, key=lambda job: -job.nbytes)


def _key(plan: Sequence[ParamSpec], layout: Layout, fingerprint: str) -> str:
    """Sha256 over all the bytes depend on: plan, layout, checkpoint, and the code that makes them."""
    digest = hashlib.sha256(json.dumps([asdict(spec) for spec in plan], sort_keys=True).encode())
    digest.update(layout.header)
    digest.update(fingerprint.encode())
    code = code_of((__name__,))
    digest.update(f"{code.sha256} {code.versions}".encode())
    return digest.hexdigest()


def _is_finished(record: dict[str, int] | None, path: Path, layout: Layout) -> bool:
    if record is None or not path.is_file():
        return False
    stat = path.stat()
    return record == {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns} and stat.st_size == layout.file_bytes


def _reserve(fd: int, size: int) -> None:
    try:
        os.posix_fallocate(fd, 0, size)
    except (AttributeError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise
        os.ftruncate(fd, size)


@contextlib.contextmanager
def _disk_errors(out_path: Path, layout: Layout) -> Iterator[None]:
    """Turn the system's refusals into one sentence."""
    try:
        yield
    except OSError as error:
        large, full = error.errno == errno.EFBIG, error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = f"cannot be written: {error.strerror or error}"
        step = "make the directory writable or choose another workspace (workspace.path)"
        if full:
            what = "no space left for the parameters"
            step = "free space or choose another workspace (workspace.path), and run again: it continues"
        elif large:
            what = "the parameters are larger than a file may be here"
            step = "raise the limit (ulimit -f) or choose another disk (workspace.path), and run again: it continues"
        raise ParamsError(
            what,
            where=str(error.filename or out_path),
            expected=f"{layout.file_bytes} bytes ({layout.file_bytes / 2**30:.2f} GiB)" if full or large else None,
            next_step=step,
        ) from error
