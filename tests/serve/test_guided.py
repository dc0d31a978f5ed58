"""Answers that follow a grammar, of a random model that would never write them of itself."""

import json
import re
import time
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("llguidance")
pytest.importorskip("starlette")

from gemma_deploy.errors import UsageError
from gemma_deploy.serve import guiding
from gemma_deploy.serve.guiding import Grammar, Guide, Guides
from tests.serve.test_http import CHAT, COMPLETIONS, MESSAGES, TEXT, client, client_of, engine, post, streamed  # noqa: F401

SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 99}},
    "required": ["name", "days"],
    "additionalProperties": False,
}


def answers(client, **body):  # noqa: F811
    found = post(client, COMPLETIONS, prompt=TEXT, max_tokens=60, seed=1, n=4, **body)["choices"]
    assert {choice["finish_reason"] for choice in found} == {"stop"}
    return [choice["text"] for choice in found]


def test_json_of_a_schema(client):  # noqa: F811
    for text in (
        *answers(client, guided_json=SCHEMA),
        *answers(client, structured_outputs={"json": json.dumps(SCHEMA)}),
    ):
        value = json.loads(text)
        assert value["name"] in ("Oslo", "Rome")
        assert 1 <= value["days"] <= 99
    form = {"type": "json_schema", "json_schema": {"name": "trip", "schema": SCHEMA, "strict": True}}
    body = {"messages": MESSAGES, "max_tokens": 60, "temperature": 0, "response_format": form, "ignore_eos": True}
    whole = post(client, CHAT, **body)["choices"][0]["message"]["content"]
    assert set(json.loads(whole)) == {"name", "days"}
    parts = streamed(client, CHAT, **body)
    assert "".join(one["choices"][0]["delta"].get("content", "") for one in parts) == whole


def test_expressions_choices_and_grammars(client, engine):  # noqa: F811
    assert all(re.fullmatch("[0-9]{3}-[a-c]+d", text) for text in answers(client, guided_regex="[0-9]{3}-[a-c]{1,5}d"))
    assert set(answers(client, guided_choice=["yes, indeed", "no"])) <= {"yes, indeed", "no"}
    grammar = 'root ::= "(" root ")" | "x"'
    x = engine.tokenizer.encode_more("x")[0]
    for text in answers(client, guided_grammar=grammar, logit_bias={str(x): 1.5}):
        inner = text.strip("()")
        assert inner == "x"
        assert text.count("(") == text.count(")")


def test_company_changes_nothing(client, engine):  # noqa: F811
    body = {"prompt": TEXT, "max_tokens": 40, "seed": 5, "logprobs": 1}
    alone = post(client, COMPLETIONS, **body, guided_json=SCHEMA)["choices"][0]
    with client_of(engine) as other:
        several = post(other, COMPLETIONS, **body, guided_json=SCHEMA, n=3)["choices"]
        free = post(other, COMPLETIONS, **body)["choices"][0]
    assert several[0] == alone
    assert free == post(client, COMPLETIONS, **body)["choices"][0]
    assert free["text"] != alone["text"]


def test_what_lets_nothing_through_is_told(client):  # noqa: F811
    body = {"prompt": TEXT, "guided_choice": ["a"], "min_tokens": 9, "max_tokens": 20}
    answer = client.post(COMPLETIONS, json=body)
    assert answer.status_code == 400
    assert "no token is left" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("json", {"$ref": "#/nowhere"}),
        Grammar("json", "{"),
        Grammar("regex", "(a|b"),
        Grammar("choice", ["x"] * 1001),
        Grammar("grammar", "start: start start"),
    ],
)
def test_damaged_and_costly_grammars_are_refused_soon(engine, grammar):  # noqa: F811
    guides = Guides(engine.path, engine.vocab_size, engine.stop_ids)
    with pytest.raises(UsageError):
        guides.guide(grammar)


def test_an_expression_of_many_states_is_followed_as_far_as_a_text_comes(engine):  # noqa: F811
    """As a table it has 2 to the power of 400; a token took 0.3 ms here."""
    guide = Guides(engine.path, engine.vocab_size, engine.stop_ids).guide(Grammar("regex", "([ab]*a[ab]{400}c)+"))
    tokens = [engine.tokenizer.encode_more(one)[0] for one in "ab"]
    for step in range(300):
        started = time.perf_counter()
        allowed = guide.allowed()
        assert allowed[tokens].all()
        assert np.count_nonzero(allowed) < 20
        guide.said(tokens[step * 7 % 3 % 2])
        assert time.perf_counter() - started < 1


def test_a_grammar_that_can_not_go_on_ends_its_own_request_alone(client, monkeypatch):  # noqa: F811
    calls = []

    def costly(self):
        calls.append(1)
        if len(calls) > 4:
            raise UsageError("the grammar cannot be followed: too costly", next_step="mend it")
        return np.ones(512, bool)

    monkeypatch.setattr(Guide, "allowed", costly)
    answer = client.post(
        COMPLETIONS, json={"prompt": TEXT, "guided_regex": "c+", "max_tokens": 50, "logit_bias": {"70": 50}}
    )
    assert (answer.status_code, len(calls)) == (400, 5)
    assert "too costly" in answer.json()["error"]["message"]
    assert post(client, COMPLETIONS, prompt=TEXT, max_tokens=2)["usage"]["completion_tokens"] > 0


def test_a_grammar_that_takes_a_processor_too_long_ends_its_own_request_alone(client, monkeypatch):  # noqa: F811
    """`x` 100,000 times took 0.9 s a token on a busy machine, in which nobody else got one."""
    clock = iter(range(10**6))
    monkeypatch.setattr(guiding, "time", SimpleNamespace(thread_time=lambda: next(clock) / 5))  # 0.2 s a look
    body = {"prompt": TEXT, "guided_regex": "[a-z]{20}", "max_tokens": 3, "temperature": 0}
    assert post(client, COMPLETIONS, **body)["usage"]["completion_tokens"] == 3
    monkeypatch.setattr(guiding, "time", SimpleNamespace(thread_time=lambda: next(clock) / 3))
    answer = client.post(COMPLETIONS, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "guided_regex")
    assert "too costly" in answer.json()["error"]["message"]
