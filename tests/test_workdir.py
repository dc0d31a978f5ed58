"""Directories that are there whole or not at all: locked, marked, and sound after a kill at any step."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gemma_deploy.errors import ArtifactError, BusyError, CheckpointError, DeployError, UsageError
from gemma_deploy.workdir import MARK, Lock, Maker, WorkDir, make_directories, with_a_name
from tests.killing import killer

MAKER = Maker("test", CheckpointError, full="make room; it continues")
OLD, TRASH, NEW = (f".a.gemma-deploy-{name}" for name in ("old", "trash", "new"))


class Made(WorkDir):
    """Replaces what is there with force, and is finished when its key stands in `one`."""

    def __init__(self, out, key, force):
        super().__init__(out, MAKER, key=key)
        self.force = force

    def check(self):
        if not os.path.lexists(self.out):
            return
        if not (self.out / "one").exists():
            raise ArtifactError("is somebody else's")
        self.finished = (self.out / "one").read_text() == str(self.key)
        if not self.finished and not self.force:
            raise UsageError("exists already")

    def tidy(self):
        (self.path / "scaffold").unlink(missing_ok=True)


def make(out, key=None, text=None, force=False):
    """A directory of two files; with a key, those that are there already are left alone."""
    text = key if text is None else text
    with Made(Path(out), key, force) as work:
        if work.finished:
            return "finished"
        (work.path / "scaffold").write_text("")
        for name in ("one", "folder/two"):
            file = work.path / name
            if not file.exists():
                file.parent.mkdir(exist_ok=True)
                file.write_text(text)
        work.publish()
    return "made"


def stop(out, key, text):
    """A run that ends in an error."""

    def run():
        with Made(out, key, False) as work:
            (work.path / "one").write_text(text)
            raise KeyError

    with pytest.raises(KeyError):
        run()


def content(folder):
    return {str(file.relative_to(folder)): file.read_text() for file in sorted(folder.rglob("*")) if file.is_file()}


def unmarked(folder):
    return {name: text for name, text in content(folder).items() if name != MARK}


def whole(text):
    return {"one": text, "folder/two": text}


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """No power cut is tested here."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture(scope="module")
def steps():
    with killer("tests.test_workdir:make") as run:
        yield run


def test_it_is_made_and_nothing_else_is_left(tmp_path):
    assert make(tmp_path / "deep" / "er" / "a", text="new") == "made"
    assert content(tmp_path / "deep" / "er" / "a") == whole("new")
    assert names(tmp_path / "deep" / "er") == ["a"]


@pytest.mark.parametrize("key", [None, "new"])
def test_killed_at_any_step_there_is_nothing_or_all_of_it(tmp_path, steps, key):
    seen = set()
    for at in range(100):
        out = tmp_path / str(at) / "a"
        if steps(at, str(out), key, "new"):
            break
        there = out.exists()
        if there:
            assert unmarked(out) == whole("new")
            with Made(out, key, True):  # whatever comes next clears up
                pass
        else:
            assert make(out, key, "new") in ("made", "finished")
        seen.add(there)
        assert content(out) == whole("new")
        assert set(names(out.parent)) <= {"a", "a.partial"}
        assert "a.partial" not in names(out.parent) or key  # what can be continued is left
    else:
        pytest.fail("it never ended")
    assert seen == {True, False}


@pytest.mark.parametrize("key", [None, "new"])
def test_killed_at_any_step_of_a_replacement_nothing_is_lost(tmp_path, steps, key):
    between = 0
    for at in range(100):
        out = tmp_path / str(at) / "a"
        make(out, "old")
        if steps(at, str(out), key, "new", True):
            break
        if out.exists():
            assert content(out).get("one") in ("old", "new")
        else:  # between the two renames
            between += 1
            assert content(out.parent / OLD) == whole("old")
            assert unmarked(out.parent / "a.partial") == whole("new")
            if key:
                assert make(out, key) == "finished"  # without force: it had only to be renamed
                assert content(out) == whole("new")
            else:
                with pytest.raises(UsageError, match="exists already"):
                    make(out, key, "new")
                assert content(out) == whole("old")  # back again
        make(out, key, "new", True)
        assert content(out) == whole("new")
        assert names(out.parent) == ["a"]
    else:
        pytest.fail("it never ended")
    assert between


def test_after_a_kill_another_key_gets_the_old_one_back_and_nothing_of_the_new(tmp_path, steps):
    for at in range(100):
        out = tmp_path / str(at) / "a"
        make(out, "old")
        assert not steps(at, str(out), "new", "new", True)
        if not out.exists():
            break
    with pytest.raises(UsageError, match="exists already"):
        make(out, "third")
    assert content(out) == whole("old")
    assert make(out, "third", force=True) == "made"
    assert content(out) == whole("third")
    assert names(out.parent) == ["a"]


def test_a_cut_short_deletion_of_the_old_one_is_never_taken_for_it(tmp_path):
    make(tmp_path / "a", "old")
    (tmp_path / "a").rename(tmp_path / TRASH)
    (tmp_path / TRASH / "folder" / "two").unlink()
    assert make(tmp_path / "a", "new") == "made"
    assert content(tmp_path / "a") == whole("new")
    assert names(tmp_path) == ["a"]


def test_what_was_written_under_the_same_key_is_continued(tmp_path):
    stop(tmp_path / "a", "k", "of the first run")
    assert make(tmp_path / "a", "k", "k") == "made"
    assert content(tmp_path / "a")["one"] == "of the first run"


@pytest.mark.parametrize("key", ["other", None])
def test_what_was_written_under_another_key_is_not(tmp_path, key):
    stop(tmp_path / "a", "k", "of the first run")
    make(tmp_path / "a", key, "new")
    assert content(tmp_path / "a") == whole("new")


def test_without_a_key_an_error_leaves_nothing(tmp_path):
    stop(tmp_path / "a", None, "half")
    assert names(tmp_path) == []


STRANGERS = {
    "a directory": lambda place: (place.mkdir(), (place / "thesis.txt").write_text("years")),
    "a file": lambda place: place.write_text("years"),
    "a link": lambda place: ((place.parent / "elsewhere").mkdir(), place.symlink_to(place.parent / "elsewhere")),
    "another command's": lambda place: (
        place.mkdir(),
        (place / MARK).write_text('{"made_by": "gemma-deploy other", "key": null, "whole": false}'),
    ),
    "a mark that is none": lambda place: (place.mkdir(), (place / MARK).write_text('["gemma-deploy test"]')),
    "a mark that is a pipe": lambda place: (place.mkdir(), os.mkfifo(place / MARK)),
}


@pytest.mark.parametrize("kind", STRANGERS)
@pytest.mark.parametrize("key", [None, "k"])
def test_a_strangers_partial_is_not_touched(tmp_path, kind, key):
    place = tmp_path / "a.partial"
    STRANGERS[kind](place)
    before = sorted(path.lstat().st_ino for path in [place, *place.rglob("*")])
    for force in (False, True):
        with pytest.raises(DeployError, match="will not be touched") as caught:
            make(tmp_path / "a", key, force=force)
        assert caught.value.where == str(place)
    assert sorted(path.lstat().st_ino for path in [place, *place.rglob("*")]) == before
    assert not (tmp_path / "a").exists()
    assert [name for name in names(tmp_path) if name.startswith(".")] == []


def test_finished_or_refused_a_strangers_partial_is_not_touched_either(tmp_path):
    make(tmp_path / "a", "k")
    (tmp_path / "a.partial").mkdir()
    (tmp_path / "a.partial" / "thesis.txt").write_text("years")
    assert make(tmp_path / "a", "k") == "finished"
    with pytest.raises(UsageError):
        make(tmp_path / "a", None, "x")
    assert content(tmp_path / "a.partial") == {"thesis.txt": "years"}


def test_an_empty_partial_is_taken(tmp_path):
    (tmp_path / "a.partial").mkdir()
    make(tmp_path / "a", text="new")
    assert names(tmp_path) == ["a"]


def test_what_appears_meanwhile_is_not_touched(tmp_path):
    out = tmp_path / "a"

    def run():
        with Made(out, "k", True) as work:
            (work.path / "one").write_text("k")
            out.mkdir()
            (out / "one").write_text("a stranger's")
            work.publish()

    with pytest.raises(UsageError, match="appeared"):
        run()
    assert content(out) == {"one": "a stranger's"}
    (out / "one").unlink()
    out.rmdir()
    assert make(out, "k") == "finished"  # nothing was lost


def test_a_link_is_replaced_and_not_what_it_leads_to(tmp_path):
    make(tmp_path / "elsewhere", "old")
    (tmp_path / "a").symlink_to("elsewhere")
    assert make(tmp_path / "a", None, "new", True) == "made"
    assert content(tmp_path / "elsewhere") == whole("old")
    assert content(tmp_path / "a") == whole("new")
    assert names(tmp_path) == ["a", "elsewhere"]


HOLDER = """
import sys, time
from pathlib import Path
from tests.test_workdir import Made
with Made(Path(sys.argv[1]), "k", False):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_two_at_once_the_second_is_told_who_has_it(tmp_path):
    first = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "a")], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "locked\n"
        with pytest.raises(BusyError, match=rf"another run is writing it \(process {first.pid} is running\)") as caught:
            make(tmp_path / "a")
        assert caught.value.where == str(tmp_path / "a")
        assert make(tmp_path / "b", text="b") == "made"  # another name is free
        assert (tmp_path / "a.partial").is_dir()
    finally:
        first.kill()
        first.wait()
    assert make(tmp_path / "a", "k") == "made"
    assert names(tmp_path) == ["a", "b"]


def test_a_lock_removed_by_its_holder_is_not_taken_for_ours(tmp_path, monkeypatch):
    """The holder ends between our open and our flock: what we locked is no longer the file others would lock."""
    file, real = tmp_path / ".a.gemma-deploy-lock", os.open
    opened = []

    def slow(name, *args):
        fd = real(name, *args)
        opened.append(fd)
        if len(opened) == 1:
            file.unlink()
        return fd

    monkeypatch.setattr(os, "open", slow)
    lock = Lock(tmp_path / "a")
    assert len(opened) == 2
    assert file.read_text() == f"{os.getpid()}\n"
    lock.release()
    assert not file.exists()


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("years")
    (tmp_path / ".a.gemma-deploy-lock").symlink_to("precious")
    with pytest.raises(CheckpointError, match="cannot be written"):
        make(tmp_path / "a")
    assert (tmp_path / "precious").read_text() == "years"


@pytest.mark.parametrize(("number", "step"), [(errno.ENOSPC, "make room; it continues"), (errno.EACCES, MAKER.advice)])
def test_a_disk_that_refuses_is_a_sentence(tmp_path, number, step):
    with pytest.raises(CheckpointError, match="cannot be written: ") as caught, Made(tmp_path / "a", "k", False):
        raise OSError(number, os.strerror(number), "/some/file")
    assert (caught.value.where, caught.value.next_step) == ("/some/file", step)
    with pytest.raises(CheckpointError) as caught, Made(tmp_path / "a", "k", False):
        raise OSError(number, os.strerror(number), "/read", None, "/written")  # as shutil.copyfile raises it
    assert caught.value.where == "/written"
    with pytest.raises(FileNotFoundError), Made(tmp_path / "a", "k", False):  # a bug: not ours to explain
        raise FileNotFoundError(errno.ENOENT, "x", "y")


def test_places_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written: Not a directory"):
        make(tmp_path / "file" / "deep" / "a")
    with pytest.raises(CheckpointError, match="cannot be written: File name too long"):  # before any work
        make(tmp_path / ("n" * 250))
    assert names(tmp_path) == ["file"]
    monkeypatch.chdir(tmp_path)
    assert with_a_name(Path()) == tmp_path
    assert with_a_name(Path("..")) == tmp_path.parent
    with pytest.raises(UsageError, match="no place for a new directory"):
        make("/")
    with pytest.raises(ArtifactError, match="somebody else's"):
        make(".")


def test_directories_above_it_are_made(tmp_path, monkeypatch):
    make_directories(tmp_path.joinpath(*["x"] * 100))
    with pytest.raises(UsageError, match="more than 100 directories"):  # at 1000 Python itself ends in a traceback
        make_directories(tmp_path.joinpath(*["y"] * 1500))
    assert names(tmp_path) == ["x"]
    monkeypatch.chdir(tmp_path)
    make_directories(Path("a/b/../c"))
    assert Path("a/c").is_dir()
