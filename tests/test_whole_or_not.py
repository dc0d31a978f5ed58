"""`stage`, `split`, `save_part` and `calibrate`: whole or not there, killed whenever, and nobody else's is touched.

`compile` has the same tests in tests/artifact and tests/test_compile.py.
"""

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from gemma_deploy.calibration import pipeline
from gemma_deploy.calibration.pipeline import Request, calibrate
from gemma_deploy.calibration.store import Calibration, Range
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.errors import BusyError, DeployError
from gemma_deploy.partition import spans_of
from gemma_deploy.split import SplitChain, load_part, save_part
from gemma_deploy.split.factory import from_pretrained_split
from gemma_deploy.split.writing import write_split
from gemma_deploy.staging import stage_checkpoint
from gemma_deploy.testing import write_tiny_checkpoint
from gemma_deploy.workdir import Lock
from tests.calibration import make
from tests.killing import killer


def stage(place, force):
    stage_checkpoint(place / "checkpoint", place / "out", force=force)


def split(place, force):
    checkpoint = Checkpoint.open(place / "checkpoint")
    write_split(checkpoint, spans_of(2, (1,)), place / "out", force=force, workers=1)


def save(place, force):
    save_part(from_pretrained_split(place / "checkpoint", spans_of(2, (1,))[0]), place / "out")


def run_calibrate(place, force):
    """With ranges and a picture that take no time."""
    pipeline.measure = lambda *_, **__: {"model.norm.out": Range(np.zeros(4, np.float32), np.ones(4, np.float32))}
    pipeline.picture.draw = lambda *args: args[-1].write_bytes(b"PNG")
    request = Request("c4", place / "c4.json.gz", nsamples=2, seqlen=16)
    return calibrate(Checkpoint.open(place / "checkpoint"), request, place, force=force).calibration.path


MAKERS = {"stage": stage, "split": split, "save_part": save, "calibrate": run_calibrate}


def work(name, place, force):
    """What is killed."""
    MAKERS[name](Path(place), force)


def check_whole(name, out):
    """Open what was made, as whoever uses it does."""
    if name == "stage":
        assert (out / "modeling_gemma_vacc.py").exists()
        assert Checkpoint.open(out).tensors
    elif name == "split":
        SplitChain.from_split(out)
    elif name == "save_part":
        load_part(out)
    else:
        Calibration.open(out)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    place = tmp_path_factory.mktemp("inputs")
    make.write_tokenizer(write_tiny_checkpoint(place / "checkpoint", "gemma", num_hidden_layers=2))
    make.write_c4(place / "c4.json.gz", make.c4_lines(40))
    return place


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr(pipeline, "measure", pipeline.measure)  # put back what run_calibrate changes
    monkeypatch.setattr(pipeline.picture, "draw", pipeline.picture.draw)


@pytest.fixture
def place_of(inputs, tmp_path):
    def get(name):
        place = tmp_path / str(name)
        place.mkdir()
        for file in inputs.iterdir():
            (place / file.name).symlink_to(file)
        return place

    return get


def beside(name, place):
    """What is in the folder where it is made, the inputs apart."""
    folder = place / "calib" if name == "calibrate" else place
    found = list(folder.iterdir()) if folder.exists() else []
    return [entry for entry in found if entry.name not in ("checkpoint", "c4.json.gz", "calib")]


@pytest.fixture(scope="module")
def steps():
    with killer("tests.test_whole_or_not:work") as run:
        yield run


NEVER = 1_000_000
SPREAD = 6


@pytest.mark.parametrize(
    ("name", "force"),
    [(name, force) for name in MAKERS for force in (False, True) if (name, force) != ("save_part", True)],
)
def test_killed_at_many_moments(name, force, place_of, steps):
    first = place_of("first")
    if force:
        MAKERS[name](first, False)
    count = steps(NEVER, name, str(first), force)
    (out,) = beside(name, first)
    states = set()
    # A few of all, then the last ones, until one lies where `out` is not there: between the renames of a replacement.
    moments = dict.fromkeys([*range(0, count, count // SPREAD), *range(count - 1, 0, -1)])
    for done, at in enumerate(moments):
        if done >= SPREAD and states == {0, 1}:
            break
        place = place_of(at)
        if force:
            MAKERS[name](place, False)
        assert steps(at, name, str(place), force) == 0
        here = [entry for entry in beside(name, place) if entry.name == out.name]
        states.add(len(here))
        for entry in here:
            check_whole(name, entry)
        if force and not here:
            check_whole(name, next(entry for entry in beside(name, place) if entry.name.endswith("-old")))
        if name == "save_part" and here:
            continue
        MAKERS[name](place, force or bool(here))
        (made,) = beside(name, place)
        check_whole(name, made)
        assert sorted(file.name for file in made.iterdir()) == sorted(file.name for file in out.iterdir())
    assert states == {0, 1}


@pytest.mark.parametrize("name", MAKERS)
def test_a_strangers_partial_is_refused_and_stays(name, place_of):
    first, place = place_of("first"), place_of("place")
    MAKERS[name](first, False)
    (out,) = beside(name, first)
    partial = place / out.relative_to(first).with_name(out.name + ".partial")
    partial.mkdir(parents=True)
    (partial / "thesis.txt").write_text("years of work")
    with pytest.raises(DeployError, match="will not be touched") as caught:
        MAKERS[name](place, False)
    assert caught.value.where == str(partial)
    assert (partial / "thesis.txt").read_text() == "years of work"
    assert beside(name, place) == [partial]


@pytest.mark.parametrize("name", MAKERS)
def test_a_second_run_is_told_which_process_is_at_work(name, place_of):
    first, place = place_of("first"), place_of("place")
    MAKERS[name](first, False)
    (out,) = beside(name, first)
    target = place / out.relative_to(first)
    target.parent.mkdir(exist_ok=True)
    lock = Lock(target)
    with pytest.raises(BusyError, match=f"process {os.getpid()} is running"):
        MAKERS[name](place, False)
    lock.release()
    MAKERS[name](place, False)
    check_whole(name, target)


def test_a_calibration_does_not_replace_what_is_none(place_of):
    place = place_of("place")
    out = run_calibrate(place, False)
    (out / "notes.txt").write_text("years of work")
    (out / "stats.safetensors").unlink()
    for force in (False, True):
        with pytest.raises(DeployError, match="holds something else than a calibration"):
            run_calibrate(place, force)
    assert (out / "notes.txt").read_text() == "years of work"


def test_a_calibration_that_another_process_made_meanwhile_is_taken(place_of, monkeypatch):
    place = place_of("place")

    def made_meanwhile(*args):
        monkeypatch.setattr(pipeline, "make_windows", windows)
        run_calibrate(place, False)
        return windows(*args)

    windows = pipeline.make_windows
    monkeypatch.setattr(pipeline, "make_windows", made_meanwhile)
    request = Request("c4", place / "c4.json.gz", nsamples=2, seqlen=16)
    outcome = calibrate(Checkpoint.open(place / "checkpoint"), request, place)
    assert outcome.reused
    assert [entry.name for entry in beside("calibrate", place)] == [outcome.calibration.path.name]


@pytest.mark.parametrize("name", ["stage", "split", "save_part"])
def test_numbers_that_json_cannot_hold_become_null(name, place_of):
    """Python's JSON has Infinity and NaN, and so have some config.json; readers of other languages stop there."""
    place = place_of("place")
    (place / "checkpoint").unlink()
    shutil.copytree(place_of("first") / "checkpoint", place / "checkpoint")
    config = json.loads((place / "checkpoint" / "config.json").read_text())
    config |= {"time_step_limit": [0.0, math.inf], "of no use": math.nan}
    (place / "checkpoint" / "config.json").write_text(json.dumps(config))
    MAKERS[name](place, False)
    (out,) = beside(name, place)
    (file, *_) = out.rglob("config.json")
    written = json.loads(file.read_text(), parse_constant=lambda word: pytest.fail(word))
    assert (written["time_step_limit"], written["of no use"]) == ([0.0, None], None)
