"""Chat templates: word for word what `apply_chat_template` of transformers gives, and a sentence for every failure."""

# ruff: noqa: E501 (a template in a line)

import json
import threading
from datetime import datetime

import pytest
from transformers import PreTrainedTokenizerFast

from gemma_deploy.text import ChatTemplate, ChatTemplateError, Tokenizer
from tests.text import make

SPECIAL = {"bos_token": "<bos>", "eos_token": "<eos>", "image_token": "<image>"}
USER = {"role": "user", "content": " Is <b> & 'é' text? "}
REPLY = {"role": "assistant", "content": "Yes,\n it is. "}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather in a <city> & its 'district', 都市",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "enum": ["Köln", "大阪"]}, "days": {"type": "integer"}},
                "required": ["city"],
            },
        },
    }
]
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "大阪", "days": 2}}}],
}
CONVERSATIONS = {
    "one": [USER],
    "two": [USER, REPLY],
    "three": [USER, REPLY, {"role": "user", "content": "{{ 7 * 7 }} {% raw %} <end_of_turn>"}],
    "system": [{"role": "system", "content": "Be short."}, USER, REPLY, USER],
    "developer": [{"role": "developer", "content": "Be short."}, USER],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "image"}]}, REPLY],
    "tools": [USER, CALL, {"role": "tool", "name": "weather", "content": {"value": [1.5, True, None, "新"]}}],
    "thoughts": [USER, {**REPLY, "reasoning": "hm", "content": "<|channel>thought\nhm<channel|>Yes."}],
    "none": [{"role": "user", "content": "x", "name": None, "thinking": None}, {**REPLY, "tool_calls": None}],
}
# One thing that templates do in each.
SNIPPETS = [
    "{% for m in messages %}{{ m.role }}{% if loop.index > 1 %}{% break %}{% endif %}{% continue %}x{% endfor %}",
    "{{ messages | tojson }}",
    "{{ messages | tojson(indent=2) }}{{ messages[0] | tojson(separators=(',', ':'), sort_keys=true) }}",
    "{{ 'é<>&' | tojson(ensure_ascii=true) }}{{ {'a': none, 'b': [true, 1.5]} | tojson }}",
    "{{ tools is none }} {{ documents is none }} {{ tools is defined }} {{ undefined_name is defined }}",
    "{{ tools is not none and tools | length }}{{ image_token }}{{ add_generation_prompt }}",
    "{% set ns = namespace(n=0, self=1) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{% macro f(x, n=2) %}<{{ x ~ n }}{{ caller() if caller }}>{% endmacro %}{{ f('a') }}{% call f('b', n=3) %}c{% endcall %}",
    "{% set x %}{% for i in range(3) %}{{ i }}{% endfor %}{% endset %}{{ x | upper }}{% filter upper %}a{{ x }}{% endfilter %}",
    "{% for a in [1, [2, [3]]] recursive %}{{ loop(a) if a is iterable else a }}{% endfor %}",
    "{% for a, b in {'x': 1, 'y': 2}.items() %}{{ a }}{{ b }}{{ loop.cycle('o', 'e') }}{% else %}none{% endfor %}",
    "{{ (1, 2) }}{{ [1, 'a'] }}{{ {'a': (1,)} }}{{ 1 ~ none ~ [2] }}{{ 'a' 'b' }}{{ 'x' * 3 }}{{ [0] * 2 }}",
    "{{ 7 // 2 }}{{ 7 / 2 }}{{ 2 ** 10 }}{{ 7 % 4 }}{{ -7 }}{{ '%s=%05.1f' % ('a', 2.345) }}{{ '{:>5}|{a}'.format(1, a=2) }}",
    "{{ 'a-b-c'.split('-') }}{{ '-'.join(['a', 'b']) }}{{ ' a '.strip() }}{{ 'a'.center(5, '*') }}{{ 'aXa'.replace('X', 'yy') }}",
    "{{ 'ab'.upper().startswith('A') }}{{ 'a,b'.rsplit(',', 1) }}{{ 'x'.encode('utf-8') }}{{ 'ab' | list }}{{ 'b' in 'abc' }}",
    "{{ messages | map(attribute='content') | join('<end_of_turn>\n<start_of_turn>and more') }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ messages | rejectattr('role', 'in', ['user']) | list }}",
    "{{ [3, 1, 2] | sort | join(',') }}{{ [1, 1, 2] | unique | list }}{{ {'b': 1, 'a': 2} | dictsort }}{{ [1, 2] | sum }}",
    "{{ [1, 2, 3, 4] | batch(3, 'x') | list }}{{ [1, 2, 3] | slice(2) | list }}{{ 'a\nb' | indent(4) }}{{ 'abc' | replace('b', 'bb') }}",
    "{{ 'a' | center(5) }}{{ 'hello world' | title | truncate(8) }}{{ 'x y z' | wordcount }}{{ 1.23456 | round(2) }}{{ '<a>' | e }}",
    "{{ messages[-1]['content'][:3] }}{{ messages[::-1] | length }}{{ messages[0].nothing | default('d') }}{{ ('' or 'o') and 'p' }}",
    "{% if messages[0].role == 'user' and not messages[9] is defined %}yes{% elif false %}no{% endif %}{# a comment #}",
    "  {% if true %}\n  lines are trimmed\n  {% endif %}\n{{- ' left' }}  {%- raw %}{{ x }}{% endraw %}\n\n",
    "{% generation %}{{ bos_token }}{% endgeneration %}{{ cycler('a', 'b').next() }}{{ joiner(',')() }}{{ dict(a=1) }}",
    "{{ dict.fromkeys(['a'], 1) }}{{ range(2, 8, 3) | list }}{{ 'a' if messages }}{{ '\u00e9' }}{{ strftime_now('%Y') }}",
    "{% set ns = namespace(x='') %}{% for i in range(5) %}{% set ns.x = ns.x ~ i %}{% endfor %}{{ ns.x }}{{ none }}{{ [] is sequence }}",
    "{% for m in messages if m.role == 'user' %}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.revindex }}{% endfor %}",
    "{% with a = 1 %}{{ a }}{% endwith %}{{ 3 is divisibleby 3 }}{{ 'a' is string }}{{ {} is mapping }}{{ 1 is number }}",
    "{{ '{0.__class__}'.format(1) }}{{ '{a[b]}'.format_map({'a': {'b': 2}}) }}{{ ''.__class__ is defined }}",
    "{{ messages | groupby('role') | map('first') | list }}{{ '5' | int + 1 }}{{ 'x' | int(7) }}{{ 2.0 | float }}{{ -1 | abs }}",
]
REFUSED = [
    "{{ messages[0]['content'] + 1 }}",
    "{{ 1 / 0 }}",
    "{{ undefined_name.x }}",
    "{{ raise_exception('no model turns') }}",
    "{{ raise_exception() }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for i in range(10 ** 9) %}x{% endfor %}",
    "{{ messages.__class__.__mro__ }}",
    "{{ ''.__class__ }}{{ ''['__class__'].mro() }}",
    "{{ messages.append(1) }}",
    "{{ namespace(_a=1) }}",
    "{% set ns = namespace() %}{% set ns._a = 1 %}",
    "{{ messages | nothing }}",
    "{{ 1 is nothing }}",
    "{% for",
    "{% include 'x' %}",
    "{{ namespace | tojson }}",
    "{{ 'a'.nothing() }}",
    "{{ '%d' % 'x' }}",
    "{{ [] | first + 1 }}",
    "{{ {}['a']['b'] }}",
    "{{ 'x'.encode('ascii').decode('none-such') }}",
    "{{ dict(1) }}",
]


def ours(template, messages, **options):
    chat = ChatTemplate({"default": template}, "the model", SPECIAL)
    return chat.render(messages, **{"add_generation_prompt": True} | options)


@pytest.fixture(scope="module")
def theirs():
    from tokenizers import Tokenizer, models

    special = {key: value for key, value in SPECIAL.items() if key != "image_token"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE()), extra_special_tokens={"image_token": "<image>"}, **special
    )

    def render(template, messages, **options):
        options = {"add_generation_prompt": True} | options
        return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options)

    return render


def tried(render, template, messages, **options):
    """What is rendered; None where it is refused."""
    try:
        return render(template, messages, **options)
    except Exception:
        return None


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", make.TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_templates_of_the_generations_give_the_words_of_transformers(theirs, template, conversation, prompt):
    source, messages = make.TEMPLATES[template], CONVERSATIONS[conversation]
    for options in ({}, {"tools": TOOLS}):
        expected = tried(theirs, source, messages, add_generation_prompt=prompt, **options)
        assert tried(ours, source, messages, add_generation_prompt=prompt, **options) == expected


def test_enough_of_those_conversations_are_rendered(theirs):
    """So that the test above does not compare refusals alone."""
    made = [tried(theirs, one, said) for one in make.TEMPLATES.values() for said in CONVERSATIONS.values()]
    assert len([one for one in made if one is not None]) >= 35


@pytest.mark.parametrize("template", SNIPPETS)
def test_what_templates_do_is_done_as_in_transformers(theirs, template):
    messages = CONVERSATIONS["three"]
    assert ours(template, messages, tools=TOOLS) == theirs(template, messages, tools=TOOLS)


@pytest.mark.parametrize("template", REFUSED)
def test_what_fails_there_is_a_sentence_here(theirs, template):
    with pytest.raises(Exception):  # noqa: B017, PT011 (of any kind)
        theirs(template, [USER])
    with pytest.raises(ChatTemplateError) as caught:
        ours(template, [USER])
    assert caught.value.what.startswith("the chat template refuses the messages: ")
    assert len(caught.value.what) > len("the chat template refuses the messages: ") + 5
    assert caught.value.where == "the model"
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ messages[0]['content'] + 1 }}", 'TypeError: can only concatenate str (not "int") to str'),
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "it calls itself without end"),
        ("a\n{% for", "line 2: unexpected 'end of template'"),
        ("{{ raise_exception('no model turns') }}", "no model turns"),
        ("{{ raise_exception('') }}", "it gives no reason"),
    ],
)
def test_the_reason_is_said(template, said):
    with pytest.raises(ChatTemplateError) as caught:
        ours(template, [USER])
    assert caught.value.what == f"the chat template refuses the messages: {said}"


def test_the_time_is_this_moments():
    before = datetime.now()
    shown = datetime.strptime(ours("{{ strftime_now('%Y-%m-%d %H:%M:%S.%f') }}", [USER]), "%Y-%m-%d %H:%M:%S.%f")
    assert before <= shown <= datetime.now()


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", [object()]])
def test_objects_with_methods_do_not_reach_a_template(value):
    with pytest.raises(ChatTemplateError, match=r"a message holds a (object|set|bytes)"):
        ours("{{ messages }}", [{"role": "user", "content": value}])
    with pytest.raises(ChatTemplateError, match="a message is a str"):
        ours("{{ messages }}", ["hello"])


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
@pytest.mark.parametrize("also", [{}, {"thinking": "t"}, {"reasoning": "r", "thinking": None}])
def test_reasoning_is_found_under_the_name_that_a_template_reads(theirs, name, also):
    messages = [USER, {**REPLY, name: "hm", **also}]
    template = "{{ messages[1].thinking }}|{{ messages[1].reasoning_content }}|{{ messages[1].reasoning }}"
    assert ours(template, messages) == theirs(template, messages)


def test_the_messages_are_not_changed():
    messages = [{"role": "user", "content": ["a"], "x": None, "thinking": "t"}]
    before = json.dumps(messages)
    ours("{% set m = messages %}{{ m[0].content.append(1) if false }}{{ m }}", messages)
    assert json.dumps(messages) == before


def test_threads_render_at_once():
    """Each with a budget of its own."""
    source, found = make.GEMMA_3, {}

    def render(number):
        messages = [{"role": "user", "content": f"message {number} " * 500}]
        found[number] = [ours(source, messages) for _ in range(20)]

    threads = [threading.Thread(target=render, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, texts in found.items():
        assert set(texts) == {ours(source, [{"role": "user", "content": f"message {number} " * 500}])}


# --- which template ------------------------------------------------------------------------------------------------


def places(directory, *, jinja=None, settings=None, processor=None, more=()):
    """A tokenizer's directory with chat templates in these places."""
    make.copy_demo(directory, chat_template=settings)
    (directory / "chat_template.jinja").unlink()
    if jinja is not None:
        (directory / "chat_template.jinja").write_text(jinja, encoding="utf-8")
    if processor is not None:
        (directory / "chat_template.json").write_text(json.dumps({"chat_template": processor}))
    for name, text in dict(more).items():
        (directory / "additional_chat_templates").mkdir(exist_ok=True)
        (directory / "additional_chat_templates" / f"{name}.jinja").write_text(text)
    return directory


NAMED = [{"name": "default", "template": "DEFAULT"}, {"name": "tool_use", "template": "TOOLS"}]


@pytest.mark.parametrize(
    "given",
    [
        {"jinja": "FILE"},
        {"settings": "SETTINGS"},
        {"jinja": "FILE", "settings": "SETTINGS"},
        {"settings": NAMED},
        {"jinja": "FILE", "settings": NAMED},
        {"jinja": "FILE", "more": {"tool_use": "TOOLS", "rag": "RAG"}},
        {"settings": "SETTINGS", "more": {"default": "MORE"}},
        {"jinja": "FILE", "more": {"default": "MORE"}},
        {"settings": "SETTINGS", "more": {"tool_use": "TOOLS"}},
        {"more": {"rag": "RAG"}},
        {"settings": [{"name": "rag", "template": "RAG"}]},
        {"settings": {"default": "DEFAULT", "tool_use": "TOOLS"}},
        {},
    ],
)
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_the_template_is_the_one_that_transformers_takes(tmp_path, given, tools):
    from transformers import AutoTokenizer

    directory = places(tmp_path / "t", **given)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    try:
        expected = tokenizer.apply_chat_template([USER], tools=tools, tokenize=False)
    except ValueError:
        expected = None
    try:
        found = Tokenizer(directory).chat.render([USER], tools=tools, add_generation_prompt=False)
    except ChatTemplateError:
        found = None
    assert found == expected


def test_the_template_of_a_processor_counts_where_there_is_no_other(tmp_path):
    assert Tokenizer(places(tmp_path / "a", processor="PROCESSOR")).render_chat([USER]) == "PROCESSOR"
    both = Tokenizer(places(tmp_path / "b", processor="PROCESSOR", settings="SETTINGS"))
    assert both.render_chat([USER]) == "SETTINGS"


def test_no_template_and_no_default_are_told_apart(tmp_path):
    with pytest.raises(ChatTemplateError, match="has no chat template: it continues text"):
        Tokenizer(places(tmp_path / "a")).encode_chat([USER])
    with pytest.raises(ChatTemplateError, match="2 chat templates and none of them is the default") as caught:
        Tokenizer(places(tmp_path / "b", more={"rag": "x", "code": "y"})).encode_chat([USER])
    assert caught.value.problems == ("code", "rag")


@pytest.mark.parametrize("ends", ["\r\n", "\r"])
def test_a_template_from_another_system_is_the_same_template(tmp_path, ends):
    from transformers import AutoTokenizer

    text = "{{ bos_token }}\n{% for m in messages %}\n{{ m.role + 'a\nb' }}\n{% endfor %}\n\n"
    directory = places(tmp_path / "t")
    (directory / "chat_template.jinja").write_bytes(text.replace("\n", ends).encode())
    expected = AutoTokenizer.from_pretrained(directory).apply_chat_template([USER], tokenize=False)
    assert Tokenizer(directory).chat.render([USER], add_generation_prompt=False) == expected
    (directory / "chat_template.jinja").write_bytes(b"\xef\xbb\xbf" + text.encode())  # transformers would show the mark
    assert Tokenizer(directory).chat.render([USER], add_generation_prompt=False) == expected
