"""Pages of mapped files: they leave a process's memory, and what was written into a map of its own stays."""

import mmap
import sys

import numpy as np
import pytest

from gemma_deploy.machine import leave_pages, rss_bytes

MIB = 1 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_pages_of_a_file_leave_and_are_read_again(tmp_path):
    file = tmp_path / "with a space.bin"
    content = np.random.default_rng(0).integers(0, 256, 32 * MIB, np.uint8)
    file.write_bytes(content.tobytes())
    with file.open("rb") as opened:
        maps = [mmap.mmap(opened.fileno(), 0, access=access) for access in (mmap.ACCESS_READ, mmap.ACCESS_COPY)]
    read, changed = (np.frombuffer(one, np.uint8) for one in maps)
    maps[1][5] = 255 - content[5]
    for array in (read, changed):
        assert int(array.sum(dtype=np.int64)) > 0
    before = rss_bytes()
    assert leave_pages(tmp_path / "other.bin") == 0
    assert leave_pages(file) >= 32 * MIB
    assert before - rss_bytes() > 24 * MIB
    assert np.array_equal(read, content)
    assert changed[5] == 255 - content[5], "what was written is gone"
    assert leave_pages(file) >= 32 * MIB
