"""Replies as messages and deltas of the OpenAI API, and such messages as chat templates take them."""

import itertools

import pytest

from gemma_deploy.chat import GEMMA4, Text, Thinking, parse
from gemma_deploy.chat.messages import Deltas, for_template, new_call_id, reply_message
from gemma_deploy.errors import UsageError
from gemma_deploy.text import ChatTemplate
from tests.chat import reference

REPLY = (
    '<|channel>thought\nTwo cities.\n<channel|>Let me see.<|tool_call>call:weather{city:<|"|>Zürich<|"|>}<tool_call|>'
    "<|tool_call>call:weather{days:[1,2.5,null]}<tool_call|>"
)
USER = {"role": "user", "content": "Weather?"}


def numbered():
    return map("call_{}".format, itertools.count()).__next__


def test_a_reply_is_a_message():
    message = reply_message(parse(GEMMA4, REPLY), numbered())
    assert message == {
        "role": "assistant",
        "content": "Let me see.",
        "reasoning_content": "Two cities.",
        "tool_calls": [
            {"id": "call_0", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Zürich"}'}},
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "weather", "arguments": '{"days": [1, 2.5, null]}'},
            },
        ],
    }


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([], {"content": ""}),
        ([Text("a"), Text("<tool_call|>", "why"), Text("b")], {"content": "a<tool_call|>b"}),
        ([Thinking("a"), Thinking("", "why")], {"content": None, "reasoning_content": "a"}),
    ],
)
def test_a_message_has_what_there_is(events, message):
    assert reply_message(events) == {"role": "assistant", **message}


def test_deltas_make_up_the_message():
    """As a client of the API puts them together, of a reply that comes a character at a time."""
    deltas, message = (
        Deltas(numbered()),
        {"role": "assistant", "content": "", "reasoning_content": "", "tool_calls": []},
    )
    for event in parse(GEMMA4, REPLY):
        delta = deltas.of(event) or {}
        for call in delta.pop("tool_calls", []):
            assert call.pop("index") == len(message["tool_calls"])
            message["tool_calls"].append(call)
        for key, text in delta.items():
            message[key] += text
    assert message == reply_message(parse(GEMMA4, REPLY), numbered())


def test_what_has_no_text_has_no_delta():
    assert Deltas().of(Thinking("", "why")) is None
    assert Deltas().of(Text("a", "why")) == {"content": "a"}


def test_every_call_has_an_id_of_its_own():
    ids = {new_call_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(one.startswith("call_") and len(one) == 29 for one in ids)


def results(message):
    return [
        {"role": "tool", "tool_call_id": call["id"], "content": f"result of {call['id']}"}
        for call in message["tool_calls"]
    ]


@pytest.mark.parametrize("revision", reference.REVISIONS)
def test_every_published_template_shows_calls_with_their_results(revision):
    """Behind the calls, in the turn that holds them, under the name of the function; and the model goes on there."""
    source = reference.published(revision)
    message = reply_message(parse(GEMMA4, REPLY), numbered()) | {"content": ""}
    taken = for_template([USER, message, *results(message)], source)
    text = ChatTemplate({"default": source}, "here").render(taken, add_generation_prompt=True)
    calls = REPLY.partition("Let me see.")[2]
    answers = "".join(
        f'<|tool_response>response:weather{{value:<|"|>result of call_{n}<|"|>}}<tool_response|>' for n in (0, 1)
    )
    assert text.endswith(calls.replace("null", "null" if revision == "gemma4_v5" else "None") + answers)
    assert text.count("<|turn>") == 2


@pytest.mark.parametrize("revision", reference.REVISIONS)
def test_text_before_calls_does_not_end_the_turn(revision, caplog):
    """As the messages stand, every published template closes the turn and gives the model none to go on with."""
    source = reference.published(revision)
    message = reply_message(parse(GEMMA4, REPLY), numbered())
    said = [USER, message, *results(message)]
    template = ChatTemplate({"default": source}, "here")
    as_they_stand = for_template([USER, message | {"content": ""}, *results(message)], source)
    as_they_stand[1] = {**as_they_stand[1], "content": "Let me see."}
    assert template.render(as_they_stand, add_generation_prompt=True).endswith("<tool_response|>Let me see.<turn|>\n")
    text = template.render(for_template(said, source), add_generation_prompt=True)
    assert text.endswith("<tool_response|>")
    told = "the chat template has no place for text before tool calls: 'Let me see.' is left out"
    if revision == "gemma4_v5":
        before = REPLY.partition("<|tool_call>")[0]
        assert f"<|turn>model\n{before}<|tool_call>call:weather" in text  # as it was said
    elif revision == "gemma4_v2":
        assert "<|turn>model\nLet me see.<turn|>\n<|turn>model\n<|tool_call>call:weather" in text
    else:
        assert "Let me see." not in text
    assert (told in caplog.messages) == (revision not in ("gemma4_v2", "gemma4_v5"))


def test_what_is_right_already_is_left_as_it_is():
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    messages = [USER, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "name": "g", "content": "1"}]
    assert for_template(messages, "") == messages
    odd = ["x", {"role": "assistant", "tool_calls": ["x", 3]}, {"role": "tool", "tool_call_id": [], "content": 1}]
    assert for_template(odd, "tool_responses") == [
        odd[0],
        {**odd[1], "tool_responses": [{"name": None, "response": 1}]},
    ]


@pytest.mark.parametrize("arguments", ["{", "[1]", "1", "[" * 100_000, '"x"'])
def test_arguments_that_are_no_object_are_refused(arguments):
    message = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    with pytest.raises(UsageError, match="the arguments of a call of 'f' are no JSON object"):
        for_template([message], "")


def test_a_call_without_arguments_has_none():
    message = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": ""}}]}
    assert for_template([message], "")[0]["tool_calls"] == [{"function": {"name": "f", "arguments": {}}}]
