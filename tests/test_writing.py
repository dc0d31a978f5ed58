"""Single files: whole or not at all, valid JSON and UTF-8, and no device in the place of a file is lost."""

import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gemma_deploy.writing import (
    finite,
    json_text,
    remove_leftovers,
    sync,
    sync_tree,
    whole_file,
    write_bytes,
    write_json,
    write_text,
)
from tests.killing import killer


@pytest.fixture(scope="module")
def steps():
    with killer("tests.test_writing:write") as run:
        yield run


def write(file):
    write_json(Path(file), {"new": [1, 2]})


def test_killed_at_any_step_it_is_the_old_one_or_the_new_one(tmp_path, steps):
    file = tmp_path / "a.json"
    seen = []
    for at in range(30):
        file.write_text("old")
        if steps(at, str(file)):
            break
        seen.append(file.read_text())
        remove_leftovers(tmp_path)
        assert list(tmp_path.iterdir()) == [file]
    assert set(seen) == {"old", '{\n "new": [\n  1,\n  2\n ]\n}\n'}


def test_content_is_on_the_disk_before_the_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    order, fsync, replace = [], os.fsync, Path.replace

    def synced(fd):
        order.append("folder" if os.path.isdir(f"/proc/self/fd/{fd}") else "content")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", lambda *args: (order.append("name"), replace(*args))[1])
    write_text(tmp_path / "a", "text")
    assert order == ["content", "name", "folder"]
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "b").write_text("")
    (tmp_path / "link").symlink_to("/nowhere")
    order.clear()
    sync_tree(tmp_path)
    assert order == ["content", "folder", "content", "folder"]


def test_an_error_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    file = tmp_path / "a"
    file.write_text("old")

    def run():
        with whole_file(file) as partial:
            partial.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        run()
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_the_longest_name_there_is(tmp_path):
    write_text(tmp_path / ("n" * 255), "text")
    assert (tmp_path / ("n" * 255)).read_text() == "text"


def test_the_users_own_files_of_such_names_are_not_touched(tmp_path):
    for name in ("a.json.partial", ".a.json.partial"):
        (tmp_path / name).write_text("years of work")
    write_json(tmp_path / "a.json", 1)
    remove_leftovers(tmp_path)
    assert [(tmp_path / name).read_text() for name in ("a.json.partial", ".a.json.partial")] == ["years of work"] * 2


def test_permissions_are_those_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_text("")
    write_text(tmp_path / "a", "")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_link_stays_and_its_target_is_written(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "link").symlink_to("deep/real")
    write_text(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "deep" / "real").read_text() == "text"


def test_a_directory_is_refused(tmp_path):
    with pytest.raises(IsADirectoryError):
        write_text(tmp_path, "text")


def test_a_pipe_and_a_device_are_written_to_and_stay(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="No such device or address") as caught:  # nobody reads: no waiting for ever
        write_text(tmp_path / "pipe", "text")
    assert caught.value.errno == errno.ENXIO
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_text(tmp_path / "pipe", "text")
    assert os.read(reader, 10) == b"text"
    os.close(reader)
    (tmp_path / "null").symlink_to("/dev/null")
    write_text(tmp_path / "null", "text")
    assert Path("/dev/null").is_char_device()
    assert os.readlink(tmp_path / "null") == "/dev/null"


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
@pytest.mark.parametrize("to", ["file", "pipe"])
def test_the_output_of_this_process_goes_where_the_rest_of_it_goes(tmp_path, name, to):
    code = "import sys; from pathlib import Path; from gemma_deploy.writing import write_text\n"
    code += "print('before', flush=True); write_text(Path(sys.argv[1]), 'text\\n'); print('after')"
    with (tmp_path / "out").open("wb") as out:
        done = subprocess.run(
            [sys.executable, "-c", code, name], stdout=subprocess.PIPE if to == "pipe" else out, check=True
        )
    assert (done.stdout or (tmp_path / "out").read_bytes()) == b"before\ntext\nafter\n"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_no_json(tmp_path, value):
    record = {"a": [1.5, {"b": (value,)}], "c": True, "d": None, "e": 10**400}
    with pytest.raises(ValueError, match=r"m\.json: a\.1\.b\.0 is -?(nan|inf)"):
        write_json(tmp_path / "m.json", record)
    assert list(tmp_path.iterdir()) == []
    assert finite(record) == {"a": [1.5, {"b": [None]}], "c": True, "d": None, "e": 10**400}
    write_json(tmp_path / "m.json", finite(record))


def test_text_that_is_no_unicode_is_written_so_that_it_can_be_read(tmp_path):
    value = {"half \ud83d": "half \udcff, whole \U0001f600 é"}
    for ascii_only in (True, False):
        write_json(tmp_path / "a.json", value, ensure_ascii=ascii_only)
        assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == value
    assert "é" in (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json_text([1], indent=None) == "[1]\n"
    write_text(tmp_path / "a.txt", "half \udcff é")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "half \\udcff é"


def test_a_file_system_that_cannot_sync_directories_is_no_error(tmp_path, monkeypatch):
    def refuse(fd):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    (tmp_path / "a").write_text("")
    for number in (errno.EINVAL, errno.ENOTSUP):
        sync(tmp_path)
        with pytest.raises(OSError, match=os.strerror(number)):
            sync(tmp_path / "a")
    number = errno.EIO
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        sync(tmp_path)


def test_bytes(tmp_path):
    write_bytes(tmp_path / "a", b"\0\xff")
    assert (tmp_path / "a").read_bytes() == b"\0\xff"
