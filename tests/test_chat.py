"""`gemma-deploy chat`: what a message adds to the tokens so far, on both runtimes, and how a conversation ends."""

import io

import pytest

from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.backends.onnxruntime.genai import GenaiModel, GenaiSession
from gemma_deploy.backends.tvm_vacc.generate import StaticSession
from gemma_deploy.cli import main
from gemma_deploy.errors import UsageError
from gemma_deploy.runtime import Tokenizer
from gemma_deploy.runtime.chat import Conversation
from gemma_deploy.runtime.generate import GenerationStats
from tests.runtime.make import TEMPLATE, compile_tiny, write_tokenizer

FOLDS = TEMPLATE.replace("{{ raise_exception('no system turn') }}", "")  # writes a turn of that role
DROPS = TEMPLATE.replace("{% for message in messages %}", "{% for message in messages if message['role'] == 'user' %}")


@pytest.fixture
def tokenizer(tmp_path):
    return Tokenizer(write_tokenizer(tmp_path / "tokenizer"))


@pytest.fixture(scope="module")
def artifact(genai_artifact):
    return genai_artifact("gemma3_text")


def test_turns_add_up_to_what_the_template_makes_of_all_messages(tokenizer):
    conversation = Conversation(tokenizer)
    messages, ids = [], []
    for text, reply in (("the list", " user  "), ("a", "b"), ("c", "")):
        messages.append({"role": "user", "content": text})
        ids += conversation.ask(text)
        assert conversation.ask(text) == conversation.ask(text)  # asking changes nothing
        assert tokenizer.decode(ids) == tokenizer.decode(tokenizer.encode_chat(messages))
        assert ids.count(tokenizer.bos_id) == 1
        conversation.answered(text, reply)
        messages.append({"role": "assistant", "content": reply})
        ids += tokenizer.encode_more(reply.strip())
    assert ids == tokenizer.encode_chat([*messages, {"role": "user", "content": "x"}])[: len(ids)]
    conversation.reset()
    assert conversation.ask("the list") == tokenizer.encode_chat(messages[:1])


def test_the_system_message_stays_where_the_template_has_a_place_for_it(tmp_path):
    folds, drops, refuses = (
        Tokenizer(write_tokenizer(tmp_path / name, template=template))
        for name, template in (("folds", FOLDS), ("drops", DROPS), ("refuses", TEMPLATE))
    )
    conversation = Conversation(folds, "be brief")
    system, user = ({"role": role, "content": text} for role, text in (("system", "be brief"), ("user", "a")))
    assert conversation.ask("a") == folds.encode_chat([system, user])
    conversation.answered("a", "b")
    assert conversation.ask("a") == folds.encode_more("<end_of_turn>\n<start_of_turn>user\na<end_of_turn>\n" + ANSWER)
    conversation.reset()
    assert conversation.ask("a") == folds.encode_chat([system, user])
    with pytest.raises(UsageError, match="leaves a system message out") as caught:
        Conversation(drops, "be brief")
    assert "leave --system out" in str(caught.value)
    with pytest.raises(UsageError, match=r"refuses the messages: no system turn\n  next: leave --system out"):
        Conversation(refuses, "be brief")
    silent = Conversation(drops)
    silent.answered("a", "b")
    with pytest.raises(UsageError, match="leaves replies out"):
        silent.ask("c")


ANSWER = "<start_of_turn>model\n"


class Recorded:
    """A runner that says one token for ever and keeps what it was given."""

    path, manifest, load_seconds, batch, prefill_length, context_length, remaining = "p", None, 0.0, 1, 64, 99, 99

    def __init__(self, token, vocab_size):
        from types import SimpleNamespace

        import numpy as np

        self.contract = SimpleNamespace(vocab_size=vocab_size)

        self.prompts, self.logits = [], np.eye(vocab_size, dtype=np.float32)[[token]]

    def reset(self):
        pass

    def prefill(self, prompts):
        self.prompts += prompts
        return self.logits

    def step(self, tokens):
        return self.logits


def test_a_static_session_reads_everything_again(tokenizer):
    letter = tokenizer.encode_more("a")[0]
    runner = Recorded(letter, tokenizer.vocab_size)
    session = StaticSession(runner, tokenizer)
    assert "".join(session.reply([2, 7], max_new_tokens=2)) == "aa"
    pieces = session.reply([8])
    assert next(pieces) == "a"
    pieces.close()  # interrupted after one token
    list(session.reply([9], max_new_tokens=1))
    assert runner.prompts == [[2, 7], [2, 7, letter, letter, 8], [2, 7, letter, letter, 8, letter, 9]]
    with pytest.raises(UsageError, match=r"the prompt has 66 tokens"):
        session.reply([5] * 58)
    assert len(session.ids) == 8
    session.reset()
    list(session.reply([2], max_new_tokens=1))
    assert runner.prompts[-1] == [2]


class Terminal(io.StringIO):
    """Typed by somebody."""

    def isatty(self):
        return True


def talk(monkeypatch, capfd, artifact, lines, *arguments):
    """Lines typed into `gemma-deploy chat` -> exit code, standard output, standard error."""
    monkeypatch.setattr("sys.stdin", lines if isinstance(lines, Terminal) else io.StringIO(lines))
    code = main(["chat", str(artifact), "--threads", "1", *map(str, arguments)])
    return code, *capfd.readouterr()


def test_replies_follow_from_the_whole_conversation(artifact, capfd, monkeypatch):
    tokenizer = Tokenizer(artifact)
    session, conversation = GenaiSession(GenaiModel(artifact, 1), tokenizer), Conversation(tokenizer)

    def reply(text):
        said = "".join(session.reply(conversation.ask(text), max_new_tokens=5))
        conversation.answered(text, said)
        return said + "\n"

    first, second = reply("a"), reply("b")
    session.reset()
    conversation.reset()
    alone = reply("b")
    assert alone != second
    code, out, err = talk(monkeypatch, capfd, artifact, "a\n\nb\n/reset\nb\n", "-n", 5, "--stats")
    assert (code, out) == (0, first + second + alone)
    assert err.count("5 tokens at") == 3
    assert err.count("forgotten") == 1
    assert talk(monkeypatch, capfd, artifact, "a\n/exit\nb\n", "-n", 5) == (0, first, "")


def test_static_artifacts_talk_too(demo_artifact, capfd, monkeypatch):
    tokenizer = Tokenizer(demo_artifact)
    code, out, err = talk(monkeypatch, capfd, demo_artifact, "Return the\nReturn the\n", "-n", 4, "--stats")
    assert (code, out.count("\n") >= 2) == (0, True)
    counts = [int(line.split(" prompt tokens")[0].split()[-1]) for line in err.splitlines()]
    assert counts[0] == len(tokenizer.encode_chat([{"role": "user", "content": "Return the"}]))
    assert counts[1] >= 2 * counts[0]  # read again, with the reply between


def test_ctrl_c_stops_a_reply_and_keeps_what_was_said(artifact, capfd, monkeypatch):
    asked = []
    reply = GenaiSession.reply

    def interrupted(session, ids, *, max_new_tokens, shown, stats):
        asked.append(ids)
        pieces = reply(session, ids, max_new_tokens=max_new_tokens, shown=shown, stats=stats)
        yield from (next(pieces) for _ in range(1))
        if len(asked) == 1:
            raise KeyboardInterrupt
        yield from pieces

    monkeypatch.setattr(GenaiSession, "reply", interrupted)
    code, out, err = talk(monkeypatch, capfd, artifact, "a\nb\n", "-n", 20, "--stats")
    assert (code, out.count("\n") >= 2, len(asked)) == (0, True, 2)
    assert err.splitlines()[0].endswith("; interrupted")
    assert asked[1] == Tokenizer(artifact).encode_more("<end_of_turn>\n<start_of_turn>user\nb<end_of_turn>\n" + ANSWER)


def test_ctrl_c_twice_while_typing_leaves(artifact, capfd, monkeypatch):
    """The first may have been meant for a reply that had ended a moment before."""

    def typed(events):
        def read(prompt):
            event = next(events)
            if event is KeyboardInterrupt:
                raise KeyboardInterrupt
            return event

        monkeypatch.setattr("builtins.input", read)
        return talk(monkeypatch, capfd, artifact, Terminal(""), "-n", 1)

    code, out, err = typed(iter([KeyboardInterrupt, KeyboardInterrupt]))
    assert (code, out) == (130, "")
    assert err.endswith("\nCtrl-C once more leaves\n\n")
    code, out, _ = typed(iter([KeyboardInterrupt, "a", KeyboardInterrupt, "/exit"]))
    assert (code, out.count("\n")) == (0, 1)


def test_it_greets_who_sits_there_and_nobody_else(artifact, capfd, monkeypatch):
    _, _, err = talk(monkeypatch, capfd, artifact, Terminal("/exit\n"))
    manifest = Artifact.open(artifact).manifest
    assert err.startswith(f"{manifest.name} ({manifest.model.model_type}, {manifest.model.num_hidden_layers} layers, ")
    assert "a conversation has at most 128 tokens" in err
    assert "/help lists the commands, /reset forgets, /exit leaves" in err
    assert talk(monkeypatch, capfd, artifact, "/exit\n") == (0, "", "")


def test_help_lists_the_commands_and_goes_to_no_model(artifact, capfd, monkeypatch):
    code, out, err = talk(monkeypatch, capfd, artifact, "/help\n", "-n", 1)
    assert (code, out) == (0, "")
    assert [line.split()[0] for line in err.splitlines()] == [
        "/help",
        "/adapter",
        "/result",
        "/reset",
        "/exit",
        "Ctrl-C",
        "//TEXT",
    ]


def test_what_looks_like_a_command_and_is_none_is_refused(artifact, capfd, monkeypatch):
    code, out, err = talk(monkeypatch, capfd, artifact, Terminal("/hlep\na\n"), "-n", 1)
    assert (code, out.count("> "), out.count("\n")) == (0, 3, 1)  # told, and gone on with
    assert "error: /hlep is no command; did you mean /help?" in err
    assert talk(monkeypatch, capfd, artifact, "/quit\n")[0] == 2  # nobody is there


@pytest.mark.parametrize(("line", "sent"), [("//help", "/help"), ("/usr/bin is a folder", "/usr/bin is a folder")])
def test_messages_may_start_with_a_slash(artifact, capfd, monkeypatch, line, sent):
    asked = []
    turn = Conversation.turn
    monkeypatch.setattr(Conversation, "turn", lambda self, text: asked.append(text) or turn(self, text))
    assert talk(monkeypatch, capfd, artifact, f"{line}\n", "-n", 1)[0] == 0
    assert asked == [sent]


@pytest.mark.parametrize("command", [("chat",), ("run", "-p", "-")])
def test_standard_input_without_end_is_not_read_to_it(artifact, capfd, monkeypatch, command):
    monkeypatch.setattr("gemma_deploy.generation.MOST_CHARACTERS", 100)
    name, *options = command
    for text, code in (("x" * 101, 2), ("the list\n" + "\n" * 91, 0)):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        assert main([name, str(artifact), "--threads", "1", "-n", "1", *options]) == code
        said = capfd.readouterr().err
        assert ("standard input: the prompt has more than 100 characters" in said) == (code == 2)


def test_a_full_context_is_explained_and_a_person_may_go_on(artifact, capfd, monkeypatch):
    long = "x" * 200
    code, out, err = talk(monkeypatch, capfd, artifact, f"{long}\na\n", "-n", 2)
    assert (code, out, "this artifact's context is 128 tokens" in err) == (2, "", True)
    code, out, err = talk(monkeypatch, capfd, artifact, Terminal(f"{long}\na\n"), "-n", 2)
    assert (code, out.count("> "), out.count("\n")) == (0, 3, 1)
    assert "  or: /reset forgets the conversation" in err


@pytest.mark.parametrize("options", [[], ["--system", "be brief"]])
def test_without_a_template_there_is_no_chat(tmp_path, capfd, monkeypatch, options):
    base = compile_tiny(tmp_path, "gemma", {"type": "onnxruntime", "dtype": "fp32"}, template=None)
    code, out, err = talk(monkeypatch, capfd, base, "a\n", *options)
    assert (code, out) == (2, "")
    assert "this model has no chat template" in err
    assert "next: use `gemma-deploy run ARTIFACT -p TEXT`" in err


def test_a_template_without_system_turns_refuses_them(artifact, capfd, monkeypatch):
    code, out, err = talk(monkeypatch, capfd, artifact, "a\n", "--system", "be brief")
    assert (code, out) == (2, "")
    assert "the chat template refuses the messages: no system turn" in err


def test_statistics_of_an_interrupted_generation(artifact):
    stats = GenerationStats()
    pieces = GenaiSession(GenaiModel(artifact, 1), Tokenizer(artifact)).reply([2, 5], stats=stats)
    next(pieces)
    pieces.close()
    assert stats.finish is None
