"""Alpaca as the turns an -it model was trained on: the tokens transformers' own tokenizer gives, with one BOS."""

import json
import shutil

import numpy as np
import pytest
from transformers import AutoTokenizer

from gemma_deploy import paths
from gemma_deploy.calibration import windows
from gemma_deploy.calibration.chat import Chat
from gemma_deploy.calibration.pipeline import Request, dataset_record, make_windows
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.errors import CheckpointError
from gemma_deploy.text import Tokenizer, template_of
from tests.calibration import make
from tests.text.make import write_gguf

BOS, START, END = 2, 106, 107  # of every Gemma 1 and 2, the bundled model too
ENTRIES = [
    {"instruction": "Add the numbers.", "input": "1 and 2", "output": "3"},
    {"instruction": "Say hello.", "input": "", "output": "Hello, <bos> is a token."},
    {"instruction": "Name a colour.", "input": " ", "output": "Blue."},
]
TURNS = [
    ("Add the numbers.\n\n1 and 2", "3"),
    ("Say hello.", "Hello, <bos> is a token."),
    ("Name a colour.", "Blue."),
]


@pytest.fixture(scope="module")
def demo():
    """A checkpoint with Gemma's own chat template."""
    return Checkpoint.open(paths.demo_checkpoint_dir())


@pytest.fixture
def alpaca(tmp_path):
    return make.write_alpaca(tmp_path / "alpaca.json", ENTRIES)


@pytest.fixture
def in_order(monkeypatch):
    """Texts in the file's order, and no window left out."""
    monkeypatch.setattr(windows, "SPREAD", 1)
    monkeypatch.setattr("gemma_deploy.calibration.pipeline.shuffled", lambda texts, seed: texts())


def one_window(checkpoint, file, tokens):
    return make_windows(checkpoint, Request("alpaca", file, 1, 1 + tokens)).ids[0].tolist()


def test_conversations_are_the_tokens_of_transformers(demo, alpaca, in_order):
    tokenizer = AutoTokenizer.from_pretrained(demo.path)
    expected = []
    for user, model in TURNS:
        messages = [{"role": "user", "content": user}, {"role": "assistant", "content": model}]
        ids = tokenizer.apply_chat_template(messages, return_dict=False)
        assert ids[0] == BOS
        expected += [token for token in ids if token != BOS]
    found = one_window(demo, alpaca, len(expected))
    assert found == [BOS, *expected]
    assert found.count(BOS) == 1


def test_turns_are_spelled_as_google_does(demo, alpaca, in_order):
    tokenizer = Tokenizer.of(demo)
    spelled = "".join(
        f"<start_of_turn>user\n{user}<end_of_turn>\n<start_of_turn>model\n{model}<end_of_turn>\n"
        for user, model in TURNS
    )
    expected = [token for token in tokenizer.encode_more(spelled) if token != BOS]
    assert one_window(demo, alpaca, len(expected))[1:] == expected


def test_a_base_model_keeps_alpacas_own_prompt(demo, alpaca, in_order, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(demo.path, base)
    (base / "chat_template.jinja").unlink()
    text = Tokenizer.of(demo).decode_all(one_window(Checkpoint.open(base), alpaca, 60))
    assert text.startswith("<bos>Below is an instruction")
    assert "start_of_turn" not in text


def test_only_alpaca_becomes_turns_and_the_record_says_so(demo, checkpoint, tmp_path):
    request = Request("c4:2,ceval:2,alpaca:2", None, 6, 32)
    said = {one["name"]: one["rendered"] for one in dataset_record(demo, request)["sources"]}
    assert said == {"c4": "text", "ceval": "text", "alpaca": "chat template"}
    assert {one["rendered"] for one in dataset_record(checkpoint, request)["sources"]} == {"text"}


@pytest.mark.parametrize("of_several", [False, True])
def test_a_template_in_the_tokenizers_settings_counts_as_well(demo, alpaca, in_order, tmp_path, of_several):
    other = tmp_path / "other"
    shutil.copytree(demo.path, other)
    template = (other / "chat_template.jinja").read_text()
    (other / "chat_template.jinja").unlink()
    file = other / "tokenizer_config.json"
    several = [{"name": "default", "template": template}, {"name": "tool_use", "template": "x"}]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": several if of_several else template}))
    assert one_window(Checkpoint.open(other), alpaca, 40) == one_window(demo, alpaca, 40)


class AsTransformers:
    """What `cut_windows` asks of a tokenizer, by transformers' own."""

    def __init__(self, path):
        self.whole = AutoTokenizer.from_pretrained(path)

    def encode_batch(self, texts):
        return self.whole(texts, add_special_tokens=False)["input_ids"]

    def render(self, turns):
        return self.whole.apply_chat_template(turns, tokenize=False)


def test_windows_of_every_data_set_are_those_of_transformers(demo, monkeypatch):
    request = Request("c4:4,ceval:4,alpaca:4", None, 12, 64)
    found = make_windows(demo, request)
    theirs = AsTransformers(demo.path)
    chat = Chat(Tokenizer.of(demo).chat)
    monkeypatch.setattr(chat, "render", theirs.render)
    monkeypatch.setattr("gemma_deploy.calibration.pipeline.load_tokenizer_and_chat", lambda *_, **__: (theirs, chat))
    expected = make_windows(demo, request)
    assert np.array_equal(found.ids, expected.ids)
    assert found.texts_used == expected.texts_used


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('no model turns') }}", "refuses a user's and a model's turn: no model turns"),
        ("{% for", "refuses a user's and a model's turn: "),
        ("{{ messages.open('x') }}", "refuses a user's and a model's turn: "),
    ],
)
def test_a_template_that_cannot_be_used_is_named(checkpoint_path, alpaca, template, said):
    (checkpoint_path / "chat_template.jinja").write_text(template)
    with pytest.raises(CheckpointError) as caught:
        one_window(Checkpoint.open(checkpoint_path), alpaca, 8)
    assert said in caught.value.what
    assert caught.value.where == str(checkpoint_path)
    assert caught.value.next_step


def test_damaged_settings_are_named(checkpoint_path):
    (checkpoint_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: is not JSON"):
        template_of(Checkpoint.open(checkpoint_path))


def test_the_template_inside_a_gguf_file_is_the_one(tmp_path, demo, alpaca, in_order):
    template = (demo.path / "chat_template.jinja").read_text()
    path = write_gguf(tmp_path / "m.gguf", "gemma", metadata={"chat_template": template})
    assert template_of(Checkpoint.open(path))
    assert one_window(Checkpoint.open(path), alpaca, 60) == one_window(demo, alpaca, 60)
    bare = write_gguf(tmp_path / "bare.gguf", "gemma")
    assert not template_of(Checkpoint.open(bare))


def test_windows_of_a_mix_on_the_bundled_model(demo):
    """With the bundled samples: turns in the windows of Alpaca alone."""
    ids = make_windows(demo, Request("c4:2,alpaca:2", None, 4, 64)).ids
    turn = Tokenizer.of(demo).id_of("<start_of_turn>")
    assert [bool(np.isin(turn, row)) for row in ids] == [False, True, False, True]
