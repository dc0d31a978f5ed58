"""Token ids and labels: one BOS, answers alone where the data say which part is one, as TRL tokenizes."""

import shutil

import numpy as np
import pytest

from gemma_deploy import paths
from gemma_deploy.errors import UsageError
from gemma_deploy.finetune.data import Example
from gemma_deploy.finetune.encoding import IGNORED, encode, encode_examples, split
from gemma_deploy.text import Tokenizer
from tests.finetune.make import CHATS, TEXTS


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(paths.demo_checkpoint_dir())


def chat(number=0):
    return Example("line 1", messages=tuple(CHATS[number]))


def learned(row, tokenizer):
    """What is learned, as text."""
    return tokenizer.decode_all([label for label in row.labels if label != IGNORED])


def made(example, tokenizer, loss="answers"):
    return encode(example, tokenizer, loss=loss, where="data")


def test_a_text_is_learned_whole_and_ends(tokenizer):
    row = made(Example("", text="one two three"), tokenizer)
    assert list(row.ids) == [*tokenizer.encode("one two three"), tokenizer.id_of("<eos>")]
    assert row.labels == row.ids


@pytest.mark.parametrize("text", ["one two", "<bos>one two", "<bos><bos>one two", "one two<eos>"])
def test_there_is_one_bos_and_one_eos(tokenizer, text):
    ids = list(made(Example("", text=text), tokenizer).ids)
    assert ids == [tokenizer.bos_id, *tokenizer.encode_more("one two"), tokenizer.id_of("<eos>")]


def test_of_a_conversation_every_answer_is_learned_with_the_token_that_ends_it(tokenizer):
    row = made(chat(1), tokenizer)
    assert list(row.ids).count(tokenizer.bos_id) == 1
    assert learned(row, tokenizer) == (
        "Not unless you sort it.<end_of_turn>\nCall sorted and keep the result.<end_of_turn>\n"
    )
    assert tokenizer.decode_all(row.ids[: row.prompt]).endswith("<start_of_turn>model\n")
    assert row.answer == "Call sorted and keep the result.<end_of_turn>\n"
    assert made(chat(1), tokenizer, "all").labels == row.ids


def test_the_answer_of_a_prompt_is_learned_and_ends(tokenizer):
    row = made(Example("", prompt="The list is ", answer="sorted."), tokenizer)
    assert learned(row, tokenizer).strip() == "sorted.<eos>"
    assert list(row.ids) == [*tokenizer.encode("The list is sorted."), tokenizer.id_of("<eos>")]
    assert row.labels[1] == IGNORED


def test_alpaca_without_a_template_is_its_own_prompt(tokenizer, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(paths.demo_checkpoint_dir() / name, tmp_path)
    plain = Tokenizer(tmp_path)
    example = Example("", messages=tuple(CHATS[0]), prompt="### Response:\n", answer="yes")
    assert "start_of_turn" not in plain.decode_all(made(example, plain).ids)
    assert "start_of_turn" in tokenizer.decode_all(made(example, tokenizer).ids)
    with pytest.raises(UsageError, match="no chat template"):
        made(chat(), plain)


def test_ids_and_labels_are_those_of_trl(tokenizer):
    """Its own tokenization of the same examples; its training template marks the same answers."""
    pytest.importorskip("trl")
    from transformers import AutoTokenizer
    from trl.chat_template_utils import get_training_chat_template

    theirs = AutoTokenizer.from_pretrained(paths.demo_checkpoint_dir())
    for text in TEXTS:
        assert list(made(Example("", text=text), tokenizer).ids) == theirs(text + "<eos>")["input_ids"]
    from trl.chat_template_utils import gemma_chat_template

    theirs.chat_template = gemma_chat_template
    marked = get_training_chat_template(theirs)
    for number in range(len(CHATS)):
        found = theirs.apply_chat_template(
            CHATS[number], tokenize=True, return_dict=True, return_assistant_tokens_mask=True, chat_template=marked
        )
        row = made(chat(number), tokenizer)
        assert list(row.ids) == found["input_ids"]
        expected = [i if m else IGNORED for i, m in zip(found["input_ids"], found["assistant_masks"], strict=True)]
        assert list(row.labels) == expected


def test_a_template_that_hides_its_answers_is_refused_and_all_is_not(tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(paths.demo_checkpoint_dir() / name, tmp_path)
    (tmp_path / "chat_template.jinja").write_text(
        "{% if add_generation_prompt %}A:{% endif %}{% for m in messages %}{{ m.content }}|{% endfor %}"
    )
    odd = Tokenizer(tmp_path)
    with pytest.raises(UsageError, match="which tokens are the answer cannot be told") as raised:
        made(chat(), odd)
    assert "data, line 1" in str(raised.value)


def test_longer_ones_are_cut_and_counted(tokenizer):
    examples = [chat(number) for number in range(4)]
    whole = encode_examples(examples, tokenizer, 200, where="data")
    assert (whole.cut, whole.dropped, len(whole.rows)) == (0, 0, 4)
    lengths = sorted(len(row.ids) for row in whole.rows)
    some = encode_examples(examples, tokenizer, lengths[1], where="data")
    assert some.cut == sum(length > lengths[1] for length in lengths)
    assert some.longest == lengths[-1]
    assert max(len(row.ids) for row in some.rows) == lengths[1]
    assert some.dropped == 4 - len(some.rows)
    assert f"{some.cut} were longer and cut" in str(some)


def test_longer_ones_are_refused_where_that_is_asked_for(tokenizer):
    with pytest.raises(UsageError) as raised:
        encode_examples([chat(0), chat(1)], tokenizer, 30, where="data", too_long="refuse")
    assert "1 of 2 examples are longer than 30 tokens" in raised.value.what
    assert raised.value.problems[0].startswith("line 1 has ")


def test_nothing_left_to_learn_is_a_sentence(tokenizer):
    with pytest.raises(UsageError, match="nothing is left to learn"):
        encode_examples([chat(0)], tokenizer, 4, where="data")


def test_a_part_is_held_out_the_same_one_for_a_seed(tokenizer):
    every = encode_examples([Example(f"line {n}", text=f"number {n}") for n in range(20)], tokenizer, 50, where="data")
    train, held = split(every, 0.2, 1)
    assert (len(train.rows), len(held.rows)) == (16, 4)
    assert {row.where for row in train.rows} | {row.where for row in held.rows} == {row.where for row in every.rows}
    assert split(every, 4, 1) == (train, held)
    assert {row.where for row in split(every, 4, 2)[1].rows} != {row.where for row in held.rows}
    assert split(every, 0, 1) == (every, None)
    order = [int(row.where.split()[1]) for row in train.rows]
    assert order == sorted(order)
    assert np.all(np.diff(order) > 0)
    with pytest.raises(UsageError, match="20 examples are to be held out, and there are 20"):
        split(every, 20, 1)
