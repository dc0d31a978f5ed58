"""The bundled demo checkpoint: small, whole, a real Gemma 1 to everyone who reads it, and trained."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gemma_deploy import paths
from gemma_deploy.checkpoint import Checkpoint, resolve_checkpoint
from gemma_deploy.text import Tokenizer

DEMO = paths.demo_checkpoint_dir()
SPECIAL = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<start_of_turn>": 5, "<end_of_turn>": 6}
CONTEXT = 256  # tokens it was trained on at a time


@pytest.fixture(scope="module")
def stock():
    return AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO)


def test_it_is_at_most_six_megabytes_in_all():
    sizes = {file.name: file.stat().st_size for file in DEMO.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "heldout.txt"} <= set(sizes)
    assert sum(sizes.values()) <= 6_000_000, sizes


def test_the_checkpoint_reader_takes_it_without_a_note():
    checkpoint = Checkpoint.open(resolve_checkpoint("demo"))
    config = checkpoint.config
    assert config.model_type == "gemma"
    assert config.num_key_value_heads == 1
    assert config.num_attention_heads * config.head_dim != config.hidden_size
    assert config.tie_word_embeddings
    assert config.max_position_embeddings >= 2048
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_ids) == (0, 2, (1, 6))
    assert {info.dtype for info in checkpoint.tensors.values()} == {"bfloat16"}
    assert checkpoint.notes == ()


def test_tokenizer_has_gemmas_special_tokens_and_spelling(tokenizer):
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL} == SPECIAL
    assert len(tokenizer) == Checkpoint.open(DEMO).config.vocab_size
    ids = tokenizer("Return the list").input_ids
    assert ids[0] == SPECIAL["<bos>"]
    assert SPECIAL["<bos>"] not in ids[1:]
    assert tokenizer.convert_ids_to_tokens(ids[1:]) == ["Return", "\u2581the", "\u2581list"]


@pytest.mark.parametrize("text", ["a  b\n    c\td", "Gr\u00f6\u00dfe \u65e5\u672c \U0001f600", "x_1 = [0x7F, 12345]\n"])
def test_text_comes_back_from_tokens_byte_by_byte_where_the_vocabulary_ends(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert SPECIAL["<unk>"] not in ids
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_our_tokenizer_and_transformers_agree(tokenizer):
    ours = Tokenizer(DEMO)
    text = (DEMO / "heldout.txt").read_text(encoding="utf-8")[:4000]
    assert ours.encode(text) == tokenizer(text).input_ids
    messages = [{"role": "user", "content": " What does os.stat do? "}]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert rendered == "<bos><start_of_turn>user\nWhat does os.stat do?<end_of_turn>\n<start_of_turn>model\n"
    assert ours.encode_chat(messages) == tokenizer(rendered, add_special_tokens=False).input_ids


def test_perplexity_on_held_out_text_is_far_below_an_untrained_model(stock, tokenizer):
    tokens = tokenizer((DEMO / "heldout.txt").read_text(encoding="utf-8"), add_special_tokens=False).input_ids
    rows = torch.tensor(tokens).unfold(0, CONTEXT + 1, CONTEXT)[:12].clone()
    rows[:, 0] = SPECIAL["<bos>"]
    with torch.no_grad():
        logits = stock(rows[:, :-1]).logits
    perplexity = math.exp(torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item())
    # A model that knows nothing has the size of the vocabulary (4096), token frequencies alone about 800.
    assert perplexity < len(tokenizer) / 20


def test_greedy_text_is_made_of_words_of_its_language(stock, tokenizer):
    ids = tokenizer("Return the", return_tensors="pt")
    out = stock.generate(**ids, max_new_tokens=24, do_sample=False)[0]
    words = tokenizer.decode(out, skip_special_tokens=True).split()
    held_out = (DEMO / "heldout.txt").read_text(encoding="utf-8").lower()
    known = [word for word in words if word.strip("`'\".,:;()").lower() in held_out]
    assert len(set(words)) >= 5, words
    assert len(known) >= 0.7 * len(words), words


def test_generation_config_stops_at_the_end_of_a_turn():
    values = json.loads((DEMO / "generation_config.json").read_text())
    assert values["eos_token_id"] == [SPECIAL["<eos>"], SPECIAL["<end_of_turn>"]]
    assert values["bos_token_id"] == SPECIAL["<bos>"]


def test_pipeline_gives_the_same_text_with_the_patched_model(tmp_path):
    from transformers import pipeline

    from gemma_deploy.staging import stage_checkpoint

    staged = stage_checkpoint(DEMO, tmp_path / "staged")
    prompts = ["Return the", "The list of all"]
    texts = []
    for where, options in ((DEMO, {}), (staged, {"trust_remote_code": True})):
        generate = pipeline("text-generation", model=str(where), dtype=torch.float32, device="cpu", **options)
        generate.tokenizer.padding_side = "left"
        module = type(generate.model).__module__
        assert module.startswith("transformers_modules" if options else "transformers.models")
        made = generate(prompts, max_new_tokens=12, do_sample=False, batch_size=2)
        texts.append([row[0]["generated_text"] for row in made])
        chat = generate([{"role": "user", "content": "What does os.stat do?"}], max_new_tokens=8, do_sample=False)
        texts[-1].append(chat[0]["generated_text"][-1]["content"])
    assert texts[0] == texts[1]
    assert texts[0][0].startswith("Return the ")
