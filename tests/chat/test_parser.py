"""Replies of every form into events: by hand, against transformers and the published templates, and in every cut."""

from __future__ import annotations

import json
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_deploy.chat import (
    FUNCTION_GEMMA,
    GEMMA3,
    GEMMA4,
    PLAIN,
    ChatParser,
    Text,
    Thinking,
    ToolCall,
    joined,
    parse,
)
from gemma_deploy.text import ChatTemplate
from tests.chat import reference
from tests.text import make

Q = '<|"|>'
ENDS = "{} ends nothing that has begun"
LATE = "another tool call began before the end of this one"
OPEN_CALL, OPEN_THINKING = "the reply ended inside a tool call", "the reply ended inside its thinking"
OPEN_HEADER = "the reply ended where a channel began"
NAMELESS = "it begins no channel of the name 'thought'"


def call(body):
    return f"<|tool_call>{body}<tool_call|>"


def no_call(body, reason):
    return Text(call(body), f"this is no tool call: {reason}")


WELL_FORMED = [
    ("", []),
    ("Hello.", [Text("Hello.")]),
    ("<|channel>thought\nHm.\n<channel|>Yes.", [Thinking("Hm."), Text("Yes.")]),
    ("<|channel>thought\n<channel|>Yes.", [Text("Yes.")]),
    ("<|channel>thought<channel|>Yes.", [Text("Yes.")]),
    ("<|channel>thought\n\n<channel|>Yes.", [Text("Yes.")]),
    ("<|channel>thought\n two\n\nlines\n\n<channel|>\nYes.\n", [Thinking(" two\n\nlines\n"), Text("\nYes.\n")]),
    ("<|channel>thought\na<channel|>b<|channel>thought\nc<channel|>", [Thinking("a"), Text("b"), Thinking("c")]),
    (call("call:f{}"), [ToolCall("f", {})]),
    (call("call:f{a:1}") + call("call:g{}"), [ToolCall("f", {"a": 1}), ToolCall("g", {})]),
    (
        f"a{call('call:f{}')}\n{call('call:g{}')} b",
        [Text("a"), ToolCall("f", {}), Text("\n"), ToolCall("g", {}), Text(" b")],
    ),
    (
        f"<|channel>thought\nlook\n<channel|>{call(f'call:get_weather{{city:{Q}Oslo{Q},days:2}}')}",
        [Thinking("look"), ToolCall("get_weather", {"city": "Oslo", "days": 2})],
    ),
    (call(f"call:google:mcp.tool-1/x{{a:{Q}{Q}}}"), [ToolCall("google:mcp.tool-1/x", {"a": ""})]),
    (
        call("call:f{a:0,b:-1,c:2.50,d:1e3,e:-1.5E-2,f:true,g:false,h:null,i:None}"),
        [ToolCall("f", dict(zip("abcdefghi", (0, -1, 2.5, 1000.0, -0.015, True, False, None, None), strict=True)))],
    ),
    (call("call:f{a:[],b:{},c:[[1,[2]],{d:[{}]}]}"), [ToolCall("f", {"a": [], "b": {}, "c": [[1, [2]], {"d": [{}]}]})]),
    (
        call(f"call:f{{a:{Q}he said \"no\", {{it}}: [is]\n\\n 'so' <b>é 日本{Q}}}"),
        [ToolCall("f", {"a": "he said \"no\", {it}: [is]\n\\n 'so' <b>é 日本"})],
    ),
    (
        call(f"call:f{{a:{Q}<|tool_call>call:g{{}}<tool_call|> <|channel>thought\n<channel|><turn|>{Q},b:1}}"),
        [ToolCall("f", {"a": "<|tool_call>call:g{}<tool_call|> <|channel>thought\n<channel|><turn|>", "b": 1})],
    ),
    (call(f"call:f{{{Q}a:b, {{c{Q}:1,d e:2,é:3}}"), [ToolCall("f", {"a:b, {c": 1, "d e": 2, "é": 3})]),
    (
        call('\n call: f {\n a : "x \\"y\\" }\\n" ,\n b : [ 1 , 2 ] , "c" : { } }\n'),
        [ToolCall("f", {"a": 'x "y" }\n', "b": [1, 2], "c": {}})],
    ),
    (call(f"call:f{{a:{12345678901234567890123456789}}}"), [ToolCall("f", {"a": 12345678901234567890123456789})]),
    ("a < b, <| c |> and <tool_call> d", [Text("a < b, <| c |> and <tool_call> d")]),
    (f"{Q}quoted{Q}", [Text(f"{Q}quoted{Q}")]),
]
MALFORMED = [
    ("<|channel>thought\nHm", [Thinking("Hm"), Thinking("", OPEN_THINKING)]),
    ("<|channel>thought\nHm\n<chan", [Thinking("Hm\n<chan"), Thinking("", OPEN_THINKING)]),
    ("<|channel>thought\n", [Thinking("", OPEN_THINKING)]),
    ("a<|channel>", [Text("a"), Text("<|channel>", OPEN_HEADER)]),
    ("<|channel>thought", [Text("<|channel>thought", OPEN_HEADER)]),
    (
        "<|channel>thoughts\na<channel|>b",
        [Text("<|channel>", NAMELESS), Text("thoughts\na"), Text("<channel|>", ENDS.format("<channel|>")), Text("b")],
    ),
    ("<|channel>final\nb", [Text("<|channel>", NAMELESS), Text("final\nb")]),
    ("<|channel><channel|>b", [Text("<|channel>", NAMELESS), Text("<channel|>", ENDS.format("<channel|>")), Text("b")]),
    ("a<channel|>b", [Text("a"), Text("<channel|>", ENDS.format("<channel|>")), Text("b")]),
    ("a<tool_call|>b", [Text("a"), Text("<tool_call|>", ENDS.format("<tool_call|>")), Text("b")]),
    (
        "<|channel>thought\na<|channel>thought\nb\n<channel|>c",
        [Thinking("a"), Thinking("<|channel>", "a channel begins inside a channel"), Thinking("thought\nb"), Text("c")],
    ),
    (
        f"<|channel>thought\na\n{call('call:f{}')}b",
        [Thinking("a\n"), Thinking("", "a tool call began before <channel|>"), ToolCall("f", {}), Text("b")],
    ),
    ("a<|tool_call>", [Text("a"), Text("<|tool_call>", OPEN_CALL)]),
    ("<|tool_call>call:f{a:1}", [Text("<|tool_call>call:f{a:1}", OPEN_CALL)]),
    ("<|tool_call>call:f{a:1}<tool_c", [Text("<|tool_call>call:f{a:1}<tool_c", OPEN_CALL)]),
    (
        f"<|tool_call>call:f{{a:{Q}b}}<tool_call|>c",
        [Text(f"<|tool_call>call:f{{a:{Q}b}}<tool_call|>c", OPEN_CALL)],  # what looks like the end is of the text
    ),
    ("<|tool_call>call:f{a:1}" + call("call:g{}"), [Text("<|tool_call>call:f{a:1}", LATE), ToolCall("g", {})]),
    (call(""), [no_call("", "it does not begin with call:NAME{, but with its end")]),
    (call("call:f"), [no_call("call:f", "it does not begin with call:NAME{, but with 'call:f'")]),
    (call("call:{}"), [no_call("call:{}", "it does not begin with call:NAME{, but with 'call:{}'")]),
    (call(":f{}"), [no_call(":f{}", "it does not begin with call:NAME{, but with ':f{}'")]),
    (call("call:f(a:1)"), [no_call("call:f(a:1)", "it does not begin with call:NAME{, but with 'call:f(a:1)'")]),
    (
        call('{"name": "f"}'),
        [no_call('{"name": "f"}', 'it does not begin with call:NAME{, but with \'{"name": "f"}\'')],
    ),
    (call("call:f{}g"), [no_call("call:f{}g", "'g' stands behind its arguments")]),
    (call("call:f{a:1"), [no_call("call:f{a:1", ", or } behind a value is expected, not its end")]),
    (call("call:f{a:1]"), [no_call("call:f{a:1]", ", or } behind a value is expected, not ']'")]),
    (call("call:f{a:[1}"), [no_call("call:f{a:[1}", ", or ] behind a value is expected, not '}'")]),
    (call("call:f{a:1 b:2}"), [no_call("call:f{a:1 b:2}", ", or } behind a value is expected, not 'b:2}'")]),
    (call("call:f{a:1,}"), [no_call("call:f{a:1,}", "a key is expected, not '}'")]),
    (call("call:f{a}"), [no_call("call:f{a}", ": behind the key 'a' is expected, not '}'")]),
    (call("call:f{a:}"), [no_call("call:f{a:}", "a value is expected, not '}'")]),
    (call("call:f{:1}"), [no_call("call:f{:1}", "a key is expected, not ':1}'")]),
    (call("call:f{a:Oslo}"), [no_call("call:f{a:Oslo}", "a value is expected, not 'Oslo}'")]),
    (call("call:f{a:truely}"), [no_call("call:f{a:truely}", "a value is expected, not 'truely}'")]),
    (call("call:f{a:'x'}"), [no_call("call:f{a:'x'}", "a value is expected, not \"'x'}\"")]),
    (call('call:f{a:"x}'), [no_call('call:f{a:"x}', "the text '\"x}' is no JSON")]),
    (call("call:f{a:007}"), [no_call("call:f{a:007}", "a value is expected, not '007}'")]),
    (call("call:f{a:1.}"), [no_call("call:f{a:1.}", "a value is expected, not '1.}'")]),
    (call("call:f{a:1.2.3}"), [no_call("call:f{a:1.2.3}", "a value is expected, not '1.2.3}'")]),
    (call("call:f{a:NaN}"), [no_call("call:f{a:NaN}", "a value is expected, not 'NaN}'")]),
    (call("call:f{a:1e999}"), [no_call("call:f{a:1e999}", "1e999 is larger than any number of JSON")]),
    (call(f"call:f{{a:{'9' * 5000}}}"), [no_call(f"call:f{{a:{'9' * 5000}}}", "a number has 5000 digits")]),
    (call("call:f{a:1,a:2}"), [no_call("call:f{a:1,a:2}", "the key 'a' is there twice")]),
    (
        call(f"call:f{{a:{'[' * 64}"),
        [no_call(f"call:f{{a:{'[' * 64}", "more than 64 objects and lists are inside each other")],
    ),
]
FORMS = [*WELL_FORMED, *MALFORMED]


def events(form, pieces, prompt=""):
    return joined(parse(form, pieces, prompt))


def same(found, expected):
    """Whether events are the same, types of numbers included (1, 1.0 and True are equal in Python)."""
    return found == expected and repr(found) == repr(expected)


def for_function_gemma(value):
    """A text or an event of Gemma 4 as FunctionGemma has it."""
    if isinstance(value, str):
        for theirs, ours in (("<|tool_call>", "<start_function_call>"), ("<tool_call|>", "<end_function_call>")):
            value = value.replace(theirs, ours)
        return value.replace(Q, "<escape>")
    if isinstance(value, Text):
        return Text(for_function_gemma(value.text), value.reason and for_function_gemma(value.reason))
    return ToolCall(value.name, json.loads(for_function_gemma(json.dumps(value.arguments, ensure_ascii=False))))


@pytest.mark.parametrize(("text", "expected"), FORMS)
def test_every_form_whole_and_in_every_cut(text, expected):
    assert same(events(GEMMA4, [text]), expected)
    assert same(events(GEMMA4, text), expected)  # a character at a time
    for cut in range(1, min(len(text), 400)):
        assert same(events(GEMMA4, [text[:cut], text[cut:]]), expected), cut


@pytest.mark.parametrize(("text", "expected"), [one for one in FORMS if "channel" not in one[0]])
def test_the_same_calls_of_function_gemma(text, expected):
    ours, expected = for_function_gemma(text), [for_function_gemma(event) for event in expected]
    assert same(events(FUNCTION_GEMMA, [ours]), expected)
    assert same(events(FUNCTION_GEMMA, ours), expected)


@pytest.mark.parametrize("form", [GEMMA3, PLAIN])
@pytest.mark.parametrize(("text", "_"), FORMS)
def test_a_model_without_markers_says_text(form, text, _):
    assert events(form, text) == ([Text(text)] if text else [])
    parser = ChatParser(form)
    assert joined(parser.feed(text)) == ([Text(text)] if text else [])  # and nothing is held back
    assert parser.end() == []


def test_text_and_thinking_come_as_soon_as_they_are_certain():
    parser = ChatParser(GEMMA4)
    assert parser.feed("a <") == [Text("a ")]
    assert parser.feed("b") == [Text("<b")]
    assert parser.feed("<|channel>tho") == []
    assert parser.feed("ught\nc\n") == [Thinking("c")]
    assert parser.feed("d<chan") == [Thinking("\nd")]
    assert parser.feed("nel|>e") == [Text("e")]
    assert parser.feed("<|tool_call>call:f{") == []
    assert parser.feed("}<tool_call|>") == [ToolCall("f", {})]
    assert parser.end() == []


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("<|turn>model\n", [Text("a\n"), Text("<channel|>", ENDS.format("<channel|>")), Text("b")]),
        ("<|turn>model\n<|channel>thought\n", [Thinking("a"), Text("b")]),
        ("<tool_response|><|channel>thought\n", [Thinking("a"), Text("b")]),
        ("<|turn>model\n<|channel>thought\nso far", [Thinking("a"), Text("b")]),
        (
            "<|turn>model\n<|channel>thought\n<channel|>",
            [Text("a\n"), Text("<channel|>", ENDS.format("<channel|>")), Text("b")],
        ),
        (
            "<|turn>user\nwhat is <|channel>thought\n?<turn|>\n<|turn>model\n",
            [Text("a\n"), Text("<channel|>", ENDS.format("<channel|>")), Text("b")],
        ),
    ],
)
def test_the_prompt_may_begin_the_thinking(prompt, expected):
    assert events(GEMMA4, ["a\n<channel|>b"], prompt) == expected
    assert events(GEMMA4, "a\n<channel|>b", prompt) == expected
    assert events(FUNCTION_GEMMA, "a", prompt) == [Text("a")]


WORDS = ("x", "thought", "\n", "call:", "f", "{", "}", "[", "]", ":", ",", "1", " ", '"', "\\", "true", "<", "|", ">")


def soup(source, count):
    """A text of markers, halves of markers and pieces of calls; ordinary words in it are all different."""
    pieces = []
    for number in range(count):
        kind = source.random()
        if kind < 0.35:
            marker = source.choice(GEMMA4.markers)
            pieces.append(marker if source.random() < 0.9 else marker[: source.randrange(1, len(marker))])
        elif kind < 0.5:
            pieces.append(f"w{number}w")
        elif kind < 0.6:
            pieces.append(f"<|tool_call>call:w{number}w{{{Q}w{number}v{Q}:[w{number}u,1]" + "}<tool_call|>")
        elif kind < 0.7:
            pieces.append(f"<|tool_call>call:w{number}w{{w{number}v:{Q}w{number}u{Q}" + "}<tool_call|>")
        else:
            pieces.append(source.choice(WORDS))
    return "".join(pieces)


def words(events):
    """The words of a soup in the order in which events have them."""
    said = (f"{one.name}{json.dumps(one.arguments)}" if isinstance(one, ToolCall) else one.text for one in events)
    return re.findall(r"w[0-9]+[wvu]", " ".join(said))


def test_nothing_is_lost_of_any_soup_in_any_cut():
    calls = 0
    for seed in range(400):
        source = random.Random(seed)
        text = soup(source, source.randrange(1, 40))
        whole = events(GEMMA4, [text])
        assert words(whole) == re.findall(r"w[0-9]+[wvu]", text), text
        for _ in range(4):
            cuts = sorted(source.choices(range(len(text) + 1), k=source.randrange(1, 12)))
            pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
            assert same(events(GEMMA4, pieces), whole), (text, pieces)
        calls += sum(isinstance(one, ToolCall) for one in whole)
    assert calls > 200  # and not all of it is malformed


@given(st.text(alphabet=st.sampled_from([*'<|>channel_tool"n:{}', "\n"]), max_size=60), st.integers(0, 60))
@settings(max_examples=150, deadline=None)
def test_any_text_in_any_cut(text, cut):
    whole = events(GEMMA4, [text])
    assert same(events(GEMMA4, [text[:cut], text[cut:]]), whole)
    assert same(events(GEMMA4, text), whole)


# What this parser takes and that of transformers does not: names with more than word characters, None, markers inside a
# text, keys that are no word, white space before `call:`, a channel without its line feed.
OURS_ALONE = ("call:google:", ":None", "call:g{}<tool_call|> <|channel>", "d e:2", "\n call:", "thought<channel|>")


@pytest.mark.parametrize("text", [text for text, _ in WELL_FORMED if not any(one in text for one in OURS_ALONE)])
def test_transformers_reads_the_same(text):
    """Of texts in several places it keeps the last one, and no white space around any."""
    theirs, ours = reference.parsed_by_transformers(text), events(GEMMA4, [text])
    calls = [(one["function"]["name"], one["function"]["arguments"]) for one in theirs.get("tool_calls", [])]
    assert same([ToolCall(*one) for one in calls], [one for one in ours if isinstance(one, ToolCall)])
    assert theirs.get("content", "") == last(ours, Text)
    assert theirs.get("reasoning_content", "") == last(ours, Thinking)


def last(events, kind):
    return next((one.text.strip() for one in reversed(events) if isinstance(one, kind) and one.text.strip()), "")


@pytest.mark.parametrize("odd", OURS_ALONE)
def test_what_transformers_does_not_read(odd):
    (text,) = (text for text, _ in WELL_FORMED if odd in text)
    try:
        assert reference.parsed_by_transformers(text) == {"role": "assistant", "content": text}
    except ValueError as error:
        assert "could not parse" in str(error)  # noqa: PT017


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=12).filter(lambda text: Q not in text and "<escape>" not in text),
    st.sampled_from(['"', "{", "}:,[", "<tool_call|>", "<|channel>thought\n", "a\nb", "null", "<end_function_call>"]),
)
KEYS = st.from_regex(r"[^\W\d]\w{0,6}", fullmatch=True)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=6
)
ARGUMENTS = st.dictionaries(KEYS, VALUES, max_size=4)
CALLS = st.lists(st.tuples(st.from_regex(r"[a-z_]\w{0,8}", fullmatch=True), ARGUMENTS), min_size=1, max_size=3)
USER = {"role": "user", "content": "do it"}


def turn(template, message):
    """What a chat template writes for a message of the model's, its calls without results."""
    before = template.render([USER], add_generation_prompt=True)
    text = template.render([USER, message], add_generation_prompt=False)
    assert text.startswith(before)
    return text[len(before) :]


def message_of(calls):
    made = [{"type": "function", "function": {"name": name, "arguments": given}} for name, given in calls]
    return {"role": "assistant", "tool_calls": made}


@pytest.mark.parametrize("revision", reference.REVISIONS)
@given(CALLS)
@settings(max_examples=25, deadline=None)
def test_what_the_published_templates_write_is_read_back(revision, calls):
    """Arguments of any form, as every revision of Gemma 4's chat template shows them to the model."""
    template = ChatTemplate({"default": reference.published(revision)}, revision)
    text = turn(template, message_of(calls))
    end = "<turn|>\n" if text.endswith("<turn|>\n") else "<|tool_response>"  # the first revision closes the turn
    assert text.endswith(end)
    expected = [ToolCall(name, given) for name, given in calls]
    found = events(GEMMA4, [text.removesuffix(end)])
    assert all(isinstance(one, ToolCall) for one in found), found
    assert [(one.name, in_order(one.arguments)) for one in found] == [
        (one.name, in_order(one.arguments)) for one in expected
    ]


def in_order(value):
    """JSON with its keys sorted, as templates sort them: 1, 1.0 and true stay different."""
    return json.dumps(value, sort_keys=True)


@given(CALLS)
@settings(max_examples=25, deadline=None)
def test_what_a_template_of_function_gemma_writes_is_read_back(calls):
    template = ChatTemplate({"default": make.FUNCTIONS}, "here")
    text = turn(template, message_of(calls)).strip()
    found = [one for one in events(FUNCTION_GEMMA, [text]) if one != Text("\n")]
    assert [(one.name, in_order(one.arguments)) for one in found] == [(name, in_order(given)) for name, given in calls]


@given(
    st.text(max_size=30).filter(lambda text: "<" not in text and text),
    st.text(max_size=20).filter(lambda t: "<" not in t),
)
@settings(max_examples=30, deadline=None)
def test_thinking_that_the_newest_template_writes_is_read_back(thinking, content):
    template = ChatTemplate({"default": reference.published("gemma4_v5")}, "here")
    text = turn(template, {"role": "assistant", "content": content, "reasoning_content": thinking})
    found = events(GEMMA4, [text.removesuffix("<turn|>\n")])
    assert found == [Thinking(thinking), *([Text(content.strip())] if content.strip() else [])]


def test_a_long_reply_takes_no_longer_than_it_should():
    """Linear in the length, whole or in pieces: a call of 300,000 characters, and 30,000 markers that mean nothing."""
    import time

    long = call(f"call:f{{a:{Q}{'x<' * 150_000}{Q}}}")
    stray = "<channel|>" * 30_000
    started = time.process_time()
    assert [one.name for one in parse(GEMMA4, long)] == ["f"]
    assert len(events(GEMMA4, [stray])) == 30_000
    assert time.process_time() - started < 10  # 1.0 s; quadratic it is minutes
