"""No chat template takes long or much memory: each of these would, in jinja2 as it is."""

# ruff: noqa: E501 (a template in a line)

import resource
import time

import pytest

from gemma_deploy.text import ChatTemplate, ChatTemplateError, budget
from tests.text import make

BIG = "{% set big = 'a' * 2000000 %}"
TWICE = "{% set ns = namespace(x='ab') %}{% for i in range(99) %}"
LISTS = "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
RUNAWAY = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops that write": "{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxxxxxxxxxx{% endfor %}{% endfor %}",
    "written often": BIG + "{% for i in range(9999) %}{{ big }}{% endfor %}",
    "written often in a block": BIG + "{% set x %}{% for i in range(9999) %}{{ big }}{% endfor %}{% endset %}{{ x }}",
    "a filtered loop": "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "a recursive loop": "{% for i in [range(99999)] recursive %}{% for j in i %}{{ loop(i) }}{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "macros that write": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% else %}x{% endif %}{% endmacro %}{{ f(30) }}",
    "a product of text": "{{ 'x' * 10 ** 9 }}",
    "a product of a list": "{{ ([0] * 10 ** 9) | length }}",
    "a product of products": "{{ ('x' * 2000000) * 2000000 }}",
    "a tuple": "{{ ((1, 2) * 10 ** 9) | length }}",
    "a power": "{{ 10 ** 1000000000 }}",
    "a power of powers": "{{ 9 ** (9 ** 9) }}",
    "products of numbers": "{% set ns = namespace(n=10 ** 20) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "a wide field": "{{ '%999999999d' % 1 }}",
    "a wide field of an argument": "{{ '%*d' % (999999999, 1) }}",
    "digits of a field": "{{ '%.999999999f' % 1.5 }}",
    "many fields": BIG + "{{ ('%s' * 1000) % ((big,) * 1000) }}",
    "one field often": BIG + "{{ ('%(x)s' * 100000) % {'x': big} }}",
    "a wide format": "{{ '{:>999999999}'.format(1) }}",
    "a width in a format": "{{ '{:{}}'.format(1, 999999999) }}",
    "a format often": BIG + "{{ ('{0}' * 100000).format(big) }}",
    "format as a filter": "{{ '%999999999d' | format(1) }}",
    "doubled by ~": TWICE + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "doubled by +": TWICE + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubled by a block": TWICE + "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
    "doubled by a macro": "{% macro d(x) %}{{ x }}{{ x }}{% endmacro %}"
    + TWICE
    + "{% set ns.x = d(ns.x) %}{% endfor %}",
    "doubled by join": TWICE + "{% set ns.x = [ns.x, ns.x] | join %}{% endfor %}",
    "doubled by replace": TWICE + "{% set ns.x = ns.x | replace('a', 'aa') | replace('b', 'bb') %}{% endfor %}",
    "doubled by format": TWICE + "{% set ns.x = '{0}{0}'.format(ns.x) %}{% endfor %}",
    "doubled by a filter block": TWICE
    + "{% set ns.x %}{% filter replace('a', 'aaa') %}{{ ns.x }}{% endfilter %}{% endset %}{% endfor %}",
    "doubled lists": TWICE + "{% set ns.x = (ns.x | list) + (ns.x | list) %}{% endfor %}",
    "lists of one list, printed": LISTS + "{{ ns.x }}",
    "lists of one list, as JSON": LISTS + "{{ ns.x | tojson }}",
    "lists of one list, compared": LISTS + "{{ ns.x == [ns.x, 1] }}",
    "objects of one object": "{% set ns = namespace(x={}) %}{% for i in range(99) %}{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}{{ ns.x }}",
    "tuples of one tuple, hashed": "{% set ns = namespace(x=(1,)) %}{% for i in range(99) %}{% set ns.x = (ns.x, ns.x) %}{% endfor %}{{ {ns.x: 1} }}",
    "centred": "{{ 'a' | center(10 ** 9) }}",
    "centred by the method": "{{ 'a'.center(10 ** 9) }}{{ 'a'.ljust(10 ** 9) }}",
    "zeros": "{{ 'a'.zfill(10 ** 9) }}",
    "tabs": "{{ ('\t' * 1000).expandtabs(10 ** 7) }}",
    "bytes": "{{ (1).to_bytes(10 ** 9, 'big') | length }}",
    "bytes centred": "{{ 'a'.encode().center(10 ** 9) | length }}",
    "replaced by the method": BIG + "{{ big.replace('a', 'b' * 1000) }}",
    "replaced between all": BIG + "{{ big.replace('', 'b' * 1000) }}",
    "replaced by the filter": BIG + "{{ big | replace('a', 'b' * 1000) }}",
    "joined by the method": BIG + "{{ big.join(range(99999) | map('string')) }}",
    "joined by the filter": BIG + "{{ range(99999) | join(big) }}",
    "joined lists": BIG + "{{ range(99999) | map('replace', '', big) | join }}",
    "translated": BIG + "{{ big.translate({97: 'b' * 1000}) }}",
    "indented": "{{ ('\n' * 1000000) | indent(10 ** 6) }}",
    "indented by text": "{{ ('\n' * 100000) | indent('a' * 100000, true) }}",
    "indented JSON": "{{ ([[[]]] * 9999) | tojson(indent=10 ** 6) }}",
    "separators of JSON": "{{ ([1] * 99999) | tojson(separators=('a' * 100000, ':')) }}",
    "filled up": "{{ [1] | batch(10 ** 9, 'x') | list | length }}",
    "sliced": "{{ [1] | slice(10 ** 9) | list | length }}",
    "rounded": "{{ 1.5 | round(10 ** 9, 'ceil') }}",
    "lorem ipsum": "{{ lipsum(n=10 ** 8) }}",
    "long words of lorem ipsum": "{{ lipsum(n=1, min=10 ** 8, max=10 ** 8 + 1) }}",
    "sums of lists": "{{ ([[0]] * 99999) | sum(start=[]) | length }}",
    "letters": BIG + "{{ (big * 1) | list | length }}",
    "split": BIG
    + "{% for i in range(999) %}{% set x = big.split('') if false else big.replace('a', 'a ').split() %}{% endfor %}",
    "stripped": BIG + "{{ (big ~ 'c').strip('b' * 1000000 ~ 'a') }}",
    "searched from the right": BIG + "{{ big.rfind('ab' ~ 'a' * 1000000) }}",
    "searched in many": BIG + "{% for i in range(99999) %}{% if big ~ 'b' in [big, big, big] %}{% endif %}{% endfor %}",
    "tags": "{{ ('<' * 2000000) | striptags }}",
    "tags by the method": "{{ (('<a>' * 600000) | safe).striptags() }}",
    "links": "{{ ('http://a.b/(' * 100000) | urlize }}",
    "printed nicely": "{{ ([[1]] * 99999) | pprint }}",
    "wrapped": "{{ ('a ' * 1000000) | wordwrap(1, wrapstring='b' * 1000) }}",
    "punycode": "{{ ('\u00e9' * 1000000).encode('punycode') | length }}",
    "idna": "{{ ('\u00e9.' * 500000).encode('idna') | length }}",
    "sorted": BIG + "{% for i in range(999) %}{{ (range(99999) | sort(reverse=true)) | length }}{% endfor %}",
    "selected": BIG
    + "{% for i in range(99999) %}{{ range(99999) | select('in', range(99999) | list) | list | length }}{% endfor %}",
    "grouped": "{% for i in range(9999) %}{% set x = range(99999) | map('string') | groupby(0) %}{% endfor %}",
    "kept for ever": BIG
    + "{% set ns = namespace(x={}) %}{% for i in range(9999) %}{% set ns.x = dict(ns.x, **{'k' ~ i: big ~ i}) %}{% endfor %}",
    "long comparisons": BIG + "{% for i in range(99999) %}{{ (big ~ 'a') == (big ~ 'b') }}{% endfor %}",
    "constants": "{{ ['x' * 999999999, 'a' | center(999999999)] }}",
    "a filter of a constant": "{{ 'a' | center(999999999) | length }}",
}
# A template that is written in this way is refused when it is compiled, or at once when it is rendered.
DEEP = {
    "brackets": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    "lists": "{{ " + "[" * 50_000 + "]" * 50_000 + " }}",
    "sums": "{{ 1" + " + 1" * 50_000 + " }}",
    "conditions": "{% if 1 %}" * 5_000 + "{% endif %}" * 5_000,
    "loops": "{% for i in [1] %}" * 50 + "{% endfor %}" * 50,
    "filters": "{{ 1" + " | string" * 50_000 + " }}",
    "calls": "{{ a" + "()" * 50_000 + " }}",
    "long": "x" * 300_000,
    "comments": "{#" * 100_000,
    "unfinished": "{{ '" * 50_000,
    "spaces": "{%" + " " * 200_000,
}


def refused(source, messages=({"role": "user", "content": "hello"},)):
    """The error of a template, and the seconds it took."""
    started = time.thread_time()
    with pytest.raises(ChatTemplateError) as caught:
        ChatTemplate({"default": source}, "the model").render(messages, add_generation_prompt=True)
    return caught.value, time.thread_time() - started


@pytest.fixture(scope="module", autouse=True)
def half_a_gigabyte():
    """Of memory beyond what is there: what takes more ends in a MemoryError, which is no refusal of the budget."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (1 << 29), hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize("name", RUNAWAY)
def test_a_runaway_template_ends_within_seconds_and_a_gigabyte(name, monkeypatch):
    monkeypatch.setattr(budget, "MAX_SECONDS", 0.5)  # a tenth, and so for the steps: there are many templates here
    monkeypatch.setattr(budget, "MAX_STEPS", budget.MAX_STEPS // 10)
    error, seconds = refused(RUNAWAY[name])
    assert "MemoryError" not in error.what
    assert seconds < 5
    assert error.next_step or "OverflowError" in error.what or "Error: " in error.what


def test_large_values_are_possible():
    """So that the templates above are refused for what they do with one."""
    chat = ChatTemplate({"default": BIG + "{{ big | length }}{{ ([0] * 99999) | length }}"}, "the model")
    assert chat.render([], add_generation_prompt=True) == "200000099999"


@pytest.mark.parametrize("limit", ["steps", "seconds"])
def test_the_real_limits_end_loops_as_well(limit, monkeypatch):
    monkeypatch.setattr(budget, "MAX_STEPS", 1 << 60 if limit == "seconds" else budget.MAX_STEPS)
    error, seconds = refused(RUNAWAY["nested loops"])
    assert limit in error.what
    assert seconds < 2 * budget.MAX_SECONDS


def test_what_is_made_and_given_up_again_counts_as_well():
    error, _ = refused(BIG + "{% for i in range(999) %}{% set x = big ~ i %}{% endfor %}")
    assert error.what.endswith("it makes more than 256 MiB of text and lists")


@pytest.mark.parametrize("name", DEEP)
def test_a_template_that_is_too_deep_or_too_long_is_refused(name):
    _, seconds = refused(DEEP[name])
    assert seconds < 5


def test_messages_that_are_too_long_are_refused():
    error, _ = refused("{{ messages[0].content }}", [{"role": "user", "content": "x" * 5_000_000}])
    assert "more than 2,097,152 characters" in error.what
    nested = []
    for _ in range(5_000):
        nested = [nested]
    refused("{{ messages }}", [{"role": "user", "content": nested}])


def test_the_limits_are_far_from_real_conversations():
    """Half a million characters, the 128k tokens of a Gemma 3, in 4,000 turns: within a tenth of the steps."""
    turns = []
    for number in range(2_000):
        turns += [
            {"role": "user", "content": f"question {number} " + "word " * 24},
            {"role": "assistant", "content": f"answer {number} " + "word " * 24},
        ]
    turns.append({"role": "user", "content": "the last"})
    for source in (make.GEMMA_1, make.GEMMA_3, make.FUNCTIONS, make.GEMMA_4):
        text = ChatTemplate({"default": source}, "the model", {"bos_token": "<bos>"}).render(
            turns, add_generation_prompt=True
        )
        assert text.count("word") == 96_000
        assert "the last" in text
