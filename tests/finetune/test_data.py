"""Files of examples: what is read, and the sentence for everything that is not one."""

import json

import pytest

from gemma_deploy.errors import UsageError
from gemma_deploy.finetune.data import read_examples
from tests.finetune.make import CHATS, write_lines


def read(tmp_path, text, **options):
    file = tmp_path / "data.jsonl"
    file.write_text(text, encoding="utf-8")
    return read_examples(file, **options)


def test_formats_are_told_by_their_keys(tmp_path):
    text = read_examples(write_lines(tmp_path / "a", [{"text": "one"}, {"text": "two", "other": 1}]))
    assert [one.text for one in text] == ["one", "two"]
    chat = read_examples(write_lines(tmp_path / "b", [{"messages": turns} for turns in CHATS]))
    assert [list(one.messages) for one in chat] == CHATS
    pair = read_examples(write_lines(tmp_path / "c", [{"prompt": "1+1=", "completion": "2"}]))
    assert (pair[0].prompt, pair[0].answer) == ("1+1=", "2")
    as_lists = [{"prompt": CHATS[0][:1], "completion": CHATS[0][1:]}]
    assert list(read_examples(write_lines(tmp_path / "d", as_lists))[0].messages) == CHATS[0]


def test_any_field_can_be_named(tmp_path):
    rows = write_lines(tmp_path / "quotes.jsonl", [{"quote": "Be yourself.", "author": "Oscar Wilde"}])
    assert read_examples(rows, field="quote")[0].text == "Be yourself."


def test_alpaca_is_a_list_with_or_without_input(tmp_path):
    rows = [
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"instruction": "Greet.", "output": "Hello"},
    ]
    first, second = read(tmp_path, json.dumps(rows))
    assert first.messages[0]["content"] == "Add.\n\n1 and 2"
    assert first.prompt.endswith("### Input:\n1 and 2\n\n### Response:\n")
    assert second.prompt.endswith("### Instruction:\nGreet.\n\n### Response:\n")
    assert (first.answer, second.answer) == ("3", "Hello")
    assert first.where == "entry 1"


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ("", {}, "the file is empty"),
        ("  \n\n", {}, "the file is empty"),
        ("[]", {}, "holds no example"),
        ('{"text": "a"}\n{"text": ', {}, "line 2 is not JSON"),
        ('{"text": "a"}\n\n{"other": "b"}\n', {}, "line 3: has no 'text' (its keys: other)"),
        ('{"text": "a"}\n{"text": 5}', {}, "line 2: 'text' is a number, not text"),
        ('{"text": "a"}\n{"text": " "}', {}, "line 2: 'text' is empty"),
        ('{"title": "a", "body": "b"}', {}, "line 1 is an example of no known format: its keys are 'body', 'title'"),
        ('"a"\n', {}, "line 1 is an example of no known format: it is text"),
        ('{"text": "a"}', {"field": "quote"}, "line 1: has no 'quote' (its keys: text)"),
        ('{"text": "a"}', {"format": "messages"}, "line 1: has no 'messages'"),
        ('{"messages": []}', {}, "line 1: 'messages' is an empty list"),
        ('{"messages": [{"role": "user", "content": "a"}]}', {}, "no message is the assistant's"),
        ('{"messages": [{"role": "bot", "content": "a"}]}', {}, "message 1 has the role 'bot'"),
        ('{"messages": [{"role": "user"}]}', {}, "message 1 has no 'content'"),
        ('{"prompt": "a", "completion": ""}', {}, "line 1: 'completion' is empty"),
        ('{"instruction": "a", "output": ""}', {}, "line 1: 'output' is empty"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', {"format": "prompt", "field": "x"}, "no field to"),
    ],
)
def test_each_fault_is_a_sentence(tmp_path, text, options, said):
    with pytest.raises(UsageError) as raised:
        read(tmp_path, text, **options)
    assert said in str(raised.value)
    assert raised.value.next_step


def test_offenders_are_counted_and_the_first_ones_named(tmp_path):
    rows = [{"text": "a"}, *({"txt": "b"} for _ in range(20))]
    with pytest.raises(UsageError) as raised:
        read_examples(write_lines(tmp_path / "data.jsonl", rows))
    assert "20 of 21 examples" in raised.value.what
    assert raised.value.problems[0].startswith("line 2:")
    assert raised.value.problems[-1] == "and 12 more"


def test_what_is_no_text_file_is_refused(tmp_path):
    (tmp_path / "data.jsonl").write_bytes(b'{"text": "\xff"}')
    with pytest.raises(UsageError, match="line 1 is not UTF-8 text"):
        read_examples(tmp_path / "data.jsonl")
    with pytest.raises(UsageError, match="No such file"):
        read_examples(tmp_path / "nothing.jsonl")
    with pytest.raises(UsageError, match="Is a directory"):
        read_examples(tmp_path)
