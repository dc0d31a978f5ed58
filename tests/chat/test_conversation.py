"""Conversations with thinking and tool calls: what the model reads is what the chat template makes of all messages."""

import numpy as np
import pytest

from gemma_deploy.backends.tvm_vacc.generate import StaticSession
from gemma_deploy.chat import FUNCTION_GEMMA, GEMMA4, Text, Thinking, ToolCall, joined, parse
from gemma_deploy.engine import open_engine
from gemma_deploy.errors import UsageError
from gemma_deploy.runtime.chat import Conversation
from gemma_deploy.runtime.generate import GenerationStats
from gemma_deploy.text import Tokenizer
from tests.chat import reference
from tests.runtime.make import TEMPLATE, write_tokenizer
from tests.text import make

MORE = (
    "<|turn>",
    "<turn|>",
    "<|think|>",
    "<|tool>",
    "<tool|>",
    *GEMMA4.markers,
    "<|tool_response>",
    "<tool_response|>",
)
TOOLS = [{"type": "function", "function": {"name": "look", "description": "Looks", "parameters": {"type": "object"}}}]
CALL = '<|tool_call>call:look{at:<|"|>it<|"|>}<tool_call|>'


@pytest.fixture
def tokenizer(tmp_path):
    return Tokenizer(write_tokenizer(tmp_path, template=reference.published("gemma4_v5"), more=MORE))


class Model:
    """Keeps what it was given to read, as a session does, and says what it is told to."""

    def __init__(self, tokenizer, conversation):
        self.tokenizer, self.conversation, self.ids, self.read = tokenizer, conversation, [], []

    def say(self, turn, said):
        if turn.again:
            self.ids = []
        self.read.append(len(turn.ids))
        self.ids += turn.ids
        assert self.tokenizer.decode_all(self.ids) == turn.text
        events = list(parse(GEMMA4, [said], turn.text))
        self.conversation.replied(turn, said, events)
        self.ids += self.tokenizer.encode_more(said)
        return events


def test_thinking_is_forgotten_when_the_next_message_comes(tokenizer):
    conversation = Conversation(tokenizer, names={"enable_thinking": True})
    model = Model(tokenizer, conversation)
    events = model.say(conversation.turn("the list"), "<|channel>thought\nhm\n<channel|>yes")
    assert events == [Thinking("hm"), Text("yes")]
    turn = conversation.turn("a")
    user, reply = {"role": "user", "content": "the list"}, {"role": "assistant", "content": "yes"}
    messages = [user, reply, {"role": "user", "content": "a"}]
    assert turn.text == tokenizer.render_chat(messages, names={"enable_thinking": True})
    assert "hm" not in turn.text
    assert (turn.again, turn.ids) == (True, tokenizer.encode(turn.text))


def test_a_reply_of_text_is_gone_on_with(tokenizer):
    conversation = Conversation(tokenizer)
    model = Model(tokenizer, conversation)
    model.say(conversation.turn("the list"), "yes")
    turn = conversation.turn("a")
    assert not turn.again
    assert tokenizer.decode_all(turn.ids) == "<turn|>\n<|turn>user\na<turn|>\n<|turn>model\n"
    model.say(turn, "no")  # compares all that it has read


def test_results_go_where_the_template_has_them_and_the_model_goes_on(tokenizer):
    conversation = Conversation(tokenizer, tools=TOOLS, names={"enable_thinking": True})
    model = Model(tokenizer, conversation)
    said = f"<|channel>thought\nhm\n<channel|>{CALL}{CALL}"
    model.say(conversation.turn("the list"), said)
    assert conversation.waiting == ["look", "look"]
    with pytest.raises(UsageError, match=r"the model waits for 2 result\(s\) of its tool calls: look, look"):
        conversation.turn("a")
    with pytest.raises(UsageError, match=r"there are 1 result\(s\) for 2 tool call\(s\)"):
        conversation.results(["1"])
    turn = conversation.results(["one", "two"])
    answers = "".join(
        f'<|tool_response>response:look{{value:<|"|>{one}<|"|>}}<tool_response|>' for one in ("one", "two")
    )
    assert not turn.again  # the thinking of this turn stays
    assert tokenizer.decode_all(turn.ids) == f"{answers}<|channel>thought\n"
    assert model.say(turn, "so\n<channel|>done") == [Thinking("so"), Text("done")]  # the template began the thinking
    assert conversation.waiting == []
    turn = conversation.turn("a")
    assert turn.again
    assert "hm" not in turn.text
    assert turn.text.endswith(f"{CALL}{CALL}{answers}done<turn|>\n<|turn>user\na<turn|>\n<|turn>model\n")


def test_thinking_before_a_call_is_forgotten_too(tokenizer):
    """The reply to the results is text, but the template leaves out what was thought before the call."""
    conversation = Conversation(tokenizer, tools=TOOLS)
    model = Model(tokenizer, conversation)
    model.say(conversation.turn("the list"), f"<|channel>thought\nhm\n<channel|>{CALL}")
    turn = conversation.results(["one"])
    assert not turn.again
    model.say(turn, "done")
    turn = conversation.turn("a")
    assert turn.again
    assert "hm" not in turn.text


def test_a_reply_is_gone_on_with_whatever_white_space_it_has(tokenizer):
    """The template trims it; the model has said it."""
    conversation = Conversation(tokenizer)
    for _ in range(3):
        turn = conversation.turn("a")
        conversation.replied(turn, " yes \n", [Text(" yes \n")])
    assert not turn.again
    assert tokenizer.decode_all(turn.ids) == "<turn|>\n<|turn>user\na<turn|>\n<|turn>model\n"


def test_without_calls_there_are_no_results(tokenizer):
    conversation = Conversation(tokenizer)
    model = Model(tokenizer, conversation)
    for _ in range(2):
        with pytest.raises(UsageError, match=r"there are 1 result\(s\) for 0 tool call\(s\) of the last reply"):
            conversation.results(["1"])
        model.say(conversation.turn("a"), "b")


def test_function_gemma_gets_its_results_too(tmp_path):
    tokenizer = Tokenizer(write_tokenizer(tmp_path, template=make.FUNCTIONS, more=FUNCTION_GEMMA.markers))
    conversation = Conversation(tokenizer, tools=TOOLS)
    turn = conversation.turn("the list")
    said = "<start_function_call>call:look{at:<escape>it<escape>}<end_function_call>"
    conversation.replied(turn, said, list(parse(FUNCTION_GEMMA, said)))
    turn = conversation.results(["one"])
    assert turn.text.replace("\n", "").endswith(
        f"{said}<start_function_response>response:look<escape>one<escape><end_function_response>"
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tools": TOOLS}, "the chat template leaves tools out"),
        ({"names": {"enable_thinking": True}}, "the chat template does not know enable_thinking"),
        ({"names": {"a": 1, "b": 2, "content": 3}}, "the chat template does not know a, b"),
    ],
)
def test_what_the_template_has_no_place_for_is_refused(tmp_path, options, said):
    with pytest.raises(UsageError, match=said):
        Conversation(Tokenizer(write_tokenizer(tmp_path, template=TEMPLATE)), **options)


class Scripted:
    """A runner that says given tokens, then the end of its turn for ever."""

    path, manifest, load_seconds, batch, prefill_length, context_length = "p", None, 0.0, 1, 900, 999

    def __init__(self, tokens, vocab_size):
        from types import SimpleNamespace

        self.contract = SimpleNamespace(vocab_size=vocab_size)
        self.tokens, self.prompts, self.eye, self.remaining = (
            list(tokens),
            [],
            np.eye(vocab_size, dtype=np.float32),
            900,
        )

    def reset(self):
        pass

    def prefill(self, prompts):
        self.prompts += prompts
        return self.step(None)

    def step(self, _):
        return self.eye[[self.tokens.pop(0)]]


def test_an_engine_answers_messages_with_events(genai_artifact, tokenizer, monkeypatch):
    """Prompt from the template, special tokens kept for the parser, the end of the turn and other ones left out."""
    engine = open_engine(genai_artifact("gemma3_text"))
    said = f"<|channel>thought\nthe list €\n<channel|>yes<pad> {CALL}"
    end = tokenizer.id_of("<|tool_response>")
    runner = Scripted([*tokenizer.encode_more(said), end], tokenizer.vocab_size)
    monkeypatch.setattr(type(engine), "tokenizer", tokenizer)
    monkeypatch.setattr(type(engine), "session", lambda *_, **__: StaticSession(runner, tokenizer, stop_ids=[end]))
    monkeypatch.setattr(type(engine), "chat_format", GEMMA4)
    messages, stats = [{"role": "user", "content": "the list"}], GenerationStats()
    events = list(engine.chat(messages, tools=TOOLS, names={"enable_thinking": True}, max_new_tokens=200, stats=stats))
    assert len(events) > 5  # as they come
    assert "".join(one.text for one in events if isinstance(one, Thinking)) == "the list €"
    assert "".join(one.text for one in events if isinstance(one, Text)) == "yes "
    assert events[-1] == ToolCall("look", {"at": "it"})
    prompt = tokenizer.render_chat(messages, tools=TOOLS, names={"enable_thinking": True})
    assert runner.prompts == [tokenizer.encode(prompt)]
    assert "<|think|>" in prompt
    assert "declaration:look" in prompt
    assert (stats.finish, stats.prompt_tokens) == ("stop", len(runner.prompts[0]))
    calls = [{"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"at": "it"}'}}]
    messages += [{"role": "assistant", "tool_calls": calls}, {"role": "tool", "tool_call_id": "1", "content": "one"}]
    runner.tokens = [*tokenizer.encode_more("so<channel|>done"), end]
    events = engine.chat(messages, names={"enable_thinking": True}, max_new_tokens=200)
    assert joined(events) == [Thinking("so"), Text("done")]  # the template began the thinking
    assert tokenizer.decode_all(runner.prompts[-1]).endswith("<tool_response|><|channel>thought\n")
    with pytest.raises(UsageError, match="no JSON object"):  # at once
        engine.chat([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "["}}]}])
