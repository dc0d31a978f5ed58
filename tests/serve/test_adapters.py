"""Adapters by request: PEFT's numbers, the bits of each text alone, names, and what comes and goes while it runs."""

import json
import logging
import os

import numpy as np
import pytest

pytest.importorskip("starlette")

from gemma_deploy.engine import open_engine
from gemma_deploy.errors import DeployError, UsageError
from gemma_deploy.serve import adapting
from gemma_deploy.serve.adapting import NoAdapterError
from gemma_deploy.serve.choosing import Choice
from gemma_deploy.serve.http.app import Settings
from gemma_deploy.serve.request import Ended, Request
from gemma_deploy.serve.scheduler import Scheduler
from tests.native.conftest import native_library  # noqa: F401
from tests.native.test_adapters import eager_model
from tests.serve.test_bounds import running_server
from tests.serve.test_http import CHAT, COMPLETIONS, MESSAGES, TEMPLATE, TEXT, client_of, post
from tests.serve.test_scheduler import MANY, TO_TRANSFORMERS, Answers, ids_of, model_of, page_bytes

NAMES = ("pirate", "poet", None)
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture(scope="module")
def artifact(adaptable):
    return adaptable / "w" / "x"


@pytest.fixture(scope="module")
def prepared(adaptable, artifact):
    """Name of an adapter -> what a scheduler loads."""
    engine = open_engine(artifact, threads=1)
    return {name: engine.packed_adapter(adaptable / "runs" / name) for name in NAMES if name}


def scheduler_of(artifact, prepared, *, cache_bytes=MANY, **options):
    """A scheduler on a model of its own, and the numbers of its adapters."""
    scheduler = Scheduler(model_of(artifact, cache_bytes), **options)
    return scheduler, {None: 0} | {name: scheduler.load(one) for name, one in prepared.items()}


def requests(numbers):
    """Texts that begin alike over pages, with adapters in turns and without; scores of some."""
    system = ids_of(1, 300)
    common = [Request([*system, *ids_of(2, 30)], max_tokens=25, top=2, adapter=numbers[name]) for name in NAMES]
    return [
        *common,
        Request([*system[:200], *ids_of(3, 90)], max_tokens=5, prompt_top=1, adapter=numbers["poet"]),
        Request([*system[:200], *ids_of(3, 80)], max_tokens=5, prompt_top=1, adapter=numbers["pirate"]),
        Request(ids_of(4, 5), Choice(1.1, seed=3), max_tokens=150, adapter=numbers["poet"]),
        Request([*system, 7], Choice(repetition=1.3), max_tokens=40, prompt_top=2),
        Request([*system, *ids_of(2, 30)], max_tokens=25, top=2, adapter=numbers["pirate"]),
    ]


@pytest.fixture(scope="module")
def alone(artifact, prepared):
    """What each request gives on a model of its own, with its adapter alone at hand."""
    found = []
    for place in range(len(requests(dict.fromkeys(NAMES, 0)))):
        scheduler, numbers = scheduler_of(artifact, prepared, together=1)
        answers = Answers(scheduler)
        number = answers.ask(requests(numbers)[place])
        found.append(answers.all().bits(number))
        scheduler.close()
    assert len({str(one) for one in found[:3]}) == 3
    assert found[-1] == found[0]
    return found


@pytest.mark.parametrize(("together", "pages"), [(8, 400), (3, 400), (8, 16)])
def test_a_text_gives_the_same_bits_whatever_adapters_stand_beside_it(artifact, prepared, alone, together, pages):
    """With beginnings taken over, and where memory is out and texts are set back and read again."""
    scheduler, numbers = scheduler_of(artifact, prepared, cache_bytes=pages * page_bytes(artifact), together=together)
    answers, asked = Answers(scheduler), []
    for request in requests(numbers):
        asked.append(answers.ask(request))
        answers.step()
    answers.all()
    asked += [answers.ask(request) for request in requests(numbers)]
    answers.all()
    assert [answers.bits(number) for number in asked] == alone * 2
    counts = scheduler.counts()
    assert (counts.preempted > 0) == (pages == 16)
    assert counts.cached_tokens > (2000 if pages == 400 else 0)
    assert counts.adapters == 2


def test_log_probabilities_are_those_of_peft(adaptable, artifact, prepared):
    """Its own model of base and adapter, nothing merged, eager attention in float32; our cache is bfloat16."""
    import torch
    from peft import PeftModel

    scheduler, numbers = scheduler_of(artifact, prepared)
    answers, prompt = Answers(scheduler), ids_of(1, 290)
    asked = {
        name: answers.ask(Request(prompt, max_tokens=20, prompt_top=0, top=0, adapter=numbers[name])) for name in NAMES
    }
    answers.all()
    rows = {}
    for name, number in asked.items():
        began, *said, _ = answers.events[number]
        text = [*prompt, *answers.tokens(number)]
        model = eager_model(adaptable / "ck")
        model = model if name is None else PeftModel.from_pretrained(model, adaptable / "runs" / name).eval()
        with torch.inference_mode():
            logs = torch.log_softmax(model(torch.tensor([text])).logits[0].double(), -1).numpy()
        expected = logs[np.arange(len(text) - 1), text[1:]]
        rows[name] = np.concatenate([began.scores.own[1:], *(event.scores.own for event in said)])
        np.testing.assert_allclose(rows[name], expected, rtol=0, atol=TO_TRANSFORMERS)
    for one, other in (("pirate", None), ("poet", None), ("pirate", "poet")):
        assert np.abs(rows[one] - rows[other])[:289].max() > 20 * TO_TRANSFORMERS


def test_nothing_is_taken_over_from_another_adapter_or_from_the_model_alone(artifact, prepared):
    scheduler, numbers = scheduler_of(artifact, prepared)
    answers, prompt = Answers(scheduler), ids_of(1, 300)

    def cached(*names):
        asked = [answers.ask(Request(prompt, max_tokens=1, adapter=numbers[name])) for name in names]
        answers.all()
        return [answers.events[number][0].cached for number in asked]

    assert cached(None) == [0]
    assert cached("pirate") == [0]
    assert cached("pirate", "poet", None) == [299, 0, 299]
    # Nor does one wait for another's beginning to be read, as it does for one of its own adapter.
    other = ids_of(2, 300)
    numbers_of = [answers.ask(Request(other, max_tokens=1, adapter=numbers[name])) for name in ("poet", None, "poet")]
    answers.step()
    assert (scheduler.counts().running, scheduler.counts().waiting) == (2, 1)
    answers.all()
    assert [answers.events[number][0].cached for number in numbers_of] == [0, 0, 299]


@pytest.mark.parametrize("pages", [400, 14])
def test_unloading_lets_texts_end_and_takes_no_further_ones(artifact, prepared, alone, pages):
    """Those that wait too, and those that are set back and have to be read again with it."""
    scheduler, numbers = scheduler_of(artifact, prepared, cache_bytes=pages * page_bytes(artifact), together=3)
    answers, all_of_them = Answers(scheduler), requests(numbers)
    asked = [answers.ask(request) for request in all_of_them]
    for _ in range(4):
        answers.step()
    scheduler.unload(numbers["pirate"])
    assert scheduler.counts().adapters == 1
    with pytest.raises(NoAdapterError, match="not loaded any more"):
        scheduler.add(all_of_them[0])
    with pytest.raises(NoAdapterError):
        scheduler.unload(numbers["pirate"])
    answers.all()
    assert [answers.bits(number) for number in asked] == alone
    assert (scheduler.counts().preempted > 0) == (pages == 14)
    with pytest.raises(DeployError, match="no adapter"):  # the library has forgotten it
        scheduler._model.drop_adapter(numbers["pirate"])
    before = scheduler.counts()
    scheduler.unload(numbers["poet"])
    after = scheduler.counts()
    assert after.kept < before.kept or pages == 14  # beginnings that were read with it are gone
    while scheduler._prefixes.drop_oldest(3):
        pass
    assert scheduler.counts().cache_bytes == 0
    assert scheduler.load(prepared["pirate"]) > max(numbers.values())  # no number comes again


def test_texts_that_are_cancelled_give_their_adapter_back(artifact, prepared):
    scheduler, numbers = scheduler_of(artifact, prepared, together=1)
    asked = [scheduler.add(Request([2, 5], max_tokens=50, adapter=numbers["poet"])) for _ in range(2)]
    scheduler.step()
    scheduler.unload(numbers["poet"])
    for number in asked:
        scheduler.cancel(number)
    assert scheduler.step() == [(number, Ended("cancelled")) for number in asked]
    with pytest.raises(DeployError, match="no adapter"):
        scheduler._model.drop_adapter(numbers["poet"])


def test_there_is_a_most(artifact, prepared, monkeypatch):
    scheduler, numbers = scheduler_of(artifact, prepared)
    monkeypatch.setattr(adapting, "MOST", 2)
    with pytest.raises(UsageError, match="2 adapters are loaded"):
        scheduler.load(prepared["poet"])
    scheduler.unload(numbers["poet"])
    scheduler.load(prepared["poet"])


def test_a_kept_adapter_is_the_directory_it_was_made_from(adaptable, artifact, prepared, tmp_path):
    """Both ways into a server; a directory is not kept on the way."""
    import shutil

    copy = shutil.copytree(artifact, tmp_path / "x")
    engine = open_engine(copy, threads=1)
    engine.packed_adapter(adaptable / "runs" / "poet")
    assert not (copy / "adapters").exists()
    name = engine.load_adapter(adaptable / "runs" / "poet")
    kept = next(one.name for one in (copy / "adapters").iterdir())
    assert name == "poet"
    text, panels = engine.packed_adapter(kept)
    assert text == prepared["poet"][0]
    np.testing.assert_array_equal(panels, prepared["poet"][1])
    engine.unload_adapter("poet")
    with pytest.raises(UsageError, match="no adapter 'poet' is loaded"):
        engine.session().use("poet")
    with pytest.raises(UsageError, match="there is no adapter 'runs/nobody'"):
        engine.packed_adapter("runs/nobody")


# By name over HTTP


@pytest.fixture(scope="module")
def engine(artifact):
    found = open_engine(artifact, threads=1)
    found.tokenizer.chat.sources["default"] = TEMPLATE
    return found


@pytest.fixture
def folder(adaptable, tmp_path):
    """From which adapters may be loaded: `runs`, a link out of it, and one whose file lies elsewhere."""
    import shutil

    shutil.copytree(adaptable / "runs", tmp_path / "runs")
    shutil.copytree(adaptable / "runs", tmp_path / "secret")
    (tmp_path / "bare").mkdir()
    (tmp_path / "runs" / "out").symlink_to(tmp_path / "secret" / "poet")
    (tmp_path / "runs" / "same").symlink_to(tmp_path / "runs" / "poet")
    (tmp_path / "runs" / "half").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "runs" / "half" / name).symlink_to(tmp_path / "secret" / "poet" / name)
    return tmp_path / "runs"


@pytest.fixture
def client(engine, prepared, folder):
    settings = Settings(adapters=folder)
    with client_of(engine, names=("tiny", "other"), settings=settings, adapters={"pirate": prepared["pirate"]}) as one:
        yield one


def refused(client, path, status, **body):
    answer = client.post(path, json=body)
    assert answer.status_code == status, answer.text
    return answer.json()["error"]


def said(engine, adaptable, name, count=12, prompt=TEXT):
    adapter = None if name is None else engine.load_adapter(adaptable / "runs" / name)
    return "".join(engine.stream(prompt, max_new_tokens=count, adapter=adapter))


def test_model_names_the_adapter(client, engine, adaptable, caplog):
    caplog.set_level(logging.INFO, "gemma_deploy.serve.answers")
    common = {"prompt": TEXT, "max_tokens": 12, "temperature": 0}
    for model, name in (("tiny", None), ("tiny:pirate", "pirate"), ("other:pirate", "pirate"), (None, None)):
        found = post(client, COMPLETIONS, **common, **({"model": model} if model else {}))
        assert found["choices"][0]["text"] == said(engine, adaptable, name)
        assert found["model"] == (model or "tiny")
        if model:
            assert f"model={model} " in caplog.records[-1].getMessage()
    chat = post(client, CHAT, model="tiny:pirate", messages=MESSAGES, max_tokens=9, temperature=0, n=2)
    expected = said(engine, adaptable, "pirate", 9, MESSAGES)
    assert [choice["message"]["content"] for choice in chat["choices"]] == [expected] * 2
    question = {"input": MESSAGES[0]["content"], "max_output_tokens": 9, "temperature": 0}
    answer = post(client, "/v1/responses", model="tiny:pirate", **question)
    assert answer["output"][-1]["content"][0]["text"] == expected
    ids = post(client, "/tokenize", model="tiny:pirate", prompt=TEXT)["tokens"]
    assert post(client, "/detokenize", model="tiny:pirate", tokens=ids[1:])["prompt"] == TEXT
    for model in ("tiny:poet", "pirate", "tiny:", ":pirate", "tiny:pirate:pirate", "tiny:../runs/poet"):
        assert refused(client, COMPLETIONS, 404, model=model, **common)["code"] == "model_not_found"
    lines = client.get("/metrics").text.splitlines()
    assert 'gemma_deploy_adapters_loaded{model="tiny"} 1' in lines
    ended = "gemma_deploy_requests_finished_total"
    assert f'{ended}{{model="tiny",reason="length"}} 2' in lines
    assert f'{ended}{{model="tiny",adapter="pirate",reason="length"}} 5' in lines
    assert 'gemma_deploy_time_to_first_token_seconds_count{model="tiny",adapter="pirate"} 5' in lines


def test_adapters_are_models_with_a_parent(client):
    cards = {one["id"]: one for one in client.get("/v1/models").json()["data"]}
    assert list(cards) == ["tiny", "other", "tiny:pirate", "other:pirate"]
    assert "parent" not in cards["tiny"]
    for name in ("tiny:pirate", "other:pirate"):
        assert (cards[name]["parent"], cards[name]["root"]) == ("tiny", "tiny:pirate")
        assert client.get(f"/v1/models/{name}").json() == cards[name]
    assert client.get("/v1/models/tiny:poet").status_code == 404


def test_adapters_are_loaded_and_unloaded_while_it_runs(client, engine, adaptable, folder):
    body = {"prompt": TEXT, "max_tokens": 12, "temperature": 0, "model": "tiny:mine"}
    refused(client, COMPLETIONS, 404, **body)
    card = post(client, LOAD, lora_name="mine", lora_path="poet")
    assert (card["id"], card["parent"]) == ("tiny:mine", "tiny")
    assert post(client, COMPLETIONS, **body)["choices"][0]["text"] == said(engine, adaptable, "poet")
    assert "loaded already" in refused(client, LOAD, 400, lora_name="mine", lora_path="pirate")["message"]
    post(client, LOAD, lora_name="mine", lora_path=str(folder / "pirate"), load_inplace=True)
    assert post(client, COMPLETIONS, **body)["choices"][0]["text"] == said(engine, adaptable, "pirate")
    post(client, LOAD, lora_name="again", lora_path="same", model="other")
    names = {one["id"] for one in client.get("/v1/models").json()["data"]}
    assert {"tiny:mine", "other:mine", "tiny:again", "tiny:pirate"} < names
    assert post(client, UNLOAD, lora_name="mine") == {"id": "tiny:mine", "object": "model", "deleted": True}
    assert refused(client, COMPLETIONS, 404, **body)["code"] == "model_not_found"
    assert refused(client, UNLOAD, 404, lora_name="mine")["param"] == "lora_name"
    post(client, UNLOAD, lora_name="pirate")  # of the command line
    assert 'gemma_deploy_adapters_loaded{model="tiny"} 1' in client.get("/metrics").text


def test_a_stream_goes_on_to_its_end_when_its_adapter_is_unloaded(engine, prepared, folder):
    import httpx2

    options = {"settings": Settings(adapters=folder), "adapters": {"pirate": prepared["pirate"]}}
    with running_server(engine, **options) as ((host, port), _):
        url = f"http://{host}:{port}"
        body = {"model": "tiny:pirate", "prompt": TEXT, "max_tokens": 600, "temperature": 0, "stream": True}
        with httpx2.stream("POST", f"{url}{COMPLETIONS}", json=body | {"ignore_eos": True}, timeout=60) as stream:
            lines = stream.iter_lines()
            first = next(lines)
            assert httpx2.post(f"{url}{UNLOAD}", json={"lora_name": "pirate"}, timeout=60).status_code == 200
            assert httpx2.post(f"{url}{COMPLETIONS}", json=body, timeout=60).status_code == 404
            events = [json.loads(line[6:]) for line in (first, *lines) if line.startswith("data: {")]
    assert events[-1]["choices"][0]["finish_reason"] == "length"


def test_a_request_that_meets_its_adapter_leaving_is_told_that_it_is_gone(client, monkeypatch):
    """Found by name, and unloaded before the thread that computes sees it."""

    def gone(self, number):
        raise NoAdapterError("the adapter is not loaded any more", next_step="none")

    monkeypatch.setattr(adapting.Adapters, "take", gone)
    error = refused(client, COMPLETIONS, 404, model="tiny:pirate", prompt=TEXT)
    assert (error["code"], error["param"]) == ("model_not_found", "model")


@pytest.mark.parametrize(
    "path",
    ["../secret/poet", "../bare", "/etc", "out", "half", "nowhere", "poet/adapter_model.safetensors",
     "a\0b", "x" * 5000, "~/runs", "poet/../../secret/poet", "/proc/self/root", "loop"],
)  # fmt: skip
def test_no_path_leads_out_of_the_directory_that_is_allowed(client, folder, path):
    (folder / "loop").symlink_to(folder / "loop")
    error = refused(client, LOAD, 400, lora_name="mine", lora_path=path)
    assert error["param"] == "lora_path"
    assert "leads to no directory from which adapters may be loaded" in error["message"]
    refused(client, UNLOAD, 404, lora_name="mine")


def test_what_cannot_be_loaded_is_told_with_the_field(client, folder, adaptable):
    from tests.backends.peft_make import adapted

    adapted(eager_model(adaptable / "ck"), 3, rank=17).save_pretrained(folder / "large")
    (folder / "empty").mkdir()
    (folder / "damaged").mkdir()
    for name in os.listdir(folder / "poet"):
        (folder / "damaged" / name).write_bytes((folder / "poet" / name).read_bytes()[:100])
    for path, words in (("large", "rank 16 at most"), ("empty", "adapter_config.json"), ("damaged", "")):
        error = refused(client, LOAD, 400, lora_name="mine", lora_path=path)
        assert error["param"] == "lora_path"
        assert words in error["message"]
        assert str(folder) not in error["message"]
    for name in ("", "a:b", "../x", "x" * 101, "-x"):
        assert refused(client, LOAD, 400, lora_name=name, lora_path="poet")["param"] == "lora_name"
    assert refused(client, LOAD, 400, lora_name="x", lora_path=7)["param"] == "lora_path"
    assert refused(client, LOAD, 400, lora_name="x")["param"] == "lora_path"
    assert refused(client, LOAD, 404, lora_name="x", lora_path="poet", model="nobody")["code"] == "model_not_found"


def test_who_may_not_load_is_told(engine, folder):
    body = {"lora_name": "poet", "lora_path": "poet"}
    with client_of(engine) as client:
        for path in (LOAD, UNLOAD):
            assert "--allow-adapters" in refused(client, path, 403, **body)["message"]
    with client_of(engine, settings=Settings(adapters=folder, keys=["a-secret-key"])) as client:
        for path in (LOAD, UNLOAD):
            assert refused(client, path, 401, **body)["code"] == "invalid_api_key"
        answer = client.post(LOAD, json=body, headers={"Authorization": "Bearer a-secret-key"})
        assert answer.json()["id"] == "tiny:poet"
    with client_of(engine, names=("tiny", "tiny:poet"), settings=Settings(adapters=folder)) as client:
        assert "tiny:poet already" in refused(client, LOAD, 400, **body)["message"]


def test_an_artifact_without_the_section_takes_none(served, folder):
    with client_of(open_engine(served, threads=1), settings=Settings(adapters=folder)) as client:
        error = refused(client, LOAD, 400, lora_name="poet", lora_path="poet")
        assert error["param"] == "model"
        assert "takes no adapter at run time" in error["message"]
