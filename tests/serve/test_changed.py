"""Weights that change under a server, and a server that is killed: real processes, files and signals."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

pytest.importorskip("uvicorn")

import httpx2

from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.artifact.watch import Watch
from gemma_deploy.errors import ChangedError
from gemma_deploy.names import PARAMS
from tests.serve.test_command import BODY, ROOT, Process, until

COMPLETIONS = "/v1/completions"
SHORT = BODY | {"max_tokens": 20}


@pytest.fixture
def copy(served, tmp_path):
    """An artifact of its own."""
    return shutil.copytree(served, tmp_path / "x")


@pytest.fixture
def started(copy):
    found = Process(copy)
    yield found
    found.process.kill()
    found.process.communicate()


def asked(url, **body):
    return httpx2.post(f"{url}{COMPLETIONS}", json=SHORT | body, timeout=60)


def damage(file):
    """Turn the bytes in the middle round, in place."""
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size // 2)
        some = opened.read(1000)
        opened.seek(-len(some), os.SEEK_CUR)
        opened.write(bytes(255 - one for one in some))


def refused_for_good(process, url):
    """Nothing is computed any more, which is told, and the end is an orderly one."""
    until(lambda: httpx2.get(f"{url}/health").status_code == 503)
    answer = asked(url)
    assert answer.status_code == 503
    assert "the weights were" in answer.json()["error"]["message"]
    code, said = process.end()
    assert code == 0
    assert "Traceback" not in said
    assert said.count(f"{PARAMS}: the weights were") == 1
    assert "rename it" in said


def test_an_artifact_that_is_replaced_is_served_on_and_one_that_is_cut_short_no_more(started, copy, tmp_path):
    url = started.url
    before = asked(url).json()["choices"]
    os.utime(copy / PARAMS)  # every byte is the same
    old = copy.rename(tmp_path / "old")  # as `compile --force` does it
    copy.mkdir()
    for file in old.iterdir():
        if file.is_file():
            (copy / file.name).write_bytes(b"another artifact")
    assert asked(url).json()["choices"] == before
    assert asked(url, guided_choice=["yes"], logit_bias=None).json()["choices"][0]["text"] == "yes"
    # Now the file that is mapped.
    with httpx2.stream("POST", f"{url}{COMPLETIONS}", json=BODY | {"stream": True, "n": 50}, timeout=60) as stream:
        lines = stream.iter_lines()
        next(lines)
        os.truncate(old / PARAMS, 100)
        last = [json.loads(line[6:]) for line in lines if line.startswith("data: {")][-1]
    assert last["error"]["code"] == "engine_failed"
    refused_for_good(started, url)


def test_weights_that_are_written_to_are_served_no_more(started, copy):
    assert asked(started.url).status_code == 200
    damage(copy / PARAMS)
    refused_for_good(started, started.url)


def test_a_look_tells_a_changed_byte_from_a_changed_time(copy):
    watch = Watch(Artifact.open(copy))
    watch.check()
    os.utime(copy / PARAMS, (1, 1))
    watch.check()
    damage(copy / PARAMS)
    with pytest.raises(ChangedError, match="written to"):
        watch.check()
    damage(copy / PARAMS)  # as it was
    watch.check()
    os.truncate(copy / PARAMS, 5)
    with pytest.raises(ChangedError):
        watch.check()


CUT = """
import os, signal, sys
from pathlib import Path
from gemma_deploy.backends.native.graph import plan_in
from gemma_deploy.backends.native.library import Model
from gemma_deploy.errors import ChangedError
from gemma_deploy.names import PARAMS
path = Path(sys.argv[1])
model = Model(plan_in(path), path / PARAMS, threads=2)
other = Model(plan_in(path), path / PARAMS, threads=1)
model.normed([(model.sequence(), [2, 50], 1)])
os.truncate(path / PARAMS, 100)
for one, call in ((model, "normed"), (model, "ranked"), (other, "logits")):
    try:
        getattr(one, call)([(one.sequence(), [2, 60, 70], 1)])
    except ChangedError as error:
        print(error.what)
model.close()
sys.stdout.flush()
os.kill(os.getpid(), signal.SIGBUS)  # of somebody else: as ever
"""


def test_a_file_that_is_cut_short_ends_no_process(copy):
    """Pages that are gone are a SIGBUS for whoever reads them."""
    done = subprocess.run([sys.executable, "-c", CUT, str(copy)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["the weights were cut short, or can no longer be read"] * 3, done.stderr
    assert done.returncode == -signal.SIGBUS


def test_who_is_killed_starts_again_at_once_at_the_same_port(served):
    before = {file.relative_to(served) for file in served.parent.rglob("*")}
    first = Process(served)
    port = int(first.url.rsplit(":", 1)[1])
    with httpx2.stream(
        "POST", f"{first.url}{COMPLETIONS}", json=BODY | {"stream": True, "n": 50}, timeout=60
    ) as stream:
        lines = stream.iter_lines()
        next(lines)
        expected = asked(first.url).json()["choices"]
        first.process.kill()
        with pytest.raises(httpx2.HTTPError):  # in the middle of an answer
            list(lines)
        second = Process(served, port=port)  # while connections to the first are not forgotten
    try:
        assert asked(second.url).json()["choices"] == expected
        assert second.end()[0] == 0
    finally:
        for one in (first, second):
            one.process.kill()
            one.process.communicate()
    assert {file.relative_to(served) for file in served.parent.rglob("*")} == before
