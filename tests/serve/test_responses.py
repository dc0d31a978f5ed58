"""`/v1/responses`: OpenAI's items and events, of a model that is made to say what a test wants."""

import json

import pytest

pytest.importorskip("starlette")
pytest.importorskip("llguidance")

from gemma_deploy.errors import DeployError
from tests.serve.conftest import saying
from tests.serve.test_http import CHAT, client_of, post

RESPONSES = "/v1/responses"
QUESTION = "the list of a window"
TOOL = {"type": "function", "name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}}
CALL = '<|tool_call>call:look{at:<|"|>it<|"|>}<tool_call|>'
# Of each kind of item, the events from its beginning to its end as OpenAI documents them.
TEXT_EVENTS = (
    "response.output_item.added", "response.content_part.added", "response.output_text.delta",
    "response.output_text.done", "response.content_part.done", "response.output_item.done",
)  # fmt: skip
THOUGHT_EVENTS = tuple(name.replace("output_text", "reasoning_text") for name in TEXT_EVENTS)
CALL_EVENTS = (
    "response.output_item.added", "response.function_call_arguments.delta", "response.function_call_arguments.done",
    "response.output_item.done",
)  # fmt: skip


@pytest.fixture(scope="module")
def client(speaker):
    with client_of(speaker, names=("talks",)) as found:
        yield found


def events_of(client, **body):
    """Of a stream, as (name, body)."""
    with client.stream("POST", RESPONSES, json={"input": QUESTION, **body, "stream": True}) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        text = "".join(answer.iter_text())
    found = []
    for event in text.removesuffix("\n\n").split("\n\n"):
        name, data = event.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    assert [body["sequence_number"] for _, body in found] == list(range(len(found)))
    assert all(body["type"] == name for name, body in found)
    return found


def without(item):
    """An item without what is new each time."""
    return {key: value for key, value in item.items() if key not in ("id", "call_id")}


def test_a_text_is_answered_as_a_conversation_is(client):
    found = post(client, RESPONSES, input=QUESTION, instructions="be a", max_output_tokens=7, temperature=0,
                 metadata={"a": "b"}, store=True)  # fmt: skip
    messages = [{"role": "system", "content": "be a"}, {"role": "user", "content": QUESTION}]
    chat = post(client, CHAT, messages=messages, max_tokens=7, temperature=0)
    text = chat["choices"][0]["message"]["content"]
    assert found["id"].startswith("resp_")
    assert found["object"] == "response"
    assert (found["status"], found["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    (item,) = found["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "incomplete")
    assert item["content"] == [{"type": "output_text", "text": text, "annotations": [], "logprobs": []}]
    usage = found["usage"]
    assert (usage["input_tokens"], usage["output_tokens"]) == (chat["usage"]["prompt_tokens"], 7)
    assert usage["total_tokens"] == usage["input_tokens"] + 7
    assert usage["output_tokens_details"] == {"reasoning_tokens": 0}
    assert found["metadata"] == {"a": "b"}
    assert (found["store"], found["previous_response_id"], found["error"]) == (False, None, None)
    assert (found["instructions"], found["temperature"], found["top_p"]) == ("be a", 0, 1)
    again = post(client, RESPONSES, input="a " * 200, max_output_tokens=1)
    assert again["usage"]["input_tokens_details"]["cached_tokens"] == 0
    again = post(client, RESPONSES, input="a " * 200, max_output_tokens=1)
    assert again["usage"]["input_tokens_details"]["cached_tokens"] > 100


REPLY = f"<|channel>thought\nthe window\n<channel|>of a layer {CALL}{CALL}"


def test_thinking_text_and_calls_are_items_and_each_is_told_in_order(client):
    body = {"guided_grammar": saying(REPLY), "temperature": 0, "tools": [TOOL]}
    whole = post(client, RESPONSES, input=QUESTION, **body)
    assert whole["status"] == "completed"
    thought, message, *calls = whole["output"]
    content = [{"type": "reasoning_text", "text": "the window"}]
    assert without(thought) == {"type": "reasoning", "status": "completed", "summary": [], "content": content}
    assert message["content"][0]["text"] == "of a layer "
    assert [without(one) for one in calls] == [
        {"type": "function_call", "status": "completed", "name": "look", "arguments": '{"at": "it"}'}
    ] * 2
    assert len({one["call_id"] for one in calls}) == 2
    assert 3 < whole["usage"]["output_tokens_details"]["reasoning_tokens"] < whole["usage"]["output_tokens"] - 10

    events = events_of(client, **body)
    names = [name for name, _ in events]
    once = [name for place, name in enumerate(names) if not place or names[place - 1] != name or "delta" not in name]
    assert once == [
        "response.created", "response.in_progress", *THOUGHT_EVENTS, *TEXT_EVENTS, *CALL_EVENTS, *CALL_EVENTS,
        "response.completed",
    ]  # fmt: skip
    created, ended = events[0][1]["response"], events[-1][1]["response"]
    assert (created["status"], created["output"], created["usage"]) == ("in_progress", [], None)
    assert created["id"] == ended["id"]
    assert [without(one) for one in ended["output"]] == [without(one) for one in whole["output"]]
    assert ended["usage"]["output_tokens"] == whole["usage"]["output_tokens"]
    told = [body for name, body in events if name == "response.output_item.done"]
    assert [body["item"] for body in told] == ended["output"]
    for place, item in enumerate(ended["output"]):
        parts = [body for name, body in events if name.endswith(".delta") and body["output_index"] == place]
        assert {one["item_id"] for one in parts} == {item["id"]}
        said = item.get("arguments") or item["content"][0]["text"]
        assert "".join(one["delta"] for one in parts) == said
        (done,) = [
            body for name, body in events
            if name.endswith(("text.done", "arguments.done")) and body["output_index"] == place
        ]  # fmt: skip
        assert done.get("text", done.get("arguments")) == said


def test_an_answer_that_is_cut_is_incomplete(client):
    events = events_of(client, max_output_tokens=3, guided_grammar=saying("the list of the window of a layer"))
    assert events[-1][0] == "response.incomplete"
    assert events[-1][1]["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    assert events[-2][1]["item"]["status"] == "incomplete"


def test_an_empty_answer_is_an_empty_message(client, speaker):
    bias = {str(speaker.stop_ids[0]): 100}
    found = post(client, RESPONSES, input=QUESTION, temperature=0, logit_bias=bias)
    assert [item["content"][0]["text"] for item in found["output"]] == [""]
    assert found["status"] == "completed"


def test_log_probabilities_are_those_of_the_text_alone(client):
    body = {"guided_grammar": saying("<|channel>thought\nhm\n<channel|>layer"), "temperature": 0}
    asked = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    found = post(client, RESPONSES, input=QUESTION, **body, **asked)
    part = found["output"][1]["content"][0]
    assert "".join(one["token"] for one in part["logprobs"]) == part["text"] == "layer"
    assert all(len(one["top_logprobs"]) == 2 and one["logprob"] < 0 for one in part["logprobs"])
    events = events_of(client, **body, **asked)
    parts = [body["logprobs"] for name, body in events if name == "response.output_text.delta"]
    assert [one for logs in parts for one in logs] == part["logprobs"]
    assert post(client, RESPONSES, input=QUESTION, **body)["output"][1]["content"][0]["logprobs"] == []


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9, "minimum": 0}}, "required": ["n"]}


@pytest.mark.parametrize(
    "form", [{"type": "json_schema", "name": "number", "schema": SCHEMA, "strict": True}, {"type": "json_object"}]
)
def test_text_in_a_form(client, form):
    found = post(client, RESPONSES, input=QUESTION, text={"format": form}, seed=3, max_output_tokens=300)
    if found["status"] == "completed":
        value = json.loads(found["output"][0]["content"][0]["text"])
        assert isinstance(value, dict)
        assert form["type"] == "json_object" or 0 <= value["n"] <= 9
    assert found["text"]["format"] == form


def test_items_become_what_a_conversation_is(client, speaker):
    """The prompt is that of the messages which chat completions would be sent."""
    items = [
        {"role": "developer", "content": "be a"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "the list"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "look", "arguments": '{"at": "it"}'},
        {"type": "function_call", "call_id": "c2", "name": "look", "arguments": '{"at": "of"}'},
        {"type": "function_call_output", "call_id": "c2", "output": "two"},
        {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "one"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "so", "annotations": []}]},
        {"role": "user", "content": "a"},
    ]
    calls = [
        {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": "it"}'}},
        {"id": "c2", "type": "function", "function": {"name": "look", "arguments": '{"at": "of"}'}},
    ]
    messages = [
        {"role": "system", "content": "do\n\nbe a"},
        {"role": "user", "content": "the list"},
        {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c2", "content": "two"},
        {"role": "tool", "tool_call_id": "c1", "content": "one"},
        {"role": "assistant", "content": "so"},
        {"role": "user", "content": "a"},
    ]
    function = {key: value for key, value in TOOL.items() if key != "type"}
    tools = [{"type": "function", "function": function}]
    common = {"temperature": 0, "logit_bias": {"9": 1.0}}
    names = {"enable_thinking": True}
    chat = post(client, CHAT, messages=messages, tools=tools, max_tokens=5, chat_template_kwargs=names, **common)
    found = post(client, RESPONSES, input=items, instructions="do", tools=[TOOL], max_output_tokens=5,
                 reasoning={"effort": "high"}, **common)  # fmt: skip
    assert found["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]
    assert found["usage"]["input_tokens_details"]["cached_tokens"] == chat["usage"]["prompt_tokens"] - 1
    off = post(client, RESPONSES, input=items, instructions="do", tools=[TOOL], max_output_tokens=5,
               reasoning={"effort": "none"}, **common)  # fmt: skip
    assert off["usage"]["input_tokens"] != found["usage"]["input_tokens"]


def test_what_was_answered_can_be_sent_back(client):
    body = {"guided_grammar": saying(REPLY), "temperature": 0, "tools": [TOOL]}
    first = post(client, RESPONSES, input=QUESTION, **body)["output"]
    results = [
        {"type": "function_call_output", "call_id": one["call_id"], "output": "it"}
        for one in first
        if one["type"] == "function_call"
    ]
    items = [{"role": "user", "content": QUESTION}, *first, *results]
    found = post(client, RESPONSES, input=items, tools=[TOOL], max_output_tokens=2)
    assert found["usage"]["input_tokens_details"]["cached_tokens"] > 0


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": 3}, "input"),
        ({"input": [3]}, "input"),
        ({"input": [{"role": "user"}]}, "input"),
        ({"input": [{"role": "king", "content": "a"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input"),
        ({"input": [{"type": "web_search_call"}]}, "input"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": {}}]}, "input"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "["}]}, "input"),
        ({"input": "a " * 900}, "input"),
        ({"input": "a", "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": "a", "conversation": "conv_1"}, "conversation"),
        ({"input": "a", "background": True}, "background"),
        ({"input": "a", "prompt": {"id": "p"}}, "prompt"),
        ({"input": "a", "truncation": "auto"}, "truncation"),
        ({"input": "a", "max_output_tokens": 0}, "max_output_tokens"),
        ({"input": "a", "tools": [{"type": "web_search"}]}, "tools"),
        ({"input": "a", "text": {"format": {"type": "xml"}}}, "text"),
        ({"input": "a", "text": {"format": 3}}, "text"),
        ({"input": "a", "text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "x"}}}}, "text"),
        ({"input": "a", "reasoning": {"effort": 3}}, "reasoning"),
        ({"input": "a", "metadata": {"a": 3}}, "metadata"),
        ({"input": "a", "temperature": -1}, "temperature"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_told_with_its_field(client, body, param):
    answer = client.post(RESPONSES, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    assert answer.json()["error"]["message"].startswith(param)


def test_what_fails_on_the_way_is_an_event(client, monkeypatch):
    def failing(self, *given, **more):
        raise DeployError("no luck", next_step="wait")

    monkeypatch.setattr("gemma_deploy.serve.choosing.Chooser.said", failing)
    name, body = events_of(client, max_output_tokens=5)[-1]
    assert name == "response.failed"
    assert body["response"]["status"] == "failed"
    assert body["response"]["error"] == {"code": "server_error", "message": "no luck"}


def test_openai_s_own_client_reads_it(speaker):
    """Its types take every event and item; the items that it gathers are those of the answer."""
    openai = pytest.importorskip("openai")
    from tests.serve.test_bounds import running_server

    with running_server(speaker) as ((host, port), _):
        official = openai.OpenAI(api_key="none", base_url=f"http://{host}:{port}/v1")
        with official.responses.stream(
            model="tiny",
            input=QUESTION,
            temperature=0,
            tools=[{**TOOL, "strict": False}],
            extra_body={"guided_grammar": saying(REPLY)},
        ) as stream:
            events = list(stream)
            final = stream.get_final_response()
        official.close()
    assert events[-1].type == "response.completed"
    assert final.output_text == "of a layer "
    assert [one.type for one in final.output] == ["reasoning", "message", "function_call", "function_call"]
    assert [one.arguments for one in final.output[2:]] == ['{"at": "it"}'] * 2
    assert final.usage.input_tokens_details.cached_tokens >= 0
