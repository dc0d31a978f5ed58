"""`gemma-deploy chat` with a model that thinks and calls tools."""

import json

import pytest

from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.backends.onnxruntime.genai import GenaiSession
from gemma_deploy.chat import GEMMA4
from gemma_deploy.cli import main
from gemma_deploy.errors import UsageError
from gemma_deploy.text import Tokenizer
from tests.chat import reference
from tests.chat.test_conversation import CALL, MORE, TOOLS
from tests.runtime.make import compile_tiny
from tests.test_chat import Terminal, talk


@pytest.fixture(scope="module")
def artifact(once):
    def make(root):
        template = reference.published("gemma4_v5")
        compile_tiny(root, "gemma3_text", {"type": "onnxruntime", "dtype": "fp32"}, template=template, more=MORE)

    return once("chat-gemma4", make) / "workspace" / "tiny"


@pytest.fixture
def tools(tmp_path):
    file = tmp_path / "tools.json"
    file.write_text(json.dumps(TOOLS))
    return file


@pytest.fixture
def model(artifact, monkeypatch):
    """replies -> what the model is given to read, as text; it says the replies one after the other, in halves."""
    read, tokenizer = [], Tokenizer(artifact)

    def says(*replies):
        told = iter(replies)

        def reply(session, ids, *, max_new_tokens, shown, stats, stop=()):
            read.append(tokenizer.decode_all(ids))
            assert shown == tokenizer.tokens_of(GEMMA4.markers)
            said = next(told)
            if said is None:
                raise UsageError("no room")
            for piece in (said[: len(said) // 2], said[len(said) // 2 :]):
                if piece.startswith("^C"):
                    raise KeyboardInterrupt
                yield piece

        monkeypatch.setattr(GenaiSession, "reply", reply)
        return read

    return says


def test_an_artifact_of_this_template_records_its_format(artifact):
    manifest = Artifact.open(artifact).manifest
    assert manifest.chat_format == "gemma4"
    assert Tokenizer(artifact).id_of("<|tool_response>") in manifest.model.eos_token_ids


def test_thinking_goes_beside_the_reply_or_is_hidden(artifact, model, capfd, monkeypatch):
    said = "<|channel>thought\nhm,\nso\n<channel|>the list"
    read = model(said, said, said)
    assert talk(monkeypatch, capfd, artifact, "a\n", "--think") == (0, "the list\n", "hm,\nso\n")
    assert talk(monkeypatch, capfd, artifact, "a\n", "--think", "--hide-thinking") == (0, "the list\n", "")
    assert talk(monkeypatch, capfd, artifact, "a\n", "--no-think") == (0, "the list\n", "hm,\nso\n")
    assert ["<|think|>" in one for one in read] == [True, True, False]


def test_thinking_is_dimmed_on_a_terminal(artifact, model, capfd, monkeypatch):
    import click

    styled = []
    style = click.style
    monkeypatch.setattr("click.style", lambda text, **how: styled.append((text, how)) or style(text, **how))
    model("<|channel>thought\nhm<channel|>a")
    assert talk(monkeypatch, capfd, artifact, "a\n")[0] == 0
    assert [how for _, how in styled] == [{"dim": True}] * len(styled)
    assert "".join(text for text, _ in styled) == "hm"


def test_tool_calls_are_lines_of_json_and_results_go_back(artifact, model, tools, capfd, monkeypatch):
    read = model(f"ok{CALL}{CALL}", "done", "more")
    lines = "a\n/result one\n/result two\nb\n"
    code, out, err = talk(monkeypatch, capfd, artifact, lines, "--tools", tools)
    line = '{"name": "look", "arguments": {"at": "it"}}\n'
    assert (code, out) == (0, f"ok\n{line}{line}done\nmore\n")
    assert err == "waiting for the result of look: /result TEXT\nwaiting for the result of look\n"
    assert "declaration:look" in read[0]
    assert 'response:look{value:<|"|>one<|"|>}' in read[1]
    assert 'response:look{value:<|"|>two<|"|>}' in read[1]
    assert read[1].startswith("<|tool_response>response:look{")  # the rest alone
    assert read[2] == "<turn|>\n<|turn>user\nb<turn|>\n<|turn>model\n"


def test_a_person_is_told_what_the_model_waits_for(artifact, model, tools, capfd, monkeypatch):
    model(CALL, "done")
    code, out, err = talk(
        monkeypatch, capfd, artifact, Terminal("a\nb\n/result\n/result x\n/reset\n/result y\n"), "--tools", tools
    )
    assert code == 0
    assert "error: the model waits for 1 result(s) of its tool calls: look" in err
    assert err.count("error: there are 1 result(s) for 0 tool call(s) of the last reply") == 2
    assert "done" in out


def test_what_is_refused_loses_nothing_of_the_conversation(artifact, model, capfd, monkeypatch):
    """The session was emptied for it: what comes next is the whole conversation again."""
    read = model("<|channel>thought\nhm<channel|>a", None, "c")
    code, _, err = talk(monkeypatch, capfd, artifact, Terminal("a\nb\nc\n"), "--think")
    assert (code, "error: no room" in err) == (0, True)
    user = "<|turn>user\n{}<turn|>\n<|turn>model\n"
    system = "<bos><|turn>system\n<|think|>\n<turn|>\n"
    assert read[1:] == [f"{system}{user.format('a')}a<turn|>\n{user.format(one)}" for one in ("b", "c")]


def test_an_answer_of_run_is_taken_apart_too(artifact, model, capfd):
    """With --chat; without it a text is continued, and markers are no part of it."""
    read = model(f"<|channel>thought\nhm\n<channel|>ok{CALL}")
    assert main(["run", str(artifact), "--chat", "-p", "a"]) == 0
    assert capfd.readouterr() == ('ok\n{"name": "look", "arguments": {"at": "it"}}\n', "hm\n")
    assert read == ["<bos><|turn>user\na<turn|>\n<|turn>model\n"]


def test_what_is_malformed_is_shown_with_the_reason(artifact, model, capfd, monkeypatch):
    model("a<|tool_call>call:f{b", "<|channel>thought\nhm")
    code, out, err = talk(monkeypatch, capfd, artifact, "a\nb\n")
    assert (code, out) == (0, "a<|tool_call>call:f{b\n\n")
    assert err == "note: the reply ended inside a tool call\nhm\nnote: the reply ended inside its thinking\n"


def test_ctrl_c_in_the_middle_keeps_what_was_said(artifact, model, capfd, monkeypatch):
    read = model("<|channel>thought\nhm" + "^C" * 10, "b")
    code, out, err = talk(monkeypatch, capfd, artifact, "a\nb\n")
    assert (code, out) == (0, "\nb\n")
    assert err == "hm\nnote: the reply ended inside its thinking\n"
    assert "hm" not in read[1]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [(["--template-arg", "enable_thinking=true"], True), (["--template-arg", "enable_thinking=0"], False)],
)
def test_names_for_the_template(artifact, model, capfd, monkeypatch, arguments, name):
    read = model("a")
    assert talk(monkeypatch, capfd, artifact, "a\n", *arguments)[0] == 0
    assert ("<|think|>" in read[0]) is name


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--template-arg", "x"], "--template-arg 'x' is none\n  expected: NAME=VALUE"),
        (["--template-arg", "a b=1"], "--template-arg 'a b=1' is none"),
        (["--template-arg", "if=1"], "--template-arg 'if=1' is none"),
        (["--template-arg", "None=1"], "--template-arg 'None=1' is none"),
        (["--template-arg", "messages=[]"], "the chat template is given messages by what a conversation has"),
        (["--template-arg", "add_generation_prompt=false"], "is given add_generation_prompt by what a conversation"),
        (["--template-arg", "wishes=1"], "the chat template does not know wishes"),
    ],
)
def test_names_that_are_none(artifact, capfd, monkeypatch, arguments, said):
    code, out, err = talk(monkeypatch, capfd, artifact, "a\n", *arguments)
    assert (code, out) == (2, "")
    assert said in err


def test_a_model_without_tools_or_thinking_says_so(genai_artifact, tools, capfd, monkeypatch):
    artifact = genai_artifact("gemma3_text")
    code, _, err = talk(monkeypatch, capfd, artifact, "a\n", "--tools", tools)
    assert (code, "the chat template leaves tools out" in err) == (2, True)
    code, _, err = talk(monkeypatch, capfd, artifact, "a\n", "--think")
    assert (code, "the chat template does not know enable_thinking" in err) == (2, True)


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("{", ["is not JSON"]),
        ("[]", ["the list is empty"]),
        ("3", ["[0]: no function with a name"]),
        ('[{"name": ""}, {"type": "function"}]', ["[0]: no function with a name", "[1]: no function with a name"]),
        (
            '[{"name": "f", "parameters": []}, {"name": "g", "description": 1}]',
            ["[0] f: parameters", "[1] g: the desc"],
        ),
        (None, ["no such file"]),
    ],
)
def test_tools_that_are_none(tmp_path, artifact, capfd, monkeypatch, text, problems):
    file = tmp_path / "t.json"
    if text is not None:
        file.write_text(text)
    code, out, err = talk(monkeypatch, capfd, artifact, "a\n", "--tools", file)
    assert (code, out) == (2, "")
    assert [one for one in problems if one.lower() not in err.lower()] == []
    assert str(file) in err


def test_bare_functions_are_tools(tmp_path, artifact, model, capfd, monkeypatch):
    file = tmp_path / "t.json"
    file.write_text(json.dumps(TOOLS[0]["function"]))
    read = model("a")
    assert talk(monkeypatch, capfd, artifact, "a\n", "--tools", file)[0] == 0
    assert "declaration:look" in read[0]
