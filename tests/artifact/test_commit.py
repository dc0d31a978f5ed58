"""The directory of a compile: locked, continued only under its own key, whole or not there."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gemma_deploy.artifact.commit import ArtifactDir
from gemma_deploy.artifact.opened import newest_artifact
from gemma_deploy.errors import ArtifactError, BusyError, DeployError, UsageError
from tests.killing import killer
from tests.manifests import manifest


def make(out, key="k", **options):
    """A compile that writes one file and takes what is wanted for measured, unless the artifact is finished."""
    with ArtifactDir(out, key=key, **options) as directory:
        if directory.finished:
            return False
        if directory.known is None:
            (directory.path / "iter0.onnx").write_text(key)
        keys = {} if directory.known is None else directory.known.keys
        directory.commit(manifest(key=key, keys=keys | directory.wanted), {"iter0.onnx"})
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


def test_unproven_is_not_enough_where_proof_is_asked_for_and_no_file_is_written_again(tmp_path):
    gate = {"gate": "1"}
    make(tmp_path / "a")
    file = tmp_path / "a/iter0.onnx"
    inode = file.stat().st_ino
    assert not make(tmp_path / "a")
    assert make(tmp_path / "a", wanted=gate)
    assert file.stat().st_ino == inode
    assert not make(tmp_path / "a", wanted=gate)
    assert not make(tmp_path / "a")  # more than asked for
    assert make(tmp_path / "a", wanted={"gate": "2"})  # another text
    assert make(tmp_path / "a", wanted={"gate": "2", "sensitivity": "3"})
    assert (file.stat().st_ino, file.read_text()) == (inode, "k")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_measured_where_there_are_no_hard_links(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    make(tmp_path / "a")
    assert make(tmp_path / "a", wanted={"gate": "1"})
    assert (tmp_path / "a/iter0.onnx").read_text() == "k"


def test_a_measurement_that_fails_leaves_the_artifact_as_it_was(tmp_path):
    make(tmp_path / "a")
    before = (tmp_path / "a/manifest.json").read_bytes()

    def measure():
        with ArtifactDir(tmp_path / "a", key="k", wanted={"gate": "1"}) as directory:
            assert directory.known.key == "k"
            assert (directory.path / "iter0.onnx").read_text() == "k"
            raise ValueError("too large")

    with pytest.raises(ValueError, match="too large"):
        measure()
    assert (tmp_path / "a/manifest.json").read_bytes() == before
    assert not make(tmp_path / "a")
    assert make(tmp_path / "a", wanted={"gate": "1"})


def test_an_unfinished_directory_is_continued_and_what_no_stage_made_goes(tmp_path):
    """Stages know their work by keys of their own, so other inputs find what is theirs too."""
    for key in ("k", "other"):
        with ArtifactDir(tmp_path / "a", key=key) as directory:
            assert (directory.path / "deep/done").exists() == (key == "other")
            (directory.path / "deep").mkdir(exist_ok=True)
            (directory.path / "deep/done").touch()
    assert not (tmp_path / "a").exists()
    make(tmp_path / "a", "other")
    assert sorted(entry.name for entry in (tmp_path / "a").iterdir()) == ["iter0.onnx", "manifest.json"]


def replace(out):
    """Replace an artifact by another one."""
    make(Path(out), "new", force=True)


@pytest.fixture(scope="module")
def steps():
    with killer("tests.artifact.test_commit:replace") as run:
        yield run


@pytest.fixture
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.mark.usefixtures("no_waiting_for_the_disk")
def test_killed_at_any_step_nothing_is_lost(tmp_path, steps):
    outcomes = set()
    for at in range(100):
        out = tmp_path / str(at) / "a"
        make(out, "old")
        if steps(at, str(out)):
            break
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
        assert {entry.name for entry in out.parent.iterdir()} <= {"a", ".a.gemma-deploy-lock"}
    else:
        pytest.fail("the commit never ended")
    # died before the old one went; between the renames, where the next run has only to rename; and after them
    assert {(True, True), (False, False), (True, False)} <= outcomes


@pytest.mark.usefixtures("no_waiting_for_the_disk")
def test_killed_between_the_renames_other_inputs_do_not_cost_the_old_one(tmp_path, steps):
    for at in range(100):
        out = tmp_path / str(at) / "a"
        make(out, "old")
        assert not steps(at, str(out))
        if not out.exists():
            break
    with pytest.raises(ArtifactError, match="other inputs"):
        make(out, "third")
    assert (out / "iter0.onnx").read_text() == "old"
    assert not make(out, "old")


@pytest.mark.parametrize("name", [".a.old", "a.old", "a.partial"])
def test_a_directory_of_the_users_beside_it_is_not_touched(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").write_text("years of work")
    if name != "a.partial":
        make(tmp_path / "a")
        make(tmp_path / "a", "other", force=True)
        assert not make(tmp_path / "a", "other")
    else:
        with pytest.raises(DeployError, match="will not be touched") as caught:
            make(tmp_path / "a", force=True)
        assert caught.value.where == str(tmp_path / name)
        assert [entry.name for entry in tmp_path.iterdir()] == [name]
    assert (tmp_path / name / "thesis.txt").read_text() == "years of work"


def test_killed_before_the_key_was_written(tmp_path):
    (tmp_path / "a.partial").mkdir()
    assert make(tmp_path / "a")


HOLDER = """
import sys, time
from pathlib import Path
from gemma_deploy.artifact.commit import ArtifactDir
with ArtifactDir(Path(sys.argv[1]), key="k"):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_second_compile_of_one_name_is_refused_while_the_first_lives(tmp_path):
    out = tmp_path / "a"
    first = subprocess.Popen([sys.executable, "-c", HOLDER, str(out)], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "locked\n"
        with pytest.raises(BusyError, match=f"process {first.pid}") as caught:
            make(out)
        assert caught.value.where == str(out)
        assert make(tmp_path / "b")  # another name is free
    finally:
        first.kill()
        first.wait()
    assert make(out)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a", "b"]


def test_the_newest_artifact_is_none_that_is_being_replaced(tmp_path):
    for name in ("a.partial", ".a.gemma-deploy-old", ".a.gemma-deploy-trash", ".a.gemma-deploy-new"):
        make(tmp_path / "made")
        (tmp_path / "made").rename(tmp_path / name)
    with pytest.raises(UsageError, match="no finished artifact"):
        newest_artifact(tmp_path)
    make(tmp_path / "made")
    os.utime(tmp_path / "made" / "manifest.json", (1, 1))
    assert newest_artifact(tmp_path) == tmp_path / "made"


def test_a_file_in_the_way_of_the_workspace(tmp_path):
    (tmp_path / "w").write_text("a file")
    with pytest.raises(DeployError, match="cannot be written") as caught:
        make(tmp_path / "w/a")
    assert "workspace.path" in caught.value.next_step
