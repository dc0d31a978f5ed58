"""The directory of a compile: locked, continued only under its own key, whole or not there."""

import os
import subprocess
import sys

import pytest

from gemma_deploy.artifact import ArtifactDir
from gemma_deploy.artifact.lock import Lock
from gemma_deploy.errors import ArtifactError, DeployError

MANIFEST = {
    "format_version": 1,
    "name": "n",
    "scheme": "fp32",
    "contract": {},
    "params": [],
    "model": {},
    "parity": {"passed": True},
}


def make(out, key="k", manifest=MANIFEST, **options):
    """A compile whose only stage writes one file, unless the artifact is finished."""
    with ArtifactDir(out, key=key, **options) as directory:
        if directory.finished:
            return False
        (directory.path / "iter0.onnx").write_text(key)
        directory.commit(manifest | {"key": key})
    return True


def test_a_commit_leaves_the_artifact_and_nothing_else(tmp_path):
    assert make(tmp_path / "a")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]
    assert sorted(entry.name for entry in (tmp_path / "a").iterdir()) == ["iter0.onnx", "manifest.json"]
    assert not make(tmp_path / "a")  # finished


def test_other_inputs_are_refused_unless_forced(tmp_path):
    make(tmp_path / "a")
    with pytest.raises(ArtifactError, match="other inputs") as caught:
        make(tmp_path / "a", "other")
    assert "--force" in caught.value.next_step
    assert (tmp_path / "a/iter0.onnx").read_text() == "k"
    assert make(tmp_path / "a", "other", force=True)
    assert (tmp_path / "a/iter0.onnx").read_text() == "other"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_a_file_of_another_size_is_noticed(tmp_path):
    make(tmp_path / "a")
    (tmp_path / "a/iter0.onnx").write_text("longer than before")
    with pytest.raises(ArtifactError, match="damaged"):
        make(tmp_path / "a")


def test_what_is_no_artifact_is_not_touched(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match="will not be touched"):
        make(tmp_path / "a", force=True)
    assert (tmp_path / "a/thesis.txt").read_text() == "years of work"


def test_unproven_is_not_enough_where_proof_is_asked_for(tmp_path):
    make(tmp_path / "a", manifest=MANIFEST | {"parity": None})
    assert not make(tmp_path / "a")
    assert make(tmp_path / "a", proven=True)
    assert not make(tmp_path / "a", proven=True)


def test_an_unfinished_directory_is_continued_under_its_key_only(tmp_path):
    for key in ("k", "other"):
        with ArtifactDir(tmp_path / "a", key=key) as directory:
            assert not (directory.path / "done").exists()
            (directory.path / "done").touch()
    with ArtifactDir(tmp_path / "a", key="other") as directory:
        assert (directory.path / "done").exists()
    assert not (tmp_path / "a").exists()


STEPS = ("write", "unlink", "rmtree", "rename")


def kill_in_commit(out, at):
    """Make an artifact over an older one in a process that dies at the `at`-th step of the commit."""
    program = f"""
import os, pathlib, shutil, signal
from tests.artifact.test_commit import *
left = [{at}]
def dying(call):
    def wrapped(*args, **kwargs):
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return call(*args, **kwargs)
    return wrapped
with ArtifactDir(pathlib.Path({str(out)!r}), key="new", force=True) as directory:
    (directory.path / "iter0.onnx").write_text("new")
    for owner, name in ((pathlib.Path, "unlink"), (pathlib.Path, "rename"), (pathlib.Path, "replace"), (os, "fsync"),
                        (shutil, "rmtree")):
        setattr(owner, name, dying(getattr(owner, name)))
    directory.commit(MANIFEST | {{"key": "new"}})
"""
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


def test_killed_at_any_step_of_the_commit_nothing_is_lost(tmp_path):
    outcomes = set()
    for at in range(30):
        out = tmp_path / str(at) / "a"
        make(out, "old")
        run = kill_in_commit(out, at)
        if run.returncode == 0:
            break
        assert run.returncode == -9, run.stderr
        here = out.exists()
        if here:  # whole, old or new
            assert (out / "manifest.json").exists()
        options = {"force": True} if here and (out / "iter0.onnx").read_text() == "old" else {}
        made = make(out, "new", **options)
        outcomes.add((here, made))
        assert (out / "iter0.onnx").read_text() == "new"
        # the lock file of a killed process may lie there; nobody holds it
        assert {entry.name for entry in out.parent.iterdir()} <= {"a", ".a.lock"}
        assert sorted(entry.name for entry in out.iterdir()) == ["iter0.onnx", "manifest.json"]
    else:
        pytest.fail("the commit never ended")
    # died before the old one went; between the renames, where the next run has only to rename; and after them
    assert {(True, True), (False, False), (True, False)} <= outcomes


HOLDER = """
import sys, time
from pathlib import Path
from gemma_deploy.artifact import ArtifactDir
with ArtifactDir(Path(sys.argv[1]), key="k"):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_second_compile_of_one_name_is_refused_while_the_first_lives(tmp_path):
    out = tmp_path / "a"
    first = subprocess.Popen([sys.executable, "-c", HOLDER, str(out)], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "locked\n"
        with pytest.raises(ArtifactError, match=f"process {first.pid}") as caught:
            make(out)
        assert caught.value.where == str(out)
        assert make(tmp_path / "b")  # another name is free
    finally:
        first.kill()
        first.wait()
    assert make(out)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a", "b"]


def test_a_lock_removed_by_its_holder_is_not_taken_for_ours(tmp_path, monkeypatch):
    """The holder ends between our open and our flock: what we locked is no longer the file others would lock."""
    path, real = tmp_path / ".a.lock", os.open
    opened = []

    def slow(name, *args):
        fd = real(name, *args)
        opened.append(fd)
        if len(opened) == 1:
            path.unlink()
        return fd

    monkeypatch.setattr(os, "open", slow)
    lock = Lock(path)
    assert len(opened) == 2
    assert path.read_text() == f"{os.getpid()}\n"
    lock.release()
    assert not path.exists()


def test_a_file_in_the_way_of_the_workspace(tmp_path):
    (tmp_path / "w").write_text("a file")
    with pytest.raises(DeployError, match="cannot write") as caught:
        make(tmp_path / "w/a")
    assert "workspace.path" in caught.value.next_step
