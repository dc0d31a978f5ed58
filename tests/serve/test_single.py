"""Artifacts of the other back ends: one text after the other, with the tokens of their own sessions."""

import shutil

import numpy as np
import pytest

from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.backends.onnxruntime.engine import OrtEngine
from gemma_deploy.engine import open_engine
from gemma_deploy.errors import UsageError
from gemma_deploy.runtime.generate import GenerationStats
from gemma_deploy.serve.adapting import NoAdapterError
from gemma_deploy.serve.choosing import Choice
from gemma_deploy.serve.opening import scheduling_of
from gemma_deploy.serve.request import Began, Ended, Failed, QueueFullError, Request, Said
from gemma_deploy.serve.single import OneByOne
from tests.runtime.test_adapters import PROMPT, root  # noqa: F401


@pytest.fixture(scope="module", params=["static", "onnxruntime"])
def engine(request, demo_artifact, genai_artifact):
    return open_engine(demo_artifact if request.param == "static" else genai_artifact("gemma3_text", "int8"), threads=1)


def answered(scheduling, *requests):
    numbers = [scheduling.add(request) for request in requests]
    found = {number: [] for number in numbers}
    while not scheduling.idle:
        for number, event in scheduling.step():
            found[number].append(event)
    return list(found.values())


def tokens(events):
    return [event.token for event in events if isinstance(event, Said)]


def test_texts_come_one_after_the_other_as_from_a_session(engine):
    scheduling = scheduling_of(engine, cache_bytes=1 << 26)
    assert isinstance(scheduling, OneByOne)
    prompt, expected = [2, 20, 30, 40], GenerationStats()
    list(engine.stream(prompt, max_new_tokens=8, stats=expected))
    stops = frozenset(engine.stop_ids)
    first, scored, drawn, read = answered(
        scheduling,
        Request(prompt, max_tokens=8, stop_ids=stops),
        Request(prompt, max_tokens=4, prompt_top=2, top=3),
        Request(prompt, Choice(1.0, seed=3), max_tokens=5),
        Request(prompt, max_tokens=0),
    )
    assert tokens(first) == expected.tokens
    assert len(tokens(drawn)) == 5
    assert [type(event) for event in read] == [Began, Ended]
    times = [one[0].begun for one in (first, scored, drawn, read)]
    assert times == sorted(set(times))
    session, own = engine.session(endless=True), []
    for token, after in zip(prompt, [*prompt[1:], None], strict=True):
        row = session.read([token]).astype(np.float64)
        logs = row - np.log(np.exp(row - row.max()).sum()) - row.max()
        own.append(logs[after] if after is not None else None)
    began = scored[0].scores
    np.testing.assert_allclose(began.own[1:], own[:-1], atol=1e-6)
    assert (began.top[1:, 0] >= began.own[1:]).all()
    said = scored[1]
    assert said.scores.own[0] == pytest.approx(logs[said.token], abs=1e-6)
    assert said.scores.ids.shape == (1, 3)
    assert scheduling.counts().tokens == len(expected.tokens) + 4 + 5


def test_who_leaves_and_who_asks_too_much(engine):
    scheduling = OneByOne(engine, queue=1)
    numbers = [scheduling.add(Request([2, 5], max_tokens=50)) for _ in range(2)]
    with pytest.raises(QueueFullError):
        scheduling.add(Request([2]))
    assert isinstance(scheduling.step()[0][1], Began)
    for number in numbers:
        scheduling.cancel(number)
    assert sorted(scheduling.step()) == [(number, Ended("cancelled")) for number in numbers]
    assert scheduling.idle
    with pytest.raises(UsageError, match="tokens"):
        scheduling.add(Request([2] * (engine.limits.prompt + 1), max_tokens=0))


def test_numbers_that_are_none_fail_the_text_alone(engine, monkeypatch):
    scheduling = OneByOne(engine)
    real, reads = type(engine).session, []

    def session(self, **options):
        made = real(self, **options)
        read = made.read
        made.read = lambda ids: reads.append(ids) or read(ids) * (np.nan if len(reads) == 2 else 1)
        return made

    monkeypatch.setattr(type(engine), "session", session)
    first, second = answered(scheduling, Request([2, 5], max_tokens=3), Request([2, 5], max_tokens=3))
    assert isinstance(first[-1], Failed)
    assert len(tokens(second)) == 3


@pytest.mark.parametrize("runtime", ["onnxruntime-genai", "onnxruntime"])
def test_each_text_has_the_adapter_that_it_names(root, tmp_path, runtime):  # noqa: F811
    artifact = shutil.copytree(root / "workspace" / "tiny", tmp_path / "tiny")
    engine = open_engine(artifact, threads=1) if runtime != "onnxruntime" else OrtEngine(Artifact.open(artifact))
    assert engine.runtime == runtime
    scheduling, expected = scheduling_of(engine, cache_bytes=1), {}
    numbers = {name: scheduling.load(scheduling.prepare(root / name)) for name in ("pirate", "poet")} | {None: 0}
    twin = scheduling.load(scheduling.prepare(root / "poet"))
    for name in numbers:
        stats = GenerationStats()
        list(engine.stream(PROMPT, max_new_tokens=12, adapter=name, stats=stats))
        expected[name] = stats.tokens
    assert len({tuple(one) for one in expected.values()}) == 3
    stops = frozenset(engine.stop_ids)

    def request(number):
        return Request(PROMPT, max_tokens=12, stop_ids=stops, adapter=number)

    asked = {name: scheduling.add(request(number)) for name, number in numbers.items()}
    later = scheduling.add(request(twin))
    events = {number: [] for number in (*asked.values(), later)}
    for number, event in scheduling.step():
        events[number].append(event)
    for name in ("pirate", "poet"):
        scheduling.unload(numbers[name])
        with pytest.raises(NoAdapterError):
            scheduling.add(request(numbers[name]))
    assert scheduling.counts().adapters == 1
    while not scheduling.idle:
        for number, event in scheduling.step():
            events[number].append(event)
    for name, number in asked.items():
        assert tokens(events[number]) == expected[name]
    assert tokens(events[later]) == expected["poet"]
    with pytest.raises(UsageError, match="no adapter 'pirate' is loaded"):
        engine.session().use("pirate")
    engine.session().use("poet")  # the twin has it
    scheduling.unload(twin)
    with pytest.raises(UsageError, match="no adapter 'poet' is loaded"):
        engine.session().use("poet")
    again = scheduling.load(scheduling.prepare(root / "poet"))
    assert tokens(answered(scheduling, request(again))[0]) == expected["poet"]


def test_an_artifact_without_the_section_takes_no_adapter(engine):
    with pytest.raises(UsageError, match="takes no adapter at run time"):
        scheduling_of(engine, cache_bytes=1).prepare("anything")
