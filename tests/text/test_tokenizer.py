"""Exactly one BOS, the chat template of the model, and text that never ends inside a character."""

import json
import sys

import pytest

from gemma_deploy.errors import ArtifactError, UsageError
from gemma_deploy.text import TextStream, Tokenizer
from tests.runtime.make import write_tokenizer
from tests.text import make


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir):
    return Tokenizer(tokenizer_dir)


@pytest.mark.parametrize("text", ["the list", "<bos>the list", "<bos><bos>the list"])
def test_exactly_one_bos(tokenizer, text):
    ids = tokenizer.encode(text)
    assert (ids[0], ids.count(tokenizer.bos_id)) == (2, 1)
    assert ids == tokenizer.encode("the list")
    assert tokenizer.decode(ids) == "the list"


def test_one_bos_and_no_end_when_the_tokenizer_adds_its_own(tmp_path):
    from tokenizers.processors import TemplateProcessing

    write_tokenizer(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    tokenizer.backend.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 1)]
    )
    ids = tokenizer.encode("the")
    assert (ids.count(2), ids.count(1), tokenizer.decode(ids)) == (1, 0, "the")


def test_empty_text_is_a_bos(tokenizer):
    assert tokenizer.encode("") == [2]
    assert tokenizer.decode([2]) == ""


def test_one_bos_where_template_and_tokenizer_both_add_one(tmp_path):
    """transformers gives [2, 2, ...] when templated text is tokenized as text."""
    from transformers import AutoTokenizer

    theirs, messages = AutoTokenizer.from_pretrained(make.copy_demo(tmp_path / "t")), [{"role": "user", "content": "x"}]
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert theirs(text)["input_ids"][:3] == [2, 2, 5]
    ours = Tokenizer(tmp_path / "t")
    assert ours.encode_chat(messages) == ours.encode(text) == theirs(text)["input_ids"][1:]


def test_a_bos_inside_the_text_stays(tokenizer):
    assert tokenizer.encode("a<bos>b").count(2) == 2


def test_chat_is_the_template_with_one_bos(tokenizer):
    messages = [
        {"role": "user", "content": " the list "},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "b"},
    ]
    ids = tokenizer.encode_chat(messages)
    expected = (
        "<start_of_turn>user\nthe list<end_of_turn>\n<start_of_turn>model\na<end_of_turn>\n"
        "<start_of_turn>user\nb<end_of_turn>\n<start_of_turn>model\n"
    )
    assert ids == tokenizer.encode(expected)
    assert ids.count(2) == 1
    assert ids.count(4) == 4  # turns are special tokens, not text


def test_chat_equals_transformers(tokenizer_dir, tokenizer):
    from transformers import PreTrainedTokenizerFast

    other = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_dir / "tokenizer.json"),
        bos_token="<bos>",
        chat_template=(tokenizer_dir / "chat_template.jinja").read_text(),
    )
    messages = [{"role": "user", "content": "the {{ list }} €"}]
    expected = other.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.encode_chat(messages) == list(expected)


def test_what_the_template_refuses_is_said(tokenizer, tmp_path):
    with pytest.raises(UsageError, match="the chat template refuses the messages: no system turn"):
        tokenizer.encode_chat([{"role": "system", "content": "x"}])
    write_tokenizer(tmp_path, template="{% for")
    with pytest.raises(UsageError, match="the chat template refuses the messages"):
        Tokenizer(tmp_path).encode_chat([{"role": "user", "content": "x"}])


def test_a_template_cannot_reach_python(tmp_path):
    write_tokenizer(tmp_path, template="{{ messages.__class__.__mro__ }}")
    with pytest.raises(UsageError, match="refuses the messages: access to attribute '__class__'"):
        Tokenizer(tmp_path).encode_chat([{"role": "user", "content": "x"}])


def test_template_in_tokenizer_config_and_no_template(tmp_path):
    write_tokenizer(tmp_path, template=None)
    with pytest.raises(UsageError, match="has no chat template"):
        Tokenizer(tmp_path).encode_chat([{"role": "user", "content": "x"}])
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": "{{ bos_token }}the"}))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.encode_chat([]) == tokenizer.encode("the")


@pytest.mark.parametrize("text", ["the list", "naïve €5", "日本語 テキスト", "👩\u200d🚀 the 🎉", "a  b\n\tc", ""])
def test_pieces_joined_are_the_text_and_no_piece_is_half_a_character(tokenizer, text):
    stream = TextStream(tokenizer)
    ids = tokenizer.encode(text)[1:]
    pieces = [stream.push(token) for token in ids]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join([*pieces, stream.flush()]) == text == tokenizer.decode(ids)


def test_a_character_comes_with_its_last_byte(tokenizer):
    ids = tokenizer.encode("€")[1:]
    stream = TextStream(tokenizer)
    assert len(ids) == 3  # its bytes: the small vocabulary has no euro sign
    assert [stream.push(token) for token in ids] == ["", "", "€"]


def test_flush_leaves_half_a_character_out(tokenizer):
    stream = TextStream(tokenizer)
    ids = tokenizer.encode("the €")[1:-1]
    assert "".join(stream.push(token) for token in ids) + stream.flush() == "the "
    assert stream.flush() == ""


def test_words_start_with_their_space_and_special_tokens_are_silent(tokenizer):
    stream = TextStream(tokenizer)
    words = tokenizer.encode("the list")[1:]
    pieces = [stream.push(token) for token in [*words, 1, 5, *tokenizer.encode(" the")[1:]]]
    assert "".join(pieces) == "the list the"


def test_special_tokens_that_are_asked_for_are_text(tokenizer):
    """In their place, with whole characters around them, and with the spaces of the words beside them."""
    stream = TextStream(tokenizer, {5: "<end_of_turn>"})
    half, words = tokenizer.encode("€")[1:3], tokenizer.encode(" the list")[1:]
    pieces = [stream.push(token) for token in [5, *words, 5, 4, 5, *half, 5, *words]]
    assert "".join(pieces) + stream.flush() == (
        "<end_of_turn> the list<end_of_turn><end_of_turn><end_of_turn> the list"
    )


def test_words_keep_their_space_when_decoding_strips_the_first_one(tmp_path):
    from tokenizers import decoders

    write_tokenizer(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    # as SentencePiece tokenizers that put a space before every text are written
    tokenizer.backend.decoder = decoders.Sequence([tokenizer.backend.decoder, decoders.Strip(" ", 1, 0)])
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokenizer.encode(" the list the")[1:]]
    assert pieces[-1].endswith("e")
    assert "".join([*pieces, stream.flush()]) == "the list the"
    marked = TextStream(tokenizer, {5: "|"})
    words = tokenizer.encode(" the list")[1:]
    assert "".join(map(marked.push, [*words, 5, *words])) == "the list| the list"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("the \udcff list", r"character 5 is half a surrogate pair (U+DCFF, the byte 0xFF)"),
        ("\ud83d", r"character 1 is half a surrogate pair (U+D83D)"),
        ("\udc00a", r"character 1 is half a surrogate pair (U+DC00)"),
    ],
)
def test_half_a_character_is_no_text(tokenizer, text, said):
    for encode in (tokenizer.encode, tokenizer.encode_more):
        with pytest.raises(UsageError) as caught:
            encode(text)
        assert caught.value.what == f"the text is not Unicode: {said}"
        assert "UTF-8" in caught.value.next_step
    with pytest.raises(UsageError, match="the text is not Unicode"):
        tokenizer.encode_chat([{"role": "user", "content": text}])


def test_half_characters_of_data_become_the_sign_for_them(tokenizer):
    texts = ["the list", "the \ud83d list", "\udc9d", "\ud83d\ude00", "naïve \udfff\ud83d\ud83d\ude00", ""]
    clean = ["the list", "the \ufffd list", "\ufffd", "\U0001f600", "naïve \ufffd\ufffd\U0001f600", ""]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode_more(text) for text in clean]


@pytest.mark.parametrize("encode", ["encode", "encode_more", "encode_chat", "encode_batch"])
def test_a_token_outside_the_table_is_refused_with_its_name_and_the_limit(tmp_path, encode):
    """<image_soft_token> of a Gemma 3 that has no tower for images."""
    directory = make.copy_demo(tmp_path / "t", additional_special_tokens=["<image_soft_token>"])
    make.edit(directory / "config.json", {"vocab_size": 4096})
    tokenizer = Tokenizer(directory)
    given = {
        "encode_chat": [{"role": "user", "content": "the <image_soft_token> value"}],
        "encode_batch": ["the list", "the <image_soft_token> value"],
    }
    with pytest.raises(UsageError) as caught:
        getattr(tokenizer, encode)(given.get(encode, "the <image_soft_token> value"))
    assert caught.value.what == (
        "the text spells '<image_soft_token>', which is token 4096, but the model has 4096 tokens"
    )
    assert tokenizer.encode("the list") == Tokenizer(make.DEMO).encode("the list")
    make.edit(directory / "config.json", {"vocab_size": 4097})
    assert 4096 in Tokenizer(directory).encode("the <image_soft_token> value")


def test_missing_damaged_or_foreign_tokenizers_are_named(tmp_path):
    with pytest.raises(ArtifactError, match=r"tokenizer.json: the tokenizer is missing"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"tokenizer.json: is not a tokenizer"):
        Tokenizer(tmp_path)
    write_tokenizer(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"bos_token": "<s>"}')
    with pytest.raises(ArtifactError, match="has no token '<s>' to begin a text with"):
        Tokenizer(tmp_path)
    config.write_text("{")
    with pytest.raises(ArtifactError, match=r"tokenizer_config.json: is not JSON"):
        Tokenizer(tmp_path)
    config.unlink()
    assert Tokenizer(tmp_path).bos_id == 2


def test_reading_a_tokenizer_needs_neither_torch_nor_transformers(tokenizer_dir):
    import subprocess

    code = (
        "import sys\nimport gemma_deploy.backends.tvm_vacc.runner\nfrom gemma_deploy.text import Tokenizer\n"
        f"Tokenizer({str(tokenizer_dir)!r}).encode_chat([{{'role': 'user', 'content': 'x'}}])\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
