"""What ends a text: every place that declares it, and the token the chat template puts behind a reply."""

import json

import pytest

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.errors import CheckpointError
from gemma_deploy.text import Tokenizer, check_text, end_of_turn, stop_tokens, with_stops
from tests.text import make

START, END = 5, 6  # <start_of_turn> and <end_of_turn> of the bundled vocabulary
TURN = "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}"


def checkpoint(directory, *, template=None, config=None, generation=None, **settings):
    """The bundled checkpoint with its stop tokens declared in these places alone."""
    make.copy_demo(directory, weights=True, **({"eos_token": None} | settings))
    said = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(said | {"eos_token_id": config}))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    if template is None:
        (directory / "chat_template.jinja").unlink()
    else:
        (directory / "chat_template.jinja").write_text(template)
    return Checkpoint.open(directory)


def turns(end):
    return f"{{{{ bos_token }}}}{{% for m in messages %}}{TURN}{end}{{% endfor %}}"


@pytest.mark.parametrize(
    ("declared", "stops"),
    [
        ({"config": 1}, {1}),
        ({"config": [1, 7]}, {1, 7}),
        ({"generation": 6}, {6}),
        ({"config": 1, "generation": [1, 6, 106]}, {1, 6, 106}),
        ({"eos_token": "<end_of_turn>"}, {6}),
        ({"config": 1, "eos_token": "<mask>"}, {1, 4}),
        ({"template": turns("<end_of_turn>\n")}, {6}),
        ({"template": make.GEMMA_1, "config": 1}, {1, 6}),
        ({"template": turns("<eos>\n"), "config": 7, "generation": 8, "eos_token": "<pad>"}, {0, 1, 7, 8}),
        ({"generation": [4096, -1, "x", None, 6]}, {6}),
        ({"eos_token": "<|own|>", "config": 1}, {1}),
    ],
)
def test_every_place_counts(tmp_path, declared, stops):
    opened = checkpoint(tmp_path / "c", **declared)
    # GemmaTokenizer calls <eos> its end where the settings say nothing; the files here say that there is none
    settings = json.loads((tmp_path / "c" / make.SETTINGS).read_text()) | {"eos_token": declared.get("eos_token")}
    (tmp_path / "c" / make.SETTINGS).write_text(json.dumps(settings))
    assert set(check_text(opened).stop_ids) == stops
    assert with_stops(opened, check_text(opened)).config.eos_token_ids == check_text(opened).stop_ids


@pytest.mark.parametrize(
    ("template", "token"),
    [
        (make.GEMMA_1, END),
        (make.GEMMA_3, END),
        (make.FUNCTIONS, END),
        (make.TRAINING, END),
        (turns("<end_of_turn>\n"), END),
        (turns("<end_of_turn>"), END),
        (turns("\n\n <eos>"), 1),
        (turns(" [end] <eos>\n"), 1),
        (turns("<eos><end_of_turn>"), 1),
        (turns("\n"), None),
        (turns(""), None),
        ("{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", None),
        ("{% for m in messages %}{{ bos_token }}{{ m.content }}{% endfor %}", 2),
        (
            "{% if messages | length > 2 %}{{ raise_exception('one turn alone') }}{% endif %}" + turns("<end_of_turn>"),
            END,
        ),
    ],
)
def test_the_token_behind_a_reply(tmp_path, template, token):
    directory = make.copy_demo(tmp_path / "t")
    (directory / "chat_template.jinja").write_text(template)
    assert end_of_turn(Tokenizer(directory)).token == token


def test_line_breaks_that_are_tokens_of_their_own_end_nothing(tmp_path):
    """As in every Gemma: runs of line breaks were added to the vocabulary."""
    directory = make.copy_demo(tmp_path / "t", extra_special_tokens=["\n\n"], additional_special_tokens=None)
    make.edit(directory / "config.json", {"vocab_size": 4097})
    (directory / "chat_template.jinja").write_text(turns("\n\n<end_of_turn>"))
    tokenizer = Tokenizer(directory)
    assert tokenizer.id_of("\n\n") in tokenizer.added_ids
    assert end_of_turn(tokenizer).token == END


def test_the_end_of_a_turn_of_gemma_4(tmp_path):
    directory = make.copy_demo(
        tmp_path / "t", extra_special_tokens=["<|turn>", "<turn|>"], additional_special_tokens=None
    )
    (directory / "chat_template.jinja").write_text(make.GEMMA_4)
    assert stop_tokens(Tokenizer(directory), (1,)).notes[0].startswith("chat will not work: the text spells '<|turn>'")
    make.edit(directory / "config.json", {"vocab_size": 4098})
    tokenizer = Tokenizer(directory)
    assert end_of_turn(tokenizer).token == tokenizer.id_of("<turn|>") == 4097


def test_what_the_files_do_not_say_is_told(tmp_path):
    found = check_text(checkpoint(tmp_path / "a", template=turns("<end_of_turn>"), config=1))
    assert found.stop_ids == (1, END)
    assert found.notes == (
        "<end_of_turn> (token 6) ends a reply in the chat template: taken as a stop token, though no file says so",
    )
    declared = check_text(checkpoint(tmp_path / "b", template=turns("<end_of_turn>"), config=1, generation=[1, END]))
    assert (declared.stop_ids, declared.notes) == ((1, END), ())


def test_a_turn_that_nothing_ends_is_told(tmp_path):
    (note,) = check_text(checkpoint(tmp_path / "a", template=turns("\n\n"), config=1)).notes
    assert note.startswith("the chat template puts '\\n\\n<start_of_turn>user\\n' behind a reply, which is text alone")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for", "chat will not work: the chat template refuses the messages: line 1: "),
        ("{{ 1 / 0 }}", "chat will not work: the chat template refuses the messages: ZeroDivisionError"),
        ("{{ 'x' * 10 ** 9 }}", "chat will not work: the chat template refuses the messages: it makes a value of more"),
        ("{{ bos_token }}hello", "chat will not work: the chat template leaves replies out"),
    ],
)
def test_a_template_that_cannot_be_used_is_told(tmp_path, template, said):
    found = check_text(checkpoint(tmp_path / "a", template=template, config=1))
    assert found.stop_ids == (1,)
    assert found.notes[0].startswith(said)


def test_a_template_that_is_no_text_is_refused(tmp_path):
    opened = checkpoint(tmp_path / "a", template="x")
    (tmp_path / "a" / "chat_template.jinja").write_bytes("{# größe #}".encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"chat_template.jinja: is not UTF-8 text \(byte 5\)"):
        check_text(opened)


def test_a_damaged_tokenizer_is_refused(tmp_path):
    opened = checkpoint(tmp_path / "a")
    (tmp_path / "a" / make.TOKENIZER).write_text("{}")
    with pytest.raises(CheckpointError, match="is not a tokenizer"):
        check_text(opened)


def test_a_checkpoint_without_a_tokenizer_has_what_its_config_declares(tmp_path):
    opened = checkpoint(tmp_path / "a", config=[1, 7])
    (tmp_path / "a" / make.TOKENIZER).unlink()
    assert (check_text(opened).stop_ids, check_text(opened).notes) == ((1, 7), ())


@pytest.mark.parametrize(
    ("keys", "stops"),
    [
        ({}, (1,)),
        ({"ggml.eot_token_id": END}, (1, END)),
        ({"ggml.eot_token_id": END, "ggml.eom_token_id": 7}, (1, END, 7)),
        ({"ggml.eos_token_id": END, "ggml.eot_token_id": END}, (END,)),
        ({"ggml.eos_token_id": None, "ggml.eot_token_id": END}, (END, 1)),  # 1: the tokenizer's own <eos>
        ({"chat_template": make.GEMMA_1}, (1, END)),
    ],
)
def test_the_keys_of_a_gguf_file(tmp_path, keys, stops):
    opened = Checkpoint.open(make.write_gguf(tmp_path / "m.gguf", "gemma2", metadata=keys))
    assert check_text(opened).stop_ids == stops
    if "chat_template" not in keys and stops[-1] != 1:
        assert opened.config.eos_token_ids == stops


def test_a_damaged_vocabulary_inside_a_gguf_file_is_a_note(tmp_path):
    """Its weights are good for whoever brings the tokens."""
    opened = Checkpoint.open(make.write_gguf(tmp_path / "m.gguf", "gemma2", metadata={"ggml.model": "gpt2"}))
    found = check_text(opened)
    assert found.stop_ids == (1,)
    assert found.notes == ("the tokenizer inside cannot be used: tokenizer.ggml.model is 'gpt2'",)


def test_a_tokenizer_says_it_without_a_checkpoint(tmp_path):
    directory = make.copy_demo(tmp_path / "t")
    assert stop_tokens(Tokenizer(directory), ()).ids == (1, END)
