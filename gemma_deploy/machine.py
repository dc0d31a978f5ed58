"""What this machine has left: memory under every limit, disk, cores. Used by preflight, measures nothing else."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gemma_deploy.reading import exists

MADV_DONTNEED = 4  # of Linux: pages that are mapped and unchanged leave the process
_MAP = re.compile(r"([0-9a-f]+-[0-9a-f]+) \S+ \S+ \S+ \d+ *(.*)")
BUSY = 0.5  # of the cores: from this load on the times of a plan are too short


@dataclass(frozen=True)
class Machine:
    """Room for a job.

    Args:
        ram_bytes: memory a process can still take.
        ram_source: what sets that figure, for messages.
        disk_free_bytes: free bytes where the artifact goes.
        cpus: cores this process may use.
        writable: whether the artifact's directory can be made.
        load: processes that want a core, mean of the last minute; 0 where the system does not say.
    """

    ram_bytes: int
    ram_source: str
    disk_free_bytes: int
    cpus: int
    writable: bool = True
    load: float = 0.0

    @property
    def is_busy(self) -> bool:
        """Whether other programs take so much that everything takes longer."""
        return self.load > BUSY * self.cpus

    @classmethod
    def measure(cls, out: Path) -> Machine:
        """Look at this machine, with `out` as the place to write to."""
        import psutil

        ram, source = psutil.virtual_memory().available, "free memory of the machine"
        for room, limit in _cgroup_rooms(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")):
            if room < ram:
                ram, source = room, f"cgroup limit {gib(limit)}"
        parent = nearest_existing(out)
        return cls(
            ram_bytes=ram,
            ram_source=source,
            disk_free_bytes=shutil.disk_usage(parent).free,
            cpus=usable_cpus(),
            writable=parent.is_dir() and os.access(parent, os.W_OK | os.X_OK),
            load=_load(),
        )


def _load() -> float:
    try:
        return os.getloadavg()[0]
    except OSError:
        return 0.0


def total_bytes() -> int:
    """Memory of this machine, or what a group that this process is in may take of it."""
    import psutil

    limits = [limit for _, limit in _cgroup_rooms(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))]
    return min([psutil.virtual_memory().total, *limits])


def _cgroup_rooms(membership: Path, mount: Path) -> Iterator[tuple[int, int]]:
    """(bytes left, limit) of every memory cgroup above this process, versions 1 and 2.

    The path in `membership` may be the host's while `mount` shows only the container's part, so the mount's own root
    is looked at as well.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = mount, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = mount / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = root / path.lstrip("/")
        for directory in (group, *group.parents):
            limit, used = _number(directory / names[0]), _number(directory / names[1])
            if limit is not None and used is not None:
                yield max(0, limit - max(0, used - _reclaimable(directory, names[2]))), limit
            if directory == root:
                break


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # `max` means no limit
        return None


def _reclaimable(directory: Path, key: str) -> int:
    """Page cache the kernel gives back under pressure."""
    try:
        for line in (directory / "memory.stat").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == key:
                return int(value)
    except (OSError, ValueError):
        pass
    return 0


def give_memory_back() -> None:
    """Return freed memory to the system; glibc alone keeps it (hundreds of MiB after large matrices of many sizes)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def nearest_existing(path: Path) -> Path:
    """`path`, or the first directory above it that exists."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if exists(place))


def usable_cpus() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gib(count: int) -> str:
    """Bytes of memory as `1.25 GiB`."""
    return f"{count / (1 << 30):.2f} GiB"


def size(count: int) -> str:
    """Bytes on disk as `640 kB`, `268.4 MB` or `2.51 GB`."""
    if count < 1_000_000:
        return f"{count / 1e3:.0f} kB"
    return f"{count / 1e6:.1f} MB" if count < 1_000_000_000 else f"{count / 1e9:.2f} GB"


def peak_rss_bytes() -> int:
    """VmHWM of this process, mapped file pages included (0 where /proc is missing)."""
    return _status("VmHWM")


def rss_bytes() -> int:
    """VmRSS of this process (0 where /proc is missing)."""
    return _status("VmRSS")


def _status(key: str) -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    line = next(line for line in status.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def leave_pages(file: Path) -> int:
    """Take what this process has read of a mapped file out of its memory; it is read again where it is needed.

    The system keeps such pages in its cache while it has room. One page that is read brings its neighbours along, so
    that looking up some rows of a large table makes much of it resident. Nothing happens where it is not Linux.

    Args:
        file: maps of it that hold changes of their own are left alone.

    Returns:
        Bytes that went.
    """
    smaps, name, went = Path("/proc/self/smaps"), str(file.resolve()), 0
    if not smaps.exists():
        return 0
    advise = ctypes.CDLL(None, use_errno=True).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    span, kib = "", dict[str, int]()
    for line in smaps.read_text(errors="surrogateescape").splitlines():
        if heading := _MAP.match(line):
            span, kib = heading[1] if heading[2] == name else "", {}
        elif span:
            key, _, value = line.partition(":")
            if key in ("Rss", "Anonymous"):
                kib[key] = int(value.split()[0])
            if len(kib) == 2 and kib["Rss"] and not kib["Anonymous"]:
                start, stop = (int(end, 16) for end in span.split("-"))
                went += kib["Rss"] << 10 if advise(start, stop - start, MADV_DONTNEED) == 0 else 0
                span = ""
    return went


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """For work that is shared out by other means: torch's own threads would fight these, and change bits."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
