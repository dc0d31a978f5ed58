"""The tokenizer that is written beside a model is the one that the model came with."""

import json

import pytest
from transformers import AutoTokenizer

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.staging import stage_checkpoint
from gemma_deploy.text import Tokenizer
from gemma_deploy.text.saving import write_tokenizer
from tests.text import make

MORE = "additional_chat_templates/tool_use.jinja"


def ids(tokenizer):
    tokenizer.table_size = None
    return tokenizer.encode_more(make.TEXT)


@pytest.mark.parametrize("link", [True, False])
def test_every_file_goes_along(tmp_path, link):
    checkpoint = make.copy_demo(tmp_path / "c", weights=True)
    (checkpoint / "added_tokens.json").write_text('{"<extra>": 4096}')
    (checkpoint / "special_tokens_map.json").write_text('{"mask_token": "<|own|>"}')
    (checkpoint / MORE).parent.mkdir()
    (checkpoint / MORE).write_text("TOOLS")
    out = tmp_path / "out"
    out.mkdir()
    write_tokenizer(Checkpoint.open(checkpoint), out, link=link)
    assert ids(Tokenizer(out)) == ids(Tokenizer(checkpoint))
    assert (out / MORE).is_symlink() is link
    assert Tokenizer(out).chat.sources == Tokenizer(checkpoint).chat.sources
    assert Tokenizer(out).chat.sources["tool_use"] == "TOOLS"


def test_templates_with_a_name_are_part_of_what_a_checkpoint_is(tmp_path):
    checkpoint = make.copy_demo(tmp_path / "c", weights=True)
    before = Checkpoint.open(checkpoint).fingerprint()
    (checkpoint / MORE).parent.mkdir()
    (checkpoint / MORE).write_text("TOOLS")
    assert Checkpoint.open(checkpoint).fingerprint() != before


def test_a_lone_sentencepiece_model_gets_a_tokenizer_json(tmp_path):
    checkpoint = make.copy_demo(tmp_path / "c", weights=True)
    (checkpoint / make.TOKENIZER).unlink()
    make.write_sentencepiece(checkpoint / "tokenizer.model", make.pieces_of_demo())
    expected = ids(Tokenizer.of(Checkpoint.open(checkpoint)))
    staged = stage_checkpoint(checkpoint, tmp_path / "staged")
    assert ids(Tokenizer(staged)) == expected
    assert AutoTokenizer.from_pretrained(staged)(make.TEXT, add_special_tokens=False)["input_ids"] == expected


@pytest.mark.parametrize("template", [None, make.GEMMA_1])
def test_what_a_gguf_file_holds_becomes_files(tmp_path, template):
    path = make.write_gguf(tmp_path / "m.gguf", "gemma2", metadata={"chat_template": template})
    staged = stage_checkpoint(path, tmp_path / "staged")
    expected = ids(Tokenizer.of(Checkpoint.open(path)))
    assert ids(Tokenizer(staged)) == expected
    assert AutoTokenizer.from_pretrained(staged)(make.TEXT, add_special_tokens=False)["input_ids"] == expected
    assert (staged / "chat_template.jinja").exists() is bool(template)
    stops = json.loads((staged / "generation_config.json").read_text())["eos_token_id"]
    assert stops == ([1, 6] if template else [1])


def test_a_vocabulary_that_cannot_be_used_is_a_warning(tmp_path, caplog):
    path = make.write_gguf(tmp_path / "m.gguf", "gemma2", metadata={"ggml.model": "gpt2"})
    out = tmp_path / "out"
    out.mkdir()
    write_tokenizer(Checkpoint.open(path), out, link=False)
    assert list(out.iterdir()) == []
    assert "the tokenizer cannot be used: tokenizer.ggml.model is 'gpt2'" in caplog.text
    assert "no tokenizer; text cannot be tokenized with it" in caplog.text
