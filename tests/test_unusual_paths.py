"""Paths and files as hostile as a system allows, in every place where a user names one: a sentence, never a traceback,
never a wait, and nothing written."""

import os
import shutil
import socket

import pytest

from gemma_deploy.paths import PACKAGE
from tests.bad_input_make import World

LONG, DEEP = "x" * 300, "x/" * 1500


@pytest.fixture
def world(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return World(tmp_path, capsys)


# name: the command that is given the path
INPUTS = {
    "compile RECIPE": lambda world, path: ("compile", path),
    "compile --checkpoint": lambda world, path: ("compile", world.recipe, "--dry-run", "--checkpoint", path),
    "compile parity.text": lambda world, path: ("compile", world.recipe, "--dry-run", "-s", f"parity.text='{path}'"),
    "inspect": lambda world, path: ("inspect", path),
    "verify": lambda world, path: ("verify", path),
    "run": lambda world, path: ("run", path, "-p", "a"),
    "chat": lambda world, path: ("chat", path),
    "bench": lambda world, path: ("bench", path),
    "eval": lambda world, path: ("eval", path, "--task", "ppl"),
    "eval --text": lambda world, path: ("eval", "demo", "--task", "ppl", "--text", path, "--no-record"),
    "eval --path": lambda world, path: ("eval", "demo", "--task", "ceval", "--path", path, "--no-record"),
    "parity ARTIFACT": lambda world, path: ("parity", path),
    "parity --workspace": lambda world, path: ("parity", "--workspace", path),
    "parity --text": lambda world, path: ("parity", "--stage", "patched", "--text", path),
    "calibrate --path": lambda world, path: ("calibrate", "--dataset", "c4", "--path", f"c4={path}"),
    "calibrate --recipe": lambda world, path: ("calibrate", "--recipe", path),
    "calibrate --checkpoint": lambda world, path: ("calibrate", "--dataset", "c4", "--checkpoint", path),
    "stage": lambda world, path: ("stage", path, "out"),
    "split": lambda world, path: ("split", path),
}
# name: (the path, what makes it, words one of which must be said)
PATHS = {
    "a part of 300 bytes": (LONG, None, ("File name too long",)),
    "a path of 6000 bytes": ("x/" * 3000, None, ("File name too long",)),
    "a home of nobody": ("~nosuchuser/model", None, ("o such file",)),
    "bytes that are no UTF-8": ("\udcff", None, ("o such file", "text without half surrogate pairs")),
    "a link in a circle": ("circle", lambda path: path.symlink_to(path.name), ("Too many levels of symbolic links",)),
    "a named pipe": ("pipe", os.mkfifo, ("a named pipe", "neither a directory nor")),
    "a device": ("/dev/zero", None, ("a device",)),
    "a socket": ("socket", lambda path: socket.socket(socket.AF_UNIX).bind(path.name), ("a socket",)),
}
DIRECTORIES_ONLY = ("verify", "run", "chat", "bench", "parity ARTIFACT", "parity --workspace")


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize("place", INPUTS)
def test_an_unusual_path_is_refused_in_a_sentence(world, kind, place):
    path, make, words = PATHS[kind]
    if make is not None:
        make(world.root / path)
    code, shown, said = world.run(*INPUTS[place](world, path))
    assert code in (1, 2), shown + said
    assert said.count("error:") + said.lower().count("usage:") == 1, said
    if place == "compile parity.text":
        assert f"file: parity.text '{path}'" in shown.replace("\n", "") or code == 2
    elif place not in DIRECTORIES_ONLY:
        assert any(word in said for word in words), said
    assert not (world.root / "out").exists()
    assert not world.workspace.exists()


@pytest.mark.parametrize("name", [LONG, "\\ud83d", "a\\u0000b", "pipe"])
def test_a_shard_that_no_file_can_be(world, name):
    os.mkfifo(world.checkpoint / "pipe")
    world.weights.rename(world.checkpoint / "weights")
    (world.checkpoint / "model.safetensors.index.json").write_text(f'{{"weight_map": {{"a": "{name}"}}}}')
    code, _, said = world.run("inspect", world.checkpoint)
    assert code == 1
    assert "model.safetensors.index.json: " in said
    assert len(said) < 1000


@pytest.mark.parametrize("out", [".", "./", "/", "..", "a/..", DEEP, LONG])
@pytest.mark.parametrize("command", ["compile", "compile -s", "stage", "split", "calibrate"])
def test_a_directory_that_cannot_be_made(world, command, out):
    arguments = {
        "compile": ("compile", world.recipe, "--no-parity", "--out", out),
        "compile -s": ("compile", world.recipe, "--no-parity", "-s", f"workspace.path='{out}'", "-s", "name=x"),
        "stage": ("stage", world.checkpoint, out),
        "split": ("split", world.checkpoint, out),
        "calibrate": ("calibrate", "--dataset", "c4", "--nsamples", 1, "--seqlen", 8, "--workspace", out),
    }
    if command in ("compile -s", "calibrate") and out in (".", "./", "/", "..", "a/.."):
        pytest.skip("a name of its own follows")
    before = world.files()
    code, _, said = world.run(*arguments[command])
    assert code in (1, 2)
    assert said.count("error:") == 1, said
    assert len(said) < 4000
    assert world.files() == before


@pytest.mark.parametrize("out", [".", "/", LONG, "none/x.json", "model"])
@pytest.mark.parametrize("command", ["eval", "parity"])
def test_a_result_that_cannot_be_written_is_refused_before_the_work(world, command, out):
    arguments = {
        "eval": ("eval", "demo", "--task", "ppl", "--json", out),
        "parity": ("parity", "--stage", "patched", "--json", out),
    }
    before = world.files()
    code, shown, said = world.run(*arguments[command])
    assert (code, shown) == (2, "")
    assert said.count("error:") == 1, said
    assert world.files() == before


MARKUP = "x[/b] :bug: [link=a]"  # what rich would take for its own words


@pytest.mark.parametrize("command", ["inspect", "eval", "split", "calibrate", "compile", "parity"])
def test_names_that_look_like_markup_are_shown_as_they_are(world, command):
    place = world.root / MARKUP
    shutil.copytree(PACKAGE / "demo", place)
    text = f"no{MARKUP.replace('/', '')}"
    arguments = {
        "inspect": ("inspect", place),
        "eval": ("eval", place, "--task", "ppl", "--windows", 1, "--seqlen", 8),
        "split": ("split", place),
        "calibrate": ("calibrate", "--dataset", "c4", "--checkpoint", place, "--nsamples", 1, "--seqlen", 8),
        "compile": ("compile", world.recipe, "--dry-run", "--checkpoint", place, "-s", f"parity.text='{text}'"),
        "parity": ("parity", "--stage", "patched", "--checkpoint", place, "--prompt-tokens", 8, "--decode-tokens", 1),
    }
    code, shown, said = world.run(*arguments[command])
    assert code == (1 if command == "compile" else 0), said
    if command in ("inspect", "parity"):
        assert "".join(MARKUP.split()) in "".join(shown.replace("│", "").split())  # long paths are folded
    if command == "compile":
        assert "".join(text.split()) in "".join(shown.split())
