"""kill -9 at many moments, full disks, Ctrl-C: the file is finished and right, or not there."""

import errno
import json
import os
import resource
import subprocess
import sys

import pytest

from gemma_deploy.errors import ParamsError
from gemma_deploy.params.journal import Journal
from tests.params.make import tiny
from tests.params.test_writer import TRANSPOSED, write

# Forks a child per line of stdin: "COUNT HALF" kills it -9 at its COUNT-th write, sync or rename, after half of the
# bytes when HALF is 1. Prints how the child ended. Importing torch once keeps this fast.
KILLER = """
import os, signal, sys
import torch
from pathlib import Path
from tests.params.test_writer import write
from gemma_deploy.checkpoint import Checkpoint
checkpoint, out, scheme = Checkpoint.open(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
for line in sys.stdin:
    count, half = map(int, line.split())
    child = os.fork()
    if child == 0:
        left = [count]
        def wrap(name):
            call = getattr(os, name)
            def wrapped(*args):
                left[0] -= 1
                if left[0] == 0:
                    if name == "pwrite" and half:
                        call(args[0], bytes(args[1])[: len(args[1]) // 2], args[2])
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args)
            setattr(os, name, wrapped)
        for name in ("pwrite", "fdatasync", "fsync", "replace", "ftruncate"):
            wrap(name)
        try:
            write(checkpoint, out, scheme, block_bytes=20000)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


class Killer:
    def __init__(self, checkpoint, out, scheme):
        self.process = subprocess.Popen(
            [sys.executable, "-c", KILLER, str(checkpoint.path), str(out), scheme],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def run(self, count, half=0):
        self.process.stdin.write(f"{count} {half}\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


@pytest.fixture
def scheme():
    return "w8a16"


@pytest.fixture
def whole(tmp_path, scheme):
    checkpoint = tiny(tmp_path / "c", "gemma3_text")
    path, table = write(checkpoint, tmp_path / "whole", scheme, block_bytes=20000)
    return checkpoint, path.read_bytes(), table


either = pytest.mark.parametrize("scheme", ["w8a16", TRANSPOSED])


@pytest.mark.parametrize("scheme", ["w8a16", pytest.param(TRANSPOSED, marks=pytest.mark.slow)])
def test_killed_at_many_moments_the_bytes_are_the_same(tmp_path, whole, scheme):
    import random

    checkpoint, expected, table = whole
    out, rng = tmp_path / "out", random.Random(7)
    killer = Killer(checkpoint, out, scheme)
    try:
        kills = 0
        for round_number in range(4):
            for path in out.glob("*"):
                path.unlink()
            for _ in range(12):
                code = killer.run(rng.randint(1, 90), rng.randint(0, 1))
                if code == 0:
                    break
                assert code == -9
                kills += 1
                assert not (out / "p.safetensors").exists() or finished(out)
            else:
                assert killer.run(10**9) == 0
            assert (out / "p.safetensors").read_bytes() == expected, round_number
            assert not (out / "p.safetensors.partial").exists()
        assert kills >= 8
        assert write(checkpoint, out, scheme)[1] == table
    finally:
        killer.close()


def finished(out):
    return '{"file"' in (out / "p.journal").read_text()


def interrupted(tmp_path, checkpoint, monkeypatch, scheme="w8a16"):
    """A run stopped by Ctrl-C after a few tensors; returns the names that are finished."""
    written = []

    def progress(done, total):
        written.append(done)
        if len(journal_lines(tmp_path)) > 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(checkpoint, tmp_path, scheme, block_bytes=2000, workers=1, progress=progress)
    return [line["job"] for line in journal_lines(tmp_path) if "job" in line]


def journal_lines(directory):
    return [json.loads(line) for line in (directory / "p.journal").read_text().splitlines()]


def count_jobs(monkeypatch):
    from gemma_deploy.params import writer

    ran, run_job = [], writer.run_job
    monkeypatch.setattr(
        writer, "run_job", lambda job, *rest, **named: (ran.append(job.name), run_job(job, *rest, **named))[1]
    )
    return ran


@either
def test_ctrl_c_leaves_a_partial_that_is_continued(tmp_path, whole, scheme, monkeypatch):
    checkpoint, expected, table = whole
    done = interrupted(tmp_path, checkpoint, monkeypatch, scheme)
    assert done
    assert not (tmp_path / "p.safetensors").exists()
    ran = count_jobs(monkeypatch)
    path, again = write(checkpoint, tmp_path, scheme)
    assert path.read_bytes() == expected
    assert again == table
    assert not set(ran) & set(done)


@either
def test_finished_tensors_are_hashed_again(tmp_path, whole, scheme, monkeypatch, caplog):
    checkpoint, expected, table = whole
    done = interrupted(tmp_path, checkpoint, monkeypatch, scheme)
    partial = tmp_path / "p.safetensors.partial"
    data = bytearray(partial.read_bytes())
    row = next(row for row in table.rows if row.name == done[0])
    data[row.offset] ^= 1
    partial.write_bytes(data)
    ran = count_jobs(monkeypatch)
    path, _ = write(checkpoint, tmp_path, scheme)
    assert path.read_bytes() == expected
    assert done[0] in ran
    assert done[0] in caplog.text
    assert not set(ran) & set(done[1:])


@pytest.mark.parametrize("tail", [b'{"job": "model.layers.1.mlp.up_p', b"\xff\xfe\n", b'{"job"\n{"file": {}}\n'])
def test_torn_journal_lines_are_dropped(tmp_path, whole, monkeypatch, tail):
    checkpoint, expected, _ = whole
    done = interrupted(tmp_path, checkpoint, monkeypatch)
    with open(tmp_path / "p.journal", "ab") as file:
        file.write(tail)
    ran = count_jobs(monkeypatch)
    path, _ = write(checkpoint, tmp_path, "w8a16")
    assert path.read_bytes() == expected
    assert not set(ran) & set(done)
    assert journal_lines(tmp_path)[-1]["file"]["bytes"] == len(expected)


@pytest.mark.parametrize("damage", ["partial gone", "partial short", "journal gone", "journal of another key"])
def test_starts_afresh_when_the_two_do_not_fit(tmp_path, whole, monkeypatch, damage):
    checkpoint, expected, _ = whole
    done = interrupted(tmp_path, checkpoint, monkeypatch)
    partial, journal = tmp_path / "p.safetensors.partial", tmp_path / "p.journal"
    if damage == "partial gone":
        partial.unlink()
    elif damage == "partial short":
        os.truncate(partial, 10000)
    elif damage == "journal gone":
        journal.unlink()
    else:
        lines = journal.read_text().splitlines(keepends=True)
        journal.write_text(json.dumps({"format": 1, "key": "0" * 64}) + "\n" + "".join(lines[1:]))
    ran = count_jobs(monkeypatch)
    path, _ = write(checkpoint, tmp_path, "w8a16")
    assert path.read_bytes() == expected
    assert set(done) <= set(ran)


def test_an_old_result_does_not_survive_a_failed_run(tmp_path, monkeypatch):
    checkpoint = tiny(tmp_path / "c")
    write(checkpoint, tmp_path, "fp32")
    monkeypatch.setattr(os, "pwrite", failing_pwrite(os.pwrite, after=8))
    with pytest.raises(ParamsError):
        write(checkpoint, tmp_path, "fp16", block_bytes=2000)
    assert not (tmp_path / "p.safetensors").exists()


def failing_pwrite(pwrite, after, code=errno.ENOSPC):
    left = [after]

    def wrapped(fd, data, offset):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(code, os.strerror(code))
        return pwrite(fd, data, offset)

    return wrapped


@either
@pytest.mark.parametrize("after", [0, 1, 2, 9, 25])
def test_a_full_disk_says_so_and_can_be_continued(tmp_path, whole, scheme, monkeypatch, after):
    checkpoint, expected, _ = whole
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing_pwrite(os.pwrite, after))
        with pytest.raises(ParamsError, match="no space left") as caught:
            write(checkpoint, tmp_path, scheme, block_bytes=20000)
    assert "free space" in str(caught.value)
    assert not (tmp_path / "p.safetensors").exists()
    path, _ = write(checkpoint, tmp_path, scheme)
    assert path.read_bytes() == expected


def test_space_is_reserved_before_any_work(tmp_path, whole, monkeypatch):
    checkpoint, _, _ = whole
    ran = count_jobs(monkeypatch)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(ParamsError, match="larger than a file may be here") as caught:
            write(checkpoint, tmp_path, "w8a16")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "ulimit -f" in str(caught.value)
    assert not ran
    assert not list(tmp_path.glob("p.safetensors*"))


def test_an_unwritable_place_is_named(tmp_path):
    checkpoint = tiny(tmp_path / "c")
    (tmp_path / "file").write_text("")
    with pytest.raises(ParamsError, match="cannot be written") as caught:
        write(checkpoint, tmp_path / "file", "fp32")
    assert "workspace" in str(caught.value)


def test_two_runs_at_once_are_refused(tmp_path):
    checkpoint = tiny(tmp_path / "c")
    other = Journal(tmp_path / "p.journal", "k")
    with pytest.raises(ParamsError, match="another run"):
        write(checkpoint, tmp_path, "fp32")
    other.close()
    write(checkpoint, tmp_path, "fp32")
