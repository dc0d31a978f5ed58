"""`tool_choice` that asks for a call: of a random model that would never make one, every answer is one."""

import json

import pytest

pytest.importorskip("starlette")
pytest.importorskip("llguidance")

from gemma_deploy.chat import FUNCTION_GEMMA, GEMMA3, GEMMA4, ToolCall, parse
from gemma_deploy.errors import UsageError
from gemma_deploy.serve.calling import Function, call_grammar
from gemma_deploy.serve.guiding import Guides
from tests.serve.conftest import MARKERS
from tests.serve.test_http import CHAT, client_of, engine, post, streamed  # noqa: F401

jsonschema = pytest.importorskip("jsonschema")

RESPONSES = "/v1/responses"
MESSAGES = [{"role": "user", "content": "the list of a window"}]
TREE = {
    "type": "object",
    "properties": {"v": {"enum": ["a", 1, None, [True, "b"], {"c": 0.5}]}, "next": {"$ref": "#/$defs/tree"}},
    "required": ["v"],
    "additionalProperties": False,
}
SCHEMAS = {
    "weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 8},
            "days": {"type": "integer", "minimum": 1, "maximum": 14},
            "unit": {"enum": ["C", "F"]},
            "exact": {"type": "boolean"},
        },
        "required": ["city", "unit"],
        "additionalProperties": False,
    },
    "nothing": {"type": "object", "properties": {}, "additionalProperties": False},
    "tree": {"$defs": {"tree": TREE}, "type": "object", "properties": {"of": {"$ref": "#/$defs/tree"}},
             "required": ["of"], "additionalProperties": False},
    "lists": {
        "type": "object",
        "properties": {
            "few": {"type": "array", "items": {"type": "integer", "maximum": 9, "minimum": 0}, "minItems": 1,
                    "maxItems": 3},
            "pair": {"type": "array", "items": {"type": ["boolean", "null"]}, "minItems": 2, "maxItems": 2},
            "odd key: {": {"const": "x"},
            "either": {"anyOf": [{"type": "null"}, {"type": "string", "minLength": 1, "maxLength": 4}]},
            "both": {"allOf": [{"type": "integer", "minimum": 2}, {"maximum": 5}]},
        },
        "required": ["few", "odd key: {", "both"],
        "additionalProperties": False,
    },
}  # fmt: skip
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "Looks", "parameters": schema}}
    for name, schema in SCHEMAS.items()
]
HOT = {"temperature": 1.0, "max_tokens": 500}


@pytest.fixture(scope="module")
def client(speaker):
    with client_of(speaker, names=("talks",)) as found:
        yield found


def named(name):
    return {"type": "function", "function": {"name": name}}


def checked(calls):
    """Names of calls whose arguments are as the schema says."""
    for call in calls:
        jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMAS[call["function"]["name"]])
    return [call["function"]["name"] for call in calls]


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_function_that_is_named_is_called_as_its_schema_says(client, name):
    found = post(client, CHAT, messages=MESSAGES, tools=TOOLS, tool_choice=named(name), seed=1, n=12, **HOT)["choices"]
    said = set()
    for choice in found:
        assert choice["finish_reason"] == "tool_calls", choice
        assert choice["message"]["content"] is None
        assert checked(choice["message"]["tool_calls"]) == [name]
        said.add(choice["message"]["tool_calls"][0]["function"]["arguments"])
    assert len(said) == 1 if name == "nothing" else len(said) > 3


def test_a_call_is_required_and_which_one_is_left_to_the_model(client):
    tools = [one for one in TOOLS if one["function"]["name"] != "tree"]  # of which a random model finds no end
    body = {"messages": MESSAGES, "tools": tools, "tool_choice": "required", **HOT, "ignore_eos": True}
    found = post(client, CHAT, **body, seed=2, n=12, parallel_tool_calls=False)["choices"]
    names = [checked(choice["message"]["tool_calls"]) for choice in found]
    assert all(len(one) == 1 for one in names)
    assert len({one[0] for one in names}) > 1
    several = [choice for choice in post(client, CHAT, **body, seed=2, n=6)["choices"] if choice["stop_reason"] is None]
    assert any(len(checked(choice["message"]["tool_calls"])) > 1 for choice in several)
    events = [one["choices"][0] for one in streamed(client, CHAT, **body, seed=2, parallel_tool_calls=False)]
    calls = [call for one in events for call in one["delta"].get("tool_calls", [])]
    assert [call["function"] for call in calls] == [found[0]["message"]["tool_calls"][0]["function"]]
    assert events[-1]["finish_reason"] == "tool_calls"


def test_of_many_functions_some_are_allowed(client):
    tools = [named("nothing"), named("weather")]
    for mode, form in (("required", "chat"), ("required", "flat"), ("auto", "chat")):
        allowed = {"mode": mode, "tools": tools if form == "chat" else [{"type": "function", "name": "nothing"}]}
        choice = {"type": "allowed_tools", **({"allowed_tools": allowed} if form == "chat" else allowed)}
        found = post(client, CHAT, messages=MESSAGES, tools=TOOLS, tool_choice=choice, seed=3, n=4,
                     parallel_tool_calls=False, **HOT)  # fmt: skip
        for one in found["choices"] if mode == "required" else ():
            names = {"nothing", "weather"} if form == "chat" else {"nothing"}
            assert set(checked(one["message"]["tool_calls"])) <= names
        shown = post(client, CHAT, messages=MESSAGES, tools=TOOLS, max_tokens=1)["usage"]["prompt_tokens"]
        assert found["usage"]["prompt_tokens"] < shown


def test_thinking_comes_before_a_call_where_the_model_is_to_think(client, speaker):
    body = {"messages": MESSAGES, "tools": TOOLS, "tool_choice": named("nothing"), "max_tokens": 200}
    thinks = {"chat_template_kwargs": {"enable_thinking": True}}
    begin, end = (speaker.tokenizer.backend.token_to_id(one) for one in (GEMMA4.channel.begin, GEMMA4.channel.end))
    bias = {str(begin): 100, str(end): 3}
    found = post(client, CHAT, **body, **thinks, logit_bias=bias, seed=1, n=6)["choices"]
    whole = [choice["message"] for choice in found if choice["finish_reason"] != "length"]
    assert any(message.get("reasoning_content") for message in whole)
    assert all(checked(message["tool_calls"]) == ["nothing"] for message in whole)
    message = post(client, CHAT, **body, logit_bias=bias, seed=1)["choices"][0]["message"]
    assert "reasoning_content" not in message
    # After results this template begins the thinking itself.
    call = {"id": "c", "type": "function", "function": {"name": "nothing", "arguments": "{}"}}
    more = [*MESSAGES, {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": "it"}]  # fmt: skip
    message = post(client, CHAT, **{**body, "messages": more}, **thinks, logit_bias={str(end): 8}, seed=1)
    message = message["choices"][0]["message"]
    assert checked(message["tool_calls"]) == ["nothing"]


def test_responses_ask_for_calls_too(client):
    tools = [{"type": "function", **one["function"]} for one in TOOLS]
    for choice in ("required", {"type": "function", "name": "weather"}):
        body = {"input": "the list", "tools": tools, "tool_choice": choice, "parallel_tool_calls": False, "seed": 5}
        found = post(client, RESPONSES, **body, max_output_tokens=500)
        (call,) = found["output"]
        assert call["type"] == "function_call"
        jsonschema.validate(json.loads(call["arguments"]), SCHEMAS[call["name"]])
        assert choice == "required" or call["name"] == "weather"
        assert found["tool_choice"] == choice


def test_a_form_of_text_asks_nothing_of_a_call(client):
    form = {"type": "json_object"}
    body = {"messages": MESSAGES, "tools": TOOLS, "tool_choice": named("nothing"), "response_format": form}
    assert checked(post(client, CHAT, **body, **HOT)["choices"][0]["message"]["tool_calls"]) == ["nothing"]


def test_where_a_model_may_call_its_text_alone_has_a_form(client, speaker):
    """JSON or calls, whichever the model begins with, here because a bias says so."""
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    tools = [one for one in TOOLS if one["function"]["name"] == "nothing"]
    begin = speaker.tokenizer.backend.token_to_id(GEMMA4.call.begin)
    said = []
    for bias in (100, -100):
        body = {"response_format": form, "logit_bias": {str(begin): bias}, "seed": 1, "max_tokens": 40}
        body["parallel_tool_calls"] = False
        message = post(client, CHAT, messages=MESSAGES, tools=tools, **body)["choices"][0]["message"]
        said.append(message)
    assert set(checked(said[0]["tool_calls"])) == {"nothing"}
    assert said[0]["content"] is None
    assert said[1]["content"] in ('{"a": 1}', '{"a": 2}')
    assert "tool_calls" not in said[1]
    damaged = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "objekt"}}}
    answer = client.post(CHAT, json={"messages": MESSAGES, "tools": tools, "response_format": damaged})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "response_format")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "sometimes", "tools": TOOLS}, "tool_choice"),
        ({"tool_choice": named("none"), "tools": TOOLS}, "tool_choice"),
        ({"tool_choice": {"type": "function"}, "tools": TOOLS}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "required", "tools": []}, "tools": TOOLS}, "tool_choice"),
        ({"tool_choice": {"type": "custom"}, "tools": TOOLS}, "tool_choice"),
        ({"tool_choice": "required", "tools": TOOLS, "guided_regex": "a"}, "guided_regex"),
        ({"tool_choice": "required", "tools": [{"type": "function", "function": {"name": 3}}]}, "tools"),
    ],
)
def test_a_choice_that_is_none_is_told(client, body, param):
    answer = client.post(CHAT, json={"messages": MESSAGES, **body})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"a": {"$ref": "#/nowhere"}}},
        {"properties": {"a": {"$ref": "https://a.example/b"}}},
        {"properties": {"a": {"type": "text"}}},
        {"properties": {"a": 3}},
        {"properties": {"a": {"enum": []}}},
        {"properties": {"a": {"type": "integer", "minimum": 5, "maximum": 4}}},
        {"properties": {"a": {"allOf": [3]}}},
    ],
)
def test_a_schema_that_no_call_follows_is_told(client, schema):
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    answer = client.post(CHAT, json={"messages": MESSAGES, "tools": tools, "tool_choice": "required"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tool_choice"), answer.text


def test_deep_and_endless_schemas_are_told(client):
    schema = {"type": "string"}
    for _ in range(40):
        schema = {"type": "object", "properties": {"a": schema}}
    for wrong in (schema, {"$ref": "#"}, {"properties": {"a": {"$ref": "#/properties/a"}}, "required": ["a"]}):
        tools = [{"type": "function", "function": {"name": "f", "parameters": wrong}}]
        answer = client.post(CHAT, json={"messages": MESSAGES, "tools": tools, "tool_choice": "required"})
        assert answer.status_code == 400, answer.text
    assert post(client, CHAT, messages=MESSAGES, max_tokens=1)["usage"]["completion_tokens"] == 1


def test_a_model_whose_calls_are_text_is_told(engine):  # noqa: F811
    with client_of(engine) as plain:
        for choice in ("required", named("nothing")):
            answer = plain.post(CHAT, json={"messages": MESSAGES, "tools": TOOLS, "tool_choice": choice})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tool_choice")
            assert "no form of its own for tool calls" in answer.json()["error"]["message"]
        assert post(plain, CHAT, messages=MESSAGES, tools=TOOLS, tool_choice="none", max_tokens=1)


def followed(guide, ids):
    """Whether a grammar takes tokens, and may end behind them."""
    for token in ids:
        if not guide.allowed()[token]:
            return False
        guide.said(token)
    return bool(guide.allowed()[1])


def test_a_grammar_takes_what_the_parser_reads_and_nothing_else(speaker):
    """Calls as published templates show them, keys in their order, and none with a text that ends the call early."""
    assert MARKERS.split("a<|channel>")
    tokens = speaker.markers
    guides = Guides(speaker.path, speaker.vocab_size, speaker.stop_ids)
    functions = [Function("weather", SCHEMAS["weather"]), Function("free", {"properties": {"a": {}}}), Function("f")]
    guide = guides.guide(call_grammar(functions, GEMMA4, tokens, several=True))
    right = '<|tool_call>call:weather{city:<|"|>Os}{lo<|"|>,unit:<|"|>C<|"|>}<tool_call|>'
    for said, takes in (
        (right, True),
        (right + right, True),
        ('<|tool_call>call:weather{city:<|"|><|"|>,days:14,unit:<|"|>F<|"|>,exact:false}<tool_call|>', True),
        ("<|tool_call>call:f{}<tool_call|>", True),
        ('<|tool_call>call:free{a:{b:[1,-2.5e3,null,{}],<|"|>c d<|"|>:<|"|>\n<|"|>}}<tool_call|>', True),
        ("<|tool_call>call:free{}<tool_call|>", True),
        ("", False),
        ("text" + right, False),
        (right + "text", False),
        ("<|tool_call>call:other{}<tool_call|>", False),
        ('<|tool_call>call:weather{city:<|"|>Oslo<|"|>}<tool_call|>', False),
        ('<|tool_call>call:weather{city:<|"|>Oslo<|"|>,days:15,unit:<|"|>C<|"|>}<tool_call|>', False),
        ('<|tool_call>call:weather{city:<|"|>Oslo<|"|>,unit:<|"|>K<|"|>}<tool_call|>', False),
        ('<|tool_call>call:weather{city:<|"|>far too long<|"|>,unit:<|"|>C<|"|>}<tool_call|>', False),
        ("<|tool_call>call:free{a:tru}<tool_call|>", False),
    ):
        ids = speaker.tokenizer.encode_more(said)
        assert followed(guide.copy(), ids) == takes, said
        if takes:
            assert all(isinstance(one, ToolCall) for one in parse(GEMMA4, [said])), said
    spelled = [speaker.tokenizer.encode_more(one)[0] for one in '<|"|>']  # the marker, one letter a token
    text = speaker.tokenizer.encode_more('<|tool_call>call:free{a:<|"|>')
    assert not followed(guide.copy(), [*text, *spelled, *speaker.tokenizer.encode_more('<|"|>}<tool_call|>')])


def test_forms_without_calls_and_names_that_none_can_have_are_told():
    for form, name in ((GEMMA3, "f"), (GEMMA4, "f"), (FUNCTION_GEMMA, "a b")):
        tokens = dict(enumerate(FUNCTION_GEMMA.markers, 5))
        with pytest.raises(UsageError):
            call_grammar([Function(name)], form, tokens, several=False)
    with pytest.raises(UsageError):
        call_grammar([Function("f", {"properties": 3})], FUNCTION_GEMMA, tokens, several=False)
    grammar = call_grammar([Function("f")], FUNCTION_GEMMA, tokens, several=False, thinking="may")
    assert "thinking" not in grammar.given
