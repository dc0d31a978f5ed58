"""The directory of a compile: locked, continued only under its own key, whole or not there."""

import json
import os
import subprocess
import sys

import pytest

from gemma_deploy.artifact import ArtifactDir
from gemma_deploy.artifact.lock import Lock
from gemma_deploy.artifact.manifest import FORMAT_VERSION
from gemma_deploy.errors import ArtifactError, DeployError

MANIFEST = {
    "format_version": FORMAT_VERSION,
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


# Forks a child per line of stdin, which makes an artifact over an older one and dies at the n-th step of the commit.
DRIVER = """
import os, pathlib, shutil, signal, sys
from tests.artifact.test_commit import MANIFEST, ArtifactDir
for line in sys.stdin:
    at, out = line.split()
    child = os.fork()
    if child == 0:
        left = [int(at)]
        def dying(call):
            def wrapped(*args, **kwargs):
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
                return call(*args, **kwargs)
            return wrapped
        with ArtifactDir(pathlib.Path(out), key="new", force=True) as directory:
            (directory.path / "iter0.onnx").write_text("new")
            for owner, name in ((pathlib.Path, "write_text"), (pathlib.Path, "replace"), (pathlib.Path, "unlink"),
                                (pathlib.Path, "rename"), (os, "fsync"), (shutil, "rmtree")):
                setattr(owner, name, dying(getattr(owner, name)))
            directory.commit(MANIFEST | {"key": "new"})
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture
def kill_in_commit():
    """(out, n) -> exit code of the process that died at the n-th step, 0 when it came to the end before."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", DRIVER], **pipes) as driver:

        def run(out, at):
            driver.stdin.write(f"{at} {out}\n")
            driver.stdin.flush()
            return int(driver.stdout.readline())

        yield run


def test_killed_at_any_step_of_the_commit_nothing_is_lost(tmp_path, kill_in_commit):
    outcomes = set()
    for at in range(30):
        out = tmp_path / str(at) / "a"
        make(out, "old")
        code = kill_in_commit(out, at)
        if code == 0:
            break
        assert code == -9
        here = out.exists()
        if here:  # whole, old or new
            assert (out / "manifest.json").exists()
        options = {"force": True} if here and (out / "iter0.onnx").read_text() == "old" else {}
        made = make(out, "new", **options)
        outcomes.add((here, made))
        assert (out / "iter0.onnx").read_text() == "new"
        assert sorted(entry.name for entry in out.iterdir()) == ["iter0.onnx", "manifest.json"]
        assert list(json.loads((out / "manifest.json").read_text())["files"]) == ["iter0.onnx"]
        assert not make(out, "new")  # finished
        # the lock file of a killed process may lie there; nobody holds it
        assert {entry.name for entry in out.parent.iterdir()} <= {"a", ".a.lock"}
    else:
        pytest.fail("the commit never ended")
    # died before the old one went; between the renames, where the next run has only to rename; and after them
    assert {(True, True), (False, False), (True, False)} <= outcomes


@pytest.mark.parametrize("name", ["a.old", "a.partial"])
def test_a_directory_of_the_users_beside_it_is_not_touched(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").write_text("years of work")
    if name == "a.old":
        make(tmp_path / "a")
        make(tmp_path / "a", "other", force=True)
        assert not make(tmp_path / "a", "other")
    else:
        with pytest.raises(ArtifactError, match="will not be touched") as caught:
            make(tmp_path / "a", force=True)
        assert caught.value.where == str(tmp_path / name)
        assert not (tmp_path / ".a.lock").exists()
    assert (tmp_path / name / "thesis.txt").read_text() == "years of work"


def test_killed_before_the_key_was_written(tmp_path):
    (tmp_path / "a.partial").mkdir()
    assert make(tmp_path / "a")


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
