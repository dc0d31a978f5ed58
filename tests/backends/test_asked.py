"""Sessions whose logits another Python computes, for which a script stands in: what it is asked, and how it ends."""

import gc
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.backends.apart import Engine as Program
from gemma_deploy.backends.asked import AskedEngine
from gemma_deploy.cli import main
from gemma_deploy.errors import DeployError, UsageError
from gemma_deploy.paths import PACKAGE
from gemma_deploy.runtime.generate import GenerationStats
from tests.backends.test_gguf import recipe_of

DIES = 499


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    root = tmp_path_factory.mktemp("asked")
    assert main(["compile", str(recipe_of(root, PACKAGE / "demo", "w8a16")), "--no-parity"]) == 0
    return Artifact.open(root / "w8a16")


@pytest.fixture
def opened(artifact, tmp_path, monkeypatch):
    """(keeps what is set back?) -> an engine, and what its script was asked."""
    monkeypatch.setenv("GEMMA_DEPLOY_STAND_IN", sys.executable)
    program = Program(
        name="stand-in", backend="gguf", module="none", package="none", variable="GEMMA_DEPLOY_STAND_IN",
        script=Path(__file__).parent / "engine_apart.py",
    )  # fmt: skip

    def make(keeps=True):
        log = tmp_path / "log"
        size = artifact.manifest.contract.vocab_size

        class Standing(AskedEngine):
            runtime, kernel_names = "stand-in", ("shipped",)

            def arguments(self):
                return (str(log), str(size), str(int(keeps)), str(DIES))

            def source(self, kernels=None, adapter=None):
                raise NotImplementedError

        Standing.program = program

        def asked():
            return [json.loads(line) for line in log.read_text().splitlines()]

        return SimpleNamespace(engine=Standing(artifact), asked=asked, size=size)

    return make


def said(session, ids, count):
    stats = GenerationStats()
    for _ in session.reply(ids, max_new_tokens=count, stats=stats):
        pass
    return stats.tokens


def sums(ids, count, size):
    whole = list(ids)
    for _ in range(count):
        whole.append(sum(whole) % size)
    return whole[len(ids) :]


@pytest.mark.parametrize("keeps", [True, False])
def test_a_session_goes_on_and_reads_no_token_twice_where_it_need_not(opened, keeps):
    made = opened(keeps)
    session = made.engine.session(endless=True)
    first = said(session, [2, 7, 9], 4)
    assert first == sums([2, 7, 9], 4, made.size)
    whole = [2, 7, 9, *first, 30]
    assert said(session, [30], 2) == sums(whole, 2, made.size)
    reads = [one for one in made.asked() if "read" in one]
    assert [one["ids"] for one in reads[:4]] == [[2, 7, 9], *([token] for token in first[:3])]
    assert (reads[4]["length"], reads[4]["ids"]) == (6, [first[3], 30])
    logits = session.read([4])
    assert int(logits.argmax()) == sum(session.ids) % made.size
    session.reset()
    assert said(session, [2, 5], 1) == [7]


def test_what_cannot_be_set_back_is_read_again(opened):
    for keeps in (True, False):
        made = opened(keeps)
        sequence = made.engine.session()._decider.sequence(16)
        sequence.read([2, 3, 4, 5])
        sequence.length = 2
        assert int(sequence.feed([8, 9])[1].argmax()) == 22
        assert int(sequence.read([1])[0].argmax()) == 23
        assert [one["ids"] for one in made.asked() if "read" in one and one["length"] == 0][-1] == (
            [2, 3, 4, 5] if keeps else [2, 3, 8, 9]
        )


def test_sequences_do_not_know_of_each_other_and_end_when_nobody_holds_them(opened):
    made = opened()
    one, two = made.engine.session(endless=True), made.engine.session(endless=True, max_length=9)
    assert said(one, [2, 10], 2) == sums([2, 10], 2, made.size)
    assert said(two, [2, 20], 2) == sums([2, 20], 2, made.size)
    assert said(one, [3], 1) == sums([2, 10, 12, 24, 3], 1, made.size)
    rooms = [request["room"] for request in made.asked() if "begin" in request]
    assert rooms == [made.engine.limits.context, 9]
    number = two._sequence._number
    del two
    gc.collect()
    said(one, [3], 1)
    assert [request["end"] for request in made.asked() if "end" in request] == [number]


def test_a_process_that_ends_is_told_and_the_next_session_has_another(opened):
    made = opened()
    session = made.engine.session(endless=True)
    with pytest.raises(DeployError, match="stand-in ended before it answered") as told:
        said(session, [2, DIES], 1)
    assert "out of memory, says the stand-in" in told.value.problems
    with pytest.raises(DeployError, match="has ended"):
        said(session, [2], 1)
    assert said(made.engine.session(endless=True), [2, 3], 1) == [5]
    assert made.engine.apart_bytes == 12345


def test_nobody_guesses_ahead(opened):
    engine = opened().engine
    for options in ({"lookup": True}, {"draft": engine}):
        with pytest.raises(UsageError, match="nobody guesses ahead"):
            engine.session(**options)
    with pytest.raises(UsageError, match="nobody guesses ahead"):
        engine.decider()
