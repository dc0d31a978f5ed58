"""OpenAI's interface: answers, streams and errors, in front of the tiny artifact that `test_scheduler` proves."""

import asyncio
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

pytest.importorskip("starlette")

from starlette.testclient import TestClient

from gemma_deploy.backends.native.graph import plan_in
from gemma_deploy.backends.native.library import Model
from gemma_deploy.engine import open_engine
from gemma_deploy.names import PARAMS
from gemma_deploy.runtime.generate import GenerationStats
from gemma_deploy.runtime.sampling import Sampling
from gemma_deploy.serve.http import app
from gemma_deploy.serve.http.app import Server, Settings
from gemma_deploy.serve.http.served import Served
from gemma_deploy.serve.opening import scheduling_of, worker_of
from gemma_deploy.serve.request import QueueFullError
from gemma_deploy.serve.worker import Worker

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<unk>{{ m['role'] }} {{ m['content'] }}<eos>"
    "{% endfor %}{% if add_generation_prompt %}<unk>model {% endif %}"
)


@pytest.fixture(scope="module")
def engine(served):
    found = open_engine(served, threads=1)
    found.tokenizer.chat.sources["default"] = TEMPLATE
    return found


def served_of(engine, *, names=("tiny",), add_bos=False, adapters=None, **options):
    scheduling = scheduling_of(engine, **{"cache_bytes": 1 << 26, **options})
    numbers = {name: scheduling.load(one) for name, one in (adapters or {}).items()}
    return Served(engine, worker_of(engine, scheduling), names, add_bos=add_bos, adapters=numbers)


def client_of(engine, *, settings=None, **options):
    return TestClient(Server([served_of(engine, **options)], settings).app())


@pytest.fixture(scope="module")
def client(engine):
    with client_of(engine, names=("tiny", "other")) as found:
        yield found


def post(client, path, **body):
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def streamed(client, path, **body):
    """Bodies of the events of a stream."""
    with client.stream("POST", path, json={**body, "stream": True}) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        text = "".join(answer.iter_text())
    events = text.removesuffix("\n\n").split("\n\n")
    assert all(event.startswith("data: ") for event in events)
    assert events[-1] == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events[:-1]]


def test_the_page_is_at_the_root_and_a_path_that_is_not_there_is_told(client):
    page = client.get("/")
    assert page.status_code == 200
    assert page.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
    assert client.get("/main.js").headers["content-type"].startswith("text/javascript")
    assert "error" in client.get("/page/").json()


COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TEXT = "the window of a layer sees"


def expected(engine, prompt, tokens, **sampling):
    stats = GenerationStats()
    text = "".join(engine.stream(prompt, max_new_tokens=tokens, sampling=Sampling(**sampling), stats=stats))
    return text, stats


def test_a_completion_is_what_the_engine_says(client, engine):
    text, stats = expected(engine, TEXT, 12)
    found = post(client, COMPLETIONS, model="tiny", prompt=TEXT, max_tokens=12, temperature=0)
    assert found["object"] == "text_completion"
    assert found["model"] == "tiny"
    choice = found["choices"][0]
    assert (choice["text"], choice["logprobs"], choice["index"]) == (text, None, 0)
    assert choice["finish_reason"] == stats.finish
    usage = found["usage"]
    assert usage["prompt_tokens"] == stats.prompt_tokens
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    drawn, _ = expected(engine, TEXT, 12, temperature=1.0, seed=4)
    again = post(client, COMPLETIONS, prompt=TEXT, max_tokens=12, seed=4)
    assert again["choices"][0]["text"] == drawn  # temperature is 1 where none is given
    assert drawn != text


def test_prompts_come_as_text_ids_and_lists_of_both(client, engine):
    ids = engine.tokenizer.encode(TEXT)
    common = {"max_tokens": 6, "temperature": 0}
    one = post(client, COMPLETIONS, prompt=TEXT, **common)["choices"][0]["text"]
    assert post(client, COMPLETIONS, prompt=ids, **common)["choices"][0]["text"] == one
    many = post(client, COMPLETIONS, prompt=[ids, ids[:4]], n=2, **common)
    assert [choice["index"] for choice in many["choices"]] == [0, 1, 2, 3]
    other = post(client, COMPLETIONS, prompt=ids[:4], **common)["choices"][0]["text"]
    assert [choice["text"] for choice in many["choices"]] == [one, one, other, other]
    assert many["usage"]["prompt_tokens"] == len(ids) + 4
    texts = post(client, COMPLETIONS, prompt=[TEXT, "a"], **common)
    assert texts["choices"][0]["text"] == one


def test_a_stream_is_the_whole_in_pieces(client):
    body = {"prompt": [TEXT, "next"], "max_tokens": 9, "temperature": 0, "logprobs": 2, "echo": True}
    whole = post(client, COMPLETIONS, **body)
    events = streamed(client, COMPLETIONS, **body, stream_options={"include_usage": True})
    assert events[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert events[-1]["choices"] == []
    for choice in whole["choices"]:
        parts = [one for event in events for one in event["choices"] if one["index"] == choice["index"]]
        assert "".join(one["text"] for one in parts) == choice["text"]
        assert [one["finish_reason"] for one in parts if one["finish_reason"]] == [choice["finish_reason"]]
        for name, values in choice["logprobs"].items():
            assert [value for one in parts if one["logprobs"] for value in one["logprobs"][name]] == values
    assert len(events) > 8
    assert "usage" not in streamed(client, COMPLETIONS, prompt="a", max_tokens=2)[-1]


def test_a_stream_has_a_piece_for_each_token_that_has_no_text(client, engine):
    eos = engine.stop_ids[0]
    common = {"max_tokens": 7, "logit_bias": {str(eos): 100}, "ignore_eos": True, "temperature": 0}
    parts = [event["choices"][0] for event in streamed(client, COMPLETIONS, prompt=TEXT, **common)]
    assert [(one["text"], one["finish_reason"]) for one in parts] == [("", None)] * 7 + [("", "length")]
    said = [event["choices"][0] for event in streamed(client, CHAT, messages=MESSAGES, **common)]
    assert [one["delta"].get("content") for one in said] == [""] * 8 + [None]  # the first names the role
    held = streamed(client, COMPLETIONS, prompt=TEXT, max_tokens=7, temperature=0, stop=["no text has this"] * 2)
    assert len(held) == 8


def test_echo_gives_the_prompt_and_its_log_probabilities(client, engine):
    ids = [int(one) for one in (2, *range(40, 340))]  # past a page and many windows
    found = post(client, COMPLETIONS, prompt=ids, max_tokens=1, echo=True, logprobs=1, temperature=0)["choices"][0]
    logs = found["logprobs"]
    assert {len(values) for values in logs.values()} == {len(ids) + 1}
    assert logs["token_logprobs"][0] is None
    assert logs["top_logprobs"][0] is None
    assert logs["token_logprobs"][1:-1] == pytest.approx(logs_of(engine.path, ids), abs=3e-6)  # float32 sums
    assert all(
        own <= max(top.values()) for own, top in zip(logs["token_logprobs"][1:], logs["top_logprobs"][1:], strict=True)
    )
    assert found["text"].startswith(engine.tokenizer.decode(ids))
    only = post(client, COMPLETIONS, prompt=ids, max_tokens=0, echo=True, logprobs=1)
    again = only["choices"][0]["logprobs"]
    assert again == {name: values[:-1] for name, values in logs.items()}
    assert only["usage"]["completion_tokens"] == 0
    assert only["usage"]["prompt_tokens_details"]["cached_tokens"] == len(ids) - 1
    plain = post(client, COMPLETIONS, prompt=TEXT, max_tokens=0, echo=True)["choices"][0]
    assert (plain["text"], plain["logprobs"], plain["finish_reason"]) == (TEXT, None, "length")


def logs_of(artifact, ids):
    """Log-probabilities of a text's tokens from all of its logits, in float64."""
    model = Model(plan_in(artifact), artifact / PARAMS, threads=1, cache_bytes=1 << 26)
    logits = model.logits([(model.sequence(), ids, len(ids))]).astype(np.float64)
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return logs[np.arange(len(ids) - 1), ids[1:]].tolist()


def test_where_tokens_stand_and_what_they_are_called(client, engine):
    found = post(client, COMPLETIONS, prompt=TEXT, max_tokens=8, echo=True, logprobs=0, temperature=0)["choices"][0]
    logs, shown = found["logprobs"], found["text"]
    assert logs["tokens"][0] == "<bos>"
    assert logs["text_offset"][:2] == [0, 0]
    ends = [*logs["text_offset"][2:], len(shown)]
    for token, begin, end in zip(logs["tokens"][1:], logs["text_offset"][1:], ends, strict=True):
        assert shown[begin:end] in ("", token)
    assert "".join(logs["tokens"][1:]).startswith(TEXT)
    assert all(len(top) == 1 for top in logs["top_logprobs"][1:])  # the token's own


def test_a_missing_bos_is_added_where_the_server_is_told_to(engine, client):
    ids = engine.tokenizer.encode(TEXT)
    body = {"max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
    right = post(client, COMPLETIONS, prompt=ids, **body)["choices"][0]["logprobs"]
    with client_of(engine, add_bos=True) as adding:
        found = post(adding, COMPLETIONS, prompt=ids[1:], **body)["choices"][0]["logprobs"]
        assert post(adding, COMPLETIONS, prompt=ids, **body)["choices"][0]["logprobs"] == right
    assert found == {name: values[1:] for name, values in right.items()}


def test_stop_strings_are_cut_across_the_borders_of_tokens(client, engine):
    body = {"prompt": TEXT, "max_tokens": 60, "seed": 2, "ignore_eos": True}
    choice = post(client, COMPLETIONS, **body, logprobs=0)["choices"][0]
    whole, offsets = choice["text"], choice["logprobs"]["text_offset"]
    border = next(one for one in offsets if one > 10)
    stop = whole[border - 1 : border + 2]  # from within one token into the next
    cut = whole[: whole.index(stop)]
    found = post(client, COMPLETIONS, **body, stop=["never said", stop])
    choice = found["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (cut, "stop", stop)
    assert found["usage"]["completion_tokens"] < 60
    parts = streamed(client, COMPLETIONS, **body, stop=stop)
    assert "".join(one["choices"][0]["text"] for one in parts) == cut
    least = post(client, COMPLETIONS, **body, stop=stop, min_tokens=50)["choices"][0]["text"]
    assert len(least) > len(cut)


def test_choices_of_tokens_reach_the_model(client, engine):
    body = {"prompt": TEXT, "max_tokens": 4, "temperature": 0}
    assert post(client, COMPLETIONS, **body, logit_bias={"70": 100})["choices"][0]["text"] == engine.tokenizer.decode(
        [70] * 4
    )
    biases = {"70": 90, "71": 90}
    repeated = post(client, COMPLETIONS, **body, logit_bias=biases)["choices"][0]["text"]
    punished = post(client, COMPLETIONS, **body, logit_bias=biases, frequency_penalty=2)["choices"][0]["text"]
    assert set(repeated) | set(punished) <= set(engine.tokenizer.decode([70, 71]))
    assert repeated != punished
    stopped = post(client, COMPLETIONS, **body, logit_bias={"70": 100}, stop_token_ids=[70], logprobs=1)
    choice = stopped["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("", "stop", 70)
    assert len(choice["logprobs"]["tokens"]) == 1  # the stop token's own: lm-eval counts on one for each that was made
    eos = engine.stop_ids[0]
    assert post(client, COMPLETIONS, **body, logit_bias={str(eos): 100})["choices"][0]["finish_reason"] == "stop"
    ignored = post(client, COMPLETIONS, **body, logit_bias={str(eos): 100}, ignore_eos=True)
    assert ignored["choices"][0]["finish_reason"] == "length"
    assert ignored["usage"]["completion_tokens"] == 4
    several = post(client, COMPLETIONS, prompt=TEXT, max_tokens=12, seed=3, n=3)["choices"]
    assert len({choice["text"] for choice in several}) == 3


def test_special_tokens_in_a_text_are_text_unless_it_is_said(client, engine):
    spelled = "a<eos>b"
    plain = post(client, "/tokenize", prompt=spelled)["tokens"]
    special = post(client, "/tokenize", prompt=spelled, parse_special=True)["tokens"]
    assert special == engine.tokenizer.encode(spelled)
    assert 1 in special
    assert 1 not in plain
    used = post(client, COMPLETIONS, prompt=spelled, max_tokens=1)["usage"]["prompt_tokens"]
    assert used == len(plain)
    assert post(client, COMPLETIONS, prompt=spelled, max_tokens=1, parse_special=True)["usage"]["prompt_tokens"] < used


MESSAGES = [{"role": "user", "content": "what is a window?"}]


def test_a_conversation_is_answered(client, engine):
    prompt = engine.tokenizer.render_chat(MESSAGES)
    text, stats = expected(engine, prompt, 10)
    found = post(client, CHAT, messages=MESSAGES, max_tokens=10, temperature=0, model="other")
    assert found["model"] == "other"
    assert found["choices"][0]["message"] == {"role": "assistant", "content": text}
    assert found["usage"]["prompt_tokens"] == stats.prompt_tokens
    events = streamed(client, CHAT, messages=MESSAGES, max_completion_tokens=10, temperature=0)
    deltas = [event["choices"][0] for event in events]
    assert deltas[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(one["delta"].get("content", "") for one in deltas) == text
    assert [one["finish_reason"] for one in deltas if one["finish_reason"]] == [found["choices"][0]["finish_reason"]]


def test_log_probabilities_of_an_answer(client):
    body = {"messages": MESSAGES, "max_tokens": 5, "temperature": 0, "logprobs": True, "top_logprobs": 3}
    content = post(client, CHAT, **body)["choices"][0]["logprobs"]["content"]
    assert len(content) == 5
    for token in content:
        assert token["token"] == token["top_logprobs"][0]["token"]
        assert token["logprob"] == token["top_logprobs"][0]["logprob"]
        assert len(token["top_logprobs"]) == 3
        assert token["bytes"] in (None, list(token["token"].encode()))
        assert (token["bytes"] is None) == ("\N{REPLACEMENT CHARACTER}" in token["token"])  # a part of a character
        assert sum(math.exp(one["logprob"]) for one in token["top_logprobs"]) < 1
    events = streamed(client, CHAT, **body)
    assert [
        one for event in events for one in (event["choices"][0]["logprobs"] or {"content": []})["content"]
    ] == content


def test_texts_and_tokens_into_each_other(client, engine):
    ids = engine.tokenizer.encode(TEXT)
    assert post(client, "/tokenize", prompt=TEXT) == {"tokens": ids, "count": len(ids), "max_model_len": 800}
    assert post(client, "/tokenize", prompt=TEXT, add_special_tokens=False)["tokens"] == ids[1:]
    chat = post(client, "/tokenize", messages=MESSAGES)["tokens"]
    assert chat == engine.tokenizer.encode_chat(MESSAGES)
    assert post(client, "/detokenize", tokens=ids) == {"prompt": "<bos>" + TEXT}
    assert post(client, "/detokenize", tokens=[]) == {"prompt": ""}


def test_what_is_served_and_how_it_is(client):
    cards = client.get("/v1/models").json()["data"]
    assert [(one["id"], one["object"], one["max_model_len"], one["texts_at_once"]) for one in cards] == [
        ("tiny", "model", 800, 16), ("other", "model", 800, 16),
    ]  # fmt: skip
    assert client.get("/v1/models/other").json()["root"] == "tiny"
    assert client.get("/health").json() == {"status": "ok"}
    post(client, COMPLETIONS, prompt="a", max_tokens=3)
    lines = dict(line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if not line.startswith("#"))
    assert float(lines['gemma_deploy_generation_tokens_total{model="tiny"}']) >= 3
    assert lines['gemma_deploy_requests_running{model="tiny"}'] == "0"
    first = "gemma_deploy_time_to_first_token_seconds"
    assert lines[f'{first}_bucket{{model="tiny",le="+Inf"}}'] == lines[f'{first}_count{{model="tiny"}}']


def test_a_text_that_no_context_takes_is_refused_before_it_is_divided(client, engine, monkeypatch):
    monkeypatch.setattr(type(engine.tokenizer), "encode", lambda self, text: pytest.fail("it was divided"))
    answer = client.post(COMPLETIONS, json={"prompt": "x" * 1_000_000})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")
    assert "maximum context length is 800" in answer.json()["error"]["message"]


def test_the_interface_describes_itself(client):
    found = client.get("/openapi.json").json()
    assert found["openapi"].startswith("3.")
    for path, methods in found["paths"].items():
        for method, operation in methods.items():
            assert client.request(method, path.format(name="tiny"), content=b"{").status_code in (200, 400)
            if method == "post":
                name = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
                assert found["components"]["schemas"][name]["properties"]
    fields = found["components"]["schemas"]["CompletionFields"]["properties"]
    assert {"prompt", "max_tokens", "logit_bias", "guided_json"} <= set(fields)
    text = json.dumps(found)
    for name in set(re.findall(r"#/components/schemas/(\w+)", text)):
        assert name in found["components"]["schemas"]


def test_answers_have_the_fields_that_are_described(client):
    """Those of what this artifact answers."""
    paths = client.get("/openapi.json").json()["paths"]
    asked = {
        COMPLETIONS: {"prompt": TEXT, "max_tokens": 1},
        CHAT: {"messages": MESSAGES, "max_tokens": 1},
        "/v1/responses": {"input": TEXT, "max_output_tokens": 1},
        "/tokenize": {"prompt": TEXT},
        "/detokenize": {"tokens": [70]},
    }
    for path, methods in paths.items():
        for method, operation in methods.items():
            content = operation["responses"]["200"].get("content")
            if content is None or (method == "post" and path not in asked):
                continue
            answer = client.request(method, path.format(name="tiny"), json=asked.get(path)).json()
            described = set(content["application/json"]["schema"]["properties"])
            # A response repeats its request besides, and this one is cut.
            assert described - {"completed_at"} <= set(answer), path
            assert path == "/v1/responses" or described == set(answer), path


class Reading(HTMLParser):
    """Elements with what they have, and the text of all."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_the_manual_tells_all_that_is_described_and_has_no_script(client):
    answer = client.get("/docs")
    assert answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; style-src 'self'; ")
    assert "script" not in policy
    page = Reading(answer.text)
    assert {tag for tag, _ in page.tags} & {"script", "style", "img", "iframe", "form"} == set()
    assert not [name for _, given in page.tags for name in given if name.startswith("on") or name == "style"]
    ids = {given["id"] for _, given in page.tags if "id" in given}
    for _, given in page.tags:
        where = given.get("href")
        assert where is None or where[1:] in ids or client.get(where).status_code == 200, where
    described = client.get("/openapi.json").json()
    words = [path for path in described["paths"]]
    for methods in described["paths"].values():
        for operation in methods.values():
            words += [operation["summary"], *(one["description"] for one in operation["responses"].values())]
    for name, schema in described["components"]["schemas"].items():
        if name not in ("Error", "StreamOptions"):
            words += [*schema["properties"], *(one["description"] for one in schema["properties"].values())]
    assert len(words) > 150
    assert [one for one in words if one not in page.text] == []
    assert "integer, 1 or more, at most 256" in page.text  # n


def test_the_manual_needs_no_key_and_hostile_words_stay_text(engine):
    from gemma_deploy.serve.http.described import description
    from gemma_deploy.serve.http.manual import manual

    with client_of(engine, settings=Settings(keys=("first-key",))) as client:
        assert client.get("/docs").status_code == 200
        assert client.get("/openapi.json").status_code == 401
    described = description("<script>alert(1)</script>")
    described["paths"]["/<img src=x onerror=y>"] = {
        "get": {"summary": "<b>", "responses": {"200": {"description": "<i>"}}}
    }
    assert {tag for tag, _ in Reading(manual(described)).tags} & {"script", "img", "i"} == set()


WRONG = [
    ({"prompt": TEXT, "temperature": "hot"}, "temperature"),
    ({"prompt": TEXT, "temperature": -1}, "temperature"),
    ({"prompt": TEXT, "top_p": 0}, "top_p"),
    ({"prompt": TEXT, "n": 100_000}, "n"),
    ({"prompt": [TEXT] * 200, "n": 2}, "n"),
    ({"prompt": TEXT, "n": 0}, "n"),
    ({"prompt": TEXT, "max_tokens": -1}, "max_tokens"),
    ({"prompt": TEXT, "max_tokens": 1.5}, "max_tokens"),
    ({"prompt": TEXT, "logprobs": 21}, "logprobs"),
    ({"prompt": TEXT, "logit_bias": {"512": 1}}, "logit_bias"),
    ({"prompt": TEXT, "logit_bias": {"x": 1}}, "logit_bias"),
    ({"prompt": TEXT, "logit_bias": {"9" * 99: 1}}, "logit_bias"),
    ({"prompt": TEXT, "stop": [""]}, "stop"),
    ({"prompt": TEXT, "stop": ["x"] * 65}, "stop"),
    ({"prompt": TEXT, "stop_token_ids": [-1]}, "stop_token_ids"),
    ({"prompt": [512]}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": {}}, "prompt"),
    ({}, "prompt"),
    ({"prompt": [5] * 800}, "prompt"),
    ({"prompt": TEXT, "best_of": 3}, "best_of"),
    ({"prompt": TEXT, "suffix": "x"}, "suffix"),
    ({"prompt": TEXT, "guided_regex": "(a"}, "guided_regex"),
    ({"prompt": TEXT, "guided_choice": []}, "guided_choice"),
    ({"prompt": TEXT, "guided_grammar": "start: nothing"}, "guided_grammar"),
    ({"prompt": TEXT, "guided_json": {"type": "objekt"}}, "guided_json"),
    ({"prompt": TEXT, "guided_regex": "a", "guided_json": {}}, "guided_regex"),
    ({"prompt": TEXT, "guided_regex": "x" * 300_000}, "guided_regex"),
    ({"prompt": TEXT, "structured_outputs": {"regex": 3}}, "structured_outputs"),
    ({"prompt": TEXT, "prompt_logprobs": 1}, "prompt_logprobs"),
    ({"prompt": TEXT, "stream": 1}, "stream"),
    ({"prompt": TEXT, "min_p": 2}, "min_p"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": TEXT, "seed": 1 << 70}, "seed"),
    ({"prompt": TEXT, "repetition_penalty": 0}, "repetition_penalty"),
    ({"prompt": TEXT, "model": 3}, "model"),
]


@pytest.mark.parametrize(("body", "param"), WRONG)
def test_a_wrong_value_is_told_with_its_field(client, body, param):
    answer = client.post(COMPLETIONS, json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert error["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "user", "content": 3}], "chat_template_kwargs": {"messages": 1}}, "messages"),
        ({"messages": MESSAGES, "response_format": {"type": "xml"}}, "response_format"),
        ({"messages": MESSAGES, "tool_choice": "required", "tools": []}, "tool_choice"),
        ({"messages": MESSAGES, "top_logprobs": 3}, "top_logprobs"),
        ({"messages": MESSAGES, "logprobs": 3}, "logprobs"),
        ({"messages": [{"role": "user", "content": "a " * 900}]}, "messages"),
    ],
)
def test_a_wrong_conversation_is_told_with_its_field(client, body, param):
    answer = client.post(CHAT, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"3", b"\xff", b'{"prompt": NaN}', b"[" * 100_000, b'{"prompt": "\\ud800"}']
)
def test_what_is_no_json_is_refused(client, body):
    answer = client.post(COMPLETIONS, content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_what_is_not_there_and_how_it_is_said(client):
    for method, path, status in (("GET", "/nothing", 404), ("GET", COMPLETIONS, 405), ("POST", "/v1/models", 405)):
        answer = client.request(method, path)
        assert (answer.status_code, list(answer.json())) == (status, ["error"])
    for path in ("/v1/models/..%2f..%2fetc", "/v1/models/none"):
        assert client.get(path).status_code == 404
    answer = client.post(COMPLETIONS, json={"prompt": TEXT, "model": "../../tiny"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_unknown_fields_are_told_once(client, caplog):
    for _ in range(2):
        post(client, COMPLETIONS, prompt="a", max_tokens=1, of_another_server=3, user="me")
    assert [record.getMessage() for record in caplog.records if "of_another_server" in record.getMessage()] == [
        "requests hold the field 'of_another_server', which nothing is done with"
    ]


def test_large_bodies_are_refused_without_being_read(engine):
    with client_of(engine, settings=Settings(largest_body=1000)) as client:
        assert client.post(COMPLETIONS, content=b"x" * 1001).status_code == 413
        taken = []

        def pieces():
            for _ in range(100):
                taken.append(1)
                yield b"x" * 100

        answer = client.post(COMPLETIONS, content=pieces())  # without a length
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
        assert client.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 1}).status_code == 200


def test_a_key_opens_what_has_one(engine):
    with client_of(engine, settings=Settings(keys=("first-key", "second-key"))) as client:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "second-key"},
            {"Authorization": "Bearer "},
        ):
            answer = client.post(COMPLETIONS, json={"prompt": "a"}, headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
            assert client.get("/metrics", headers=headers).status_code == 401
        headers = {"Authorization": "Bearer second-key"}
        assert client.get("/v1/models", headers=headers).status_code == 200
        assert client.get("/health").status_code == 200


def test_a_full_queue_says_when_to_come_again(engine, monkeypatch):
    with client_of(engine) as client:
        monkeypatch.setattr(
            "gemma_deploy.serve.scheduler.Scheduler.add",
            lambda self, request: (_ for _ in ()).throw(QueueFullError("full", next_step="wait")),
        )
        for stream in (False, True):
            answer = client.post(COMPLETIONS, json={"prompt": "a", "stream": stream})
            assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
            assert answer.json()["error"]["code"] == "queue_full"


def test_web_pages_may_ask_where_it_is_allowed(engine, client):
    asked = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in client.options(COMPLETIONS, headers=asked).headers
    with client_of(engine, settings=Settings(origins=("https://a.example",))) as open_client:
        answer = open_client.options(COMPLETIONS, headers=asked)
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        answer = open_client.options(COMPLETIONS, headers={**asked, "Origin": "https://b.example"})
        assert "access-control-allow-origin" not in answer.headers


def test_pages_of_other_sites_may_not_ask(engine):
    """Under a name that means 127.0.0.1 to a browser, or with a POST that needs no leave."""
    hosts, asked = frozenset(("127.0.0.1", "localhost")), {"prompt": "a", "max_tokens": 1}
    with client_of(engine, settings=Settings(hosts=hosts, origins=("https://a.example",))) as client:
        for headers, status in [
            ({"host": "127.0.0.1:9000"}, 200),
            ({"host": "localhost"}, 200),
            ({"host": "evil.example:9000"}, 421),
            ({"host": ""}, 421),
            ({"host": "127.0.0.1:9000", "origin": "http://127.0.0.1:9000"}, 200),
            ({"host": "127.0.0.1:9000", "origin": "http://127.0.0.1:8000"}, 403),
            ({"host": "127.0.0.1:9000", "origin": "null"}, 403),
            ({"host": "127.0.0.1:9000", "origin": "https://a.example"}, 200),
        ]:
            answer = client.post(COMPLETIONS, json=asked, headers=headers)
            assert answer.status_code == status, headers
            assert client.get("/v1/models", headers=headers).status_code == status, headers
            assert status == 200 or answer.json()["error"]["message"]


def test_an_origin_that_is_no_address_is_another_site(client, caplog):
    for origin in ("http://[::1", "http://a]b[", "null", "\xff"):
        answer = client.get("/v1/models", headers={"origin": origin.encode("latin-1")})
        assert answer.status_code == 403, origin
    assert "Traceback" not in caplog.text


def test_a_path_makes_no_lines_in_the_log(client, caplog):
    with caplog.at_level("INFO", logger=app.__name__):
        assert client.get("/v1/models/a%0D%1b[2Jerror:%00").status_code == 404
    assert r"a\r\x1b[2Jerror:\x00: 404" in caplog.text
    assert not {"\x00", "\x1b", "\r"} & set(caplog.text)


def test_log_probabilities_that_would_take_gigabytes_are_refused(client):
    body = {"prompt": TEXT, "n": 256, "max_tokens": 700, "logprobs": 20}
    chat = {"messages": MESSAGES, "n": 256, "logprobs": True, "top_logprobs": 20}
    for path, given in ((COMPLETIONS, body), (CHAT, chat), (COMPLETIONS, body | {"stream": True})):
        answer = client.post(path, json=given)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "logprobs")


def test_who_leaves_while_it_sends_is_no_fault(engine, caplog):
    async def leave(app):
        scope = {
            "type": "http", "method": "POST", "path": COMPLETIONS, "headers": [], "query_string": b"",
            "http_version": "1.1", "scheme": "http", "server": ("x", 1),
        }  # fmt: skip
        pieces = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])

        async def receive():
            return next(pieces)

        async def send(message):
            pass

        await app(scope, receive, send)

    asyncio.run(leave(client_of(engine).app))
    assert "Traceback" not in caplog.text


def test_a_fault_of_the_engine_is_told_and_health_with_it(engine, monkeypatch):
    with client_of(engine) as client:
        monkeypatch.setattr(
            "gemma_deploy.serve.scheduler.Scheduler.step", lambda self: (_ for _ in ()).throw(ZeroDivisionError("x"))
        )
        answer = client.post(COMPLETIONS, json={"prompt": "a"})
        assert (answer.status_code, answer.json()["error"]["type"]) == (503, "server_error")
        assert "ZeroDivisionError" in answer.json()["error"]["message"]
        assert client.get("/health").status_code == 503
        assert client.post(COMPLETIONS, json={"prompt": "a"}).status_code == 503


def test_a_line_for_each_answer_and_never_the_prompt(engine, caplog):
    caplog.set_level("INFO", "gemma_deploy.serve")
    with client_of(engine, settings=Settings(json_log=True)) as client:
        post(client, COMPLETIONS, prompt=TEXT, max_tokens=3, ignore_eos=True)
        streamed(client, COMPLETIONS, prompt=TEXT, max_tokens=3, ignore_eos=True)
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name.endswith("answers")]
    assert [(line["completion_tokens"], line["finish"]) for line in lines] == [(3, "length")] * 2
    assert lines[1]["cached_tokens"] == 0  # fewer tokens than are worth it
    assert TEXT not in caplog.text


def test_seconds_of_waiting_are_told(engine, caplog):
    """Of several texts the longest; when they begin is what `test_scheduler` is about."""
    caplog.set_level("INFO", "gemma_deploy.serve")
    with client_of(engine, settings=Settings(json_log=True), together=1) as client:
        post(client, COMPLETIONS, prompt=[TEXT, TEXT], max_tokens=30, ignore_eos=True)
        post(client, COMPLETIONS, prompt=TEXT, max_tokens=1)
        metrics = client.get("/metrics").text
    two, one = (json.loads(record.getMessage()) for record in caplog.records if record.name.endswith("answers"))
    assert two["queue_s"] > 0
    assert 0 <= one["queue_s"] <= one["first_token_s"]
    lines = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if not line.startswith("#"))
    name = "gemma_deploy_time_in_queue_seconds"
    assert lines[f'{name}_count{{model="tiny"}}'] == lines[f'{name}_bucket{{model="tiny",le="+Inf"}}'] == "3"
    told = two["queue_s"] + one["queue_s"]
    assert told - 1e-3 < float(lines[f'{name}_sum{{model="tiny"}}']) < 2 * told + 1e-3  # the first of the two as well


class Waiting:
    """What a thread delivers."""

    def __init__(self):
        import queue

        self.found = queue.Queue()

    def __call__(self, events):
        for listener, event in events:
            self.found.put((listener, event))


def test_who_asks_a_thread_and_leaves_is_forgotten(engine):
    from gemma_deploy.serve.choosing import Choice
    from gemma_deploy.serve.request import Began, Ended, Request

    got = Waiting()
    worker = Worker(scheduling_of(engine, cache_bytes=1 << 26))
    worker.start(got)
    worker.submit(Request([2, 50, 60], Choice(), 700), "one")
    assert isinstance(got.found.get(timeout=30)[1], Began)
    worker.cancel("one")
    while True:
        listener, event = got.found.get(timeout=30)
        assert listener == "one"
        if isinstance(event, Ended):
            break
    assert event == Ended("cancelled")
    worker.stop()
    assert worker.broken is not None
