"""The tokenizer that transformers builds from the same files: the same ids, special tokens and size, file by file."""

import importlib
import json

import pytest
from transformers import AutoTokenizer, GemmaTokenizer

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.errors import ArtifactError, CheckpointError, DeployError
from gemma_deploy.text import Tokenizer, gguf
from tests.text import make
from tests.text.make import copy_demo, edit, token

DECODER = {str(number): token(text) for number, text in enumerate(("<pad>", "<eos>", "<bos>", "<unk>", "<mask>"))}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
# Settings of tokenizer_config.json that decide which tokens there are, or how text becomes them.
SETTINGS = {
    "as it is": {},
    "no class": {"tokenizer_class": None},
    "the fast class": {"tokenizer_class": "GemmaTokenizerFast"},
    "a generic class": {"tokenizer_class": "PreTrainedTokenizerFast"},
    "the new generic class": {"tokenizer_class": "TokenizersBackend"},
    "more special tokens": {"additional_special_tokens": ["<extra>", "<|own|>"]},
    "extra special tokens": {"extra_special_tokens": ["<|own|>", "<extra>"], "additional_special_tokens": None},
    "both": {"extra_special_tokens": ["<|own|>"], "additional_special_tokens": ["<extra>"]},
    "named ones": {"extra_special_tokens": {"image_token": "<|own|>"}, "audio_token": "<extra>"},
    "named ones, generic": {"extra_special_tokens": {"image_token": "<|own|>"}, "tokenizer_class": "TokenizersBackend"},
    "a decoder": {"added_tokens_decoder": DECODER},
    "a decoder with more": {"added_tokens_decoder": DECODER | {"9999": token("<|own|>"), "5000": token("<extra>")}},
    "a decoder with text": {"added_tokens_decoder": DECODER | {"4096": token("list", normalized=True, special=False)}},
    "a decoder, generic": {
        "added_tokens_decoder": DECODER | {"4097": token("<|own|>"), "4096": token("<extra>")},
        "tokenizer_class": "PreTrainedTokenizerFast",
    },
    "stripping": {"added_tokens_decoder": DECODER | {"4096": token("<|own|>", lstrip=True, rstrip=True)}},
    "an object": {"bos_token": {"__type": "AddedToken", **token("<bos>")}},
    "no mask": {"mask_token": None},
    "another mask": {"mask_token": "<extra>"},
    "another end": {"eos_token": "<end_of_turn>"},
    "an unknown end": {"eos_token": "<|own|>"},
    "a class token": {"cls_token": "<|own|>", "sep_token": "<end_of_turn>"},
    "split": {"split_special_tokens": True},
    "no BOS": {"add_bos_token": False, "add_eos_token": True},
    "a long name": {"bos_token": "<start_of_turn>"},
}
# The same by the older files.
OLDER = {
    "added_tokens.json": {"added_tokens.json": {"<|own|>": 4097, "<extra>": 4096}},
    "names": {"special_tokens_map.json": {"mask_token": "<extra>", "eos_token": "<end_of_turn>"}},
    "objects": {
        "special_tokens_map.json": {"mask_token": {"content": "<extra>"}, "sep_token": token("<|own|>", lstrip=True)}
    },
    "more": {"special_tokens_map.json": {"additional_special_tokens": ["<|own|>", "<extra>"]}},
    "extra": {"special_tokens_map.json": {"extra_special_tokens": ["<|own|>", {"content": "<extra>", "rstrip": True}]}},
    "both": {
        "added_tokens.json": {"<extra>": 4096, "<|own|>": 4097},
        "special_tokens_map.json": {"mask_token": "<|own|>"},
    },
}
# What tokenizer.json says itself.
FILES = {
    "another normalizer": {"normalizer": {"type": "Prepend", "prepend": "▁"}},
    "none": {"normalizer": None, "pre_tokenizer": None, "decoder": None},
    "byte level": {"pre_tokenizer": BYTE_LEVEL, "decoder": BYTE_LEVEL},
    "lower case": {"normalizer": {"type": "Lowercase"}},
    "padding": {
        "padding": {
            **{"strategy": {"Fixed": 300}, "direction": "Right", "pad_to_multiple_of": None},
            **{"pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"},
        }
    },
    "truncation": {"truncation": {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}},
    "no post-processor": {"post_processor": None},
    "no added tokens": {"added_tokens": []},
}
MODELS = {
    "unknown bytes": {"byte_fallback": False},
    "single unknowns": {"fuse_unk": False, "byte_fallback": False},
    "no unknown": {"unk_token": None},
    "whole words": {"ignore_merges": True},
    "no merges": {"merges": []},
}


def same(directory, text=make.TEXT, path=None):
    """Both tokenizers make the same of a text and know the same tokens."""
    if path is None:
        theirs = AutoTokenizer.from_pretrained(directory)
    else:  # AutoTokenizer knows no config for the files of a Gemma 1
        theirs = GemmaTokenizer.from_pretrained(directory, gguf_file=path.name)
    ours = Tokenizer(directory) if path is None else Tokenizer.of(Checkpoint.open(path))
    ours.table_size = None  # ids beyond it are refused, see test_tokenizer.py
    assert ours.encode_more(text) == theirs(text, add_special_tokens=False)["input_ids"]
    unsaid = {} if path is None else {"unk_token": "<unk>", "pad_token": "<pad>"}
    assert unsaid | dict(ours.special_tokens) == unsaid | theirs.special_tokens_map
    assert ours.vocab_size == len(theirs)
    ids = list(range(ours.vocab_size))
    assert [ours.decode(ids[at : at + 50]) for at in range(0, len(ids), 50)] == [
        theirs.decode(ids[at : at + 50], skip_special_tokens=True) for at in range(0, len(ids), 50)
    ]
    return theirs


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_count_as_in_transformers(tmp_path, name):
    same(copy_demo(tmp_path / "t", **SETTINGS[name]))


@pytest.mark.parametrize("generic", [False, True])
@pytest.mark.parametrize("name", OLDER)
def test_older_files_count_as_in_transformers(tmp_path, name, generic):
    changes = {"additional_special_tokens": None}
    changes |= {"tokenizer_class": "PreTrainedTokenizerFast"} if generic else {}
    directory = copy_demo(tmp_path / "t", **changes)
    for file, content in OLDER[name].items():
        (directory / file).write_text(json.dumps(content))
    same(directory)


@pytest.mark.parametrize("kind", ["GemmaTokenizer", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("name", [*FILES, *MODELS])
def test_a_gemma_brings_its_own_way_with_text_and_a_generic_class_takes_the_files(tmp_path, name, kind):
    directory = copy_demo(tmp_path / "t", tokenizer_class=kind)
    document = json.loads((directory / make.TOKENIZER).read_text(encoding="utf-8"))
    document |= FILES.get(name, {})
    document["model"] |= MODELS.get(name, {})
    (directory / make.TOKENIZER).write_text(json.dumps(document))
    same(directory)


@pytest.mark.parametrize("kind", ["GemmaTokenizer", "PreTrainedTokenizerFast"])
def test_tokens_that_only_tokenizer_json_adds(tmp_path, kind):
    """With a decoder in the settings a Gemma forgets them."""
    directory = copy_demo(tmp_path / "t", tokenizer_class=kind, added_tokens_decoder=DECODER)
    document = json.loads((directory / make.TOKENIZER).read_text(encoding="utf-8"))
    document["added_tokens"].append(token("<image_soft_token>", 4096))
    (directory / make.TOKENIZER).write_text(json.dumps(document))
    theirs = same(directory)
    assert (len(theirs) > 4096) is (kind != "GemmaTokenizer")


@pytest.mark.parametrize("unknown", ["<unk>", None])
def test_characters_and_bytes_that_the_vocabulary_does_not_have(tmp_path, unknown):
    directory = copy_demo(tmp_path / "t", tokenizer_class="GemmaTokenizer")
    settings = json.loads((directory / make.SETTINGS).read_text()) | {"unk_token": unknown}
    (directory / make.SETTINGS).write_text(json.dumps(settings))
    document = json.loads((directory / make.TOKENIZER).read_text(encoding="utf-8"))
    vocabulary = document["model"]["vocab"]
    document["model"]["vocab"] = {text: number for text, number in vocabulary.items() if not text.startswith("<0x")}
    (directory / make.TOKENIZER).write_text(json.dumps(document))
    text = "naïve €5, 日本語, 👩\u200d🚀"
    theirs = AutoTokenizer.from_pretrained(directory)
    assert Tokenizer(directory).encode_more(text) == theirs(text, add_special_tokens=False)["input_ids"]


def test_settings_that_are_not_there(tmp_path):
    directory = copy_demo(tmp_path / "t")
    (directory / make.SETTINGS).unlink()
    same(directory)


@pytest.mark.parametrize("name", ["GemmaTokenizerFast", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("said", [None, "GemmaTokenizer", "PreTrainedTokenizerFast"])
def test_the_class_may_stand_in_the_models_config(tmp_path, name, said):
    """Where tokenizer_config.json says none."""
    directory = copy_demo(tmp_path / "t", tokenizer_class=said)
    edit(directory / "config.json", {"tokenizer_class": name})
    edit(directory / make.TOKENIZER, {"normalizer": {"type": "Lowercase"}})
    same(directory)


def test_a_class_of_another_model_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="names the class 'LlamaTokenizerFast': that is no tokenizer of a Gemma"):
        Tokenizer(copy_demo(tmp_path / "t", tokenizer_class="LlamaTokenizerFast"))


@pytest.mark.parametrize("extra", [None, ["<|own|>"]])
def test_a_lone_sentencepiece_model(tmp_path, monkeypatch, extra):
    """transformers asks for the sentencepiece package there, and then reads the file without it."""
    module = importlib.import_module(
        "transformers.convert_slow_tokenizer"
    )  # transformers has a function of that name too
    monkeypatch.setattr(module, "requires_backends", lambda *_: None)
    directory = copy_demo(tmp_path / "t", additional_special_tokens=extra)
    (directory / make.TOKENIZER).unlink()
    make.write_sentencepiece(directory / "tokenizer.model", make.pieces_of_demo())
    same(directory)


def test_a_sentencepiece_model_beside_tokenizer_json_is_not_read(tmp_path):
    directory = copy_demo(tmp_path / "t")
    (directory / "tokenizer.model").write_bytes(b"no model")
    same(directory)


MERGES = [
    f"{left} {right}" for left, right in json.loads((make.DEMO / make.TOKENIZER).read_text("utf-8"))["model"]["merges"]
]
GGUFS = {
    "gemma": ("gemma", {}),
    "gemma 2": ("gemma2", {}),
    "gemma 3": ("gemma3", {}),
    "merges of its own": ("gemma3", {"merges": MERGES}),
    "no kinds": ("gemma2", {"metadata": {"ggml.token_type": None}}),
    "no unknown": ("gemma2", {"metadata": {"ggml.unknown_token_id": None}}),
    "few names": ("gemma3", {"metadata": {"ggml.padding_token_id": None, "ggml.unknown_token_id": None}}),
    "BOS said": ("gemma3", {"metadata": {"ggml.add_bos_token": True, "ggml.add_eos_token": True}}),
    "no BOS": ("gemma3", {"metadata": {"ggml.add_bos_token": False, "ggml.add_space_prefix": False}}),
    "another end": ("gemma2", {"metadata": {"ggml.eos_token_id": 6}}),
    "a template": ("gemma2", {"metadata": {"chat_template": make.GEMMA_1}}),
}


@pytest.mark.parametrize("name", GGUFS)
def test_a_tokenizer_inside_a_gguf_file(tmp_path, name):
    architecture, changes = GGUFS[name]
    path = make.write_gguf(tmp_path / "m.gguf", architecture, **changes)
    theirs = same(tmp_path, path=path)
    files = gguf.tokenizer_files(path)
    theirs.save_pretrained(tmp_path / "saved")
    assert files["tokenizer.json"] == (tmp_path / "saved" / "tokenizer.json").read_bytes()
    template = tmp_path / "saved" / "chat_template.jinja"
    assert files.get("chat_template.jinja") == (template.read_bytes() if template.exists() else None)
    written = tmp_path / "written"
    written.mkdir()
    for file, data in files.items():
        (written / file).write_bytes(data)
    ours, saved = Tokenizer(written), AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert ours.encode_more(make.TEXT) == saved(make.TEXT, add_special_tokens=False)["input_ids"]


def test_the_vocabulary_of_gemma_4(tmp_path):
    """Of another kind (`gemma4`): merges in the file, spaces as they are looked up."""
    from transformers.integrations.gguf import convert_gguf_tokenizer

    pieces = make.pieces_of_demo()
    tokens = [text for text, _, _ in pieces]
    found = {
        "tokenizer_type": "gemma4",
        "tokens": tokens,
        "token_type": [kind for _, _, kind in pieces],
        "merges": MERGES,
    }
    theirs, _ = convert_gguf_tokenizer("gemma4", found)
    path = make.write_gguf(tmp_path / "m.gguf", "gemma3", model="gemma4", tokens=tokens, merges=MERGES)
    files = gguf.tokenizer_files(path)
    written = json.loads(files["tokenizer.json"])
    assert written | {"post_processor": None} == json.loads(theirs.to_str()) | {"post_processor": None}
    assert written["post_processor"]["special_tokens"] == {}  # its chat template writes BOS


def test_files_beside_a_gguf_file_go_before_what_it_holds(tmp_path):
    path = make.write_gguf(tmp_path / "m.gguf", "gemma2")
    copy_demo(tmp_path, additional_special_tokens=["<|own|>"])
    assert Tokenizer.of(Checkpoint.open(path)).id_of("<|own|>") == 4096


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"metadata": {"ggml.model": "gpt2"}}, "tokenizer.ggml.model is 'gpt2'"),
        ({"metadata": {"ggml.model": 7}}, "tokenizer.ggml.model is '7'"),
        ({"metadata": {"ggml.model": None}}, "tokenizer.ggml.model is 'None'"),
        ({"tokens": [0, 1, 2]}, "tokenizer.ggml.tokens is no list of texts"),
        ({"kinds": [1, 2]}, "it has 4096 tokens and says the kind of 2"),
        ({"kinds": ["a"] * 4096}, "tokenizer.ggml.token_type is no list of whole numbers"),
        ({"metadata": {"ggml.bos_token_id": 5000}}, "tokenizer.ggml.bos_token_id is 5000"),
        ({"merges": ["a b c"]}, "tokenizer.ggml.merges holds 'a b c'"),
        ({"merges": ["qqq zzz"]}, "its vocabulary makes no tokenizer: "),
        ({"metadata": {"chat_template": 5}}, "tokenizer.chat_template is no text"),
    ],
)
def test_a_damaged_vocabulary_in_a_gguf_file_is_told(tmp_path, changes, said):
    path = make.write_gguf(tmp_path / "m.gguf", "gemma2", **changes)
    with pytest.raises(CheckpointError) as caught:
        gguf.tokenizer_files(path)
    assert caught.value.what.startswith(said)
    assert caught.value.where == str(path)
    assert caught.value.next_step


# --- files that are damaged ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
)
def test_a_byte_order_mark_is_no_damage(tmp_path, name):
    directory = copy_demo(tmp_path / "t", additional_special_tokens=None)
    (directory / "special_tokens_map.json").write_text('{"additional_special_tokens": ["<|own|>"]}')
    (directory / "added_tokens.json").write_text('{"<extra>": 4097}')
    expected = same(directory)(make.TEXT, add_special_tokens=False)["input_ids"]
    (directory / name).write_bytes(b"\xef\xbb\xbf" + (directory / name).read_bytes())
    tokenizer = Tokenizer(directory)
    tokenizer.table_size = None
    assert tokenizer.encode_more(make.TEXT) == expected


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
@pytest.mark.parametrize("content", ["{", "[]", "7", '{"a": ' + "9" * 5000 + "}", "[" * 100_000, '{"a": "\xff"}'])
def test_settings_that_are_no_object_are_told(tmp_path, name, content):
    directory = copy_demo(tmp_path / "t")
    (directory / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(ArtifactError) as caught:
        Tokenizer(directory)
    assert caught.value.where == str(directory / name)


@pytest.mark.parametrize(
    "changes",
    [
        {"bos_token": 7},
        {"mask_token": ["<mask>"]},
        {"eos_token": {"content": 1}},
        {"added_tokens_decoder": {"x": token("<a>")}},
        {"added_tokens_decoder": {"4096": 7}},
        {"added_tokens_decoder": {"4096": token("<a>", lstrip="no")}},
        {"extra_special_tokens": 7},
        {"extra_special_tokens": [7]},
        {"extra_special_tokens": {"image_token": 7}},
        {"mask_token": "\ud800"},
        {"added_tokens_decoder": {"4096": token("\udfff")}},
    ],
)
def test_tokens_that_are_none_are_told(tmp_path, changes):
    directory = copy_demo(tmp_path / "t", **changes)
    with pytest.raises(ArtifactError) as caught:
        Tokenizer(directory)
    assert caught.value.where == str(directory / make.SETTINGS)
    assert caught.value.next_step


@pytest.mark.parametrize(
    "content", [b"{}", b"", b"\xff\xfe{}", b'{"a": "\xff"}', b"[" * 100_000, b"null", b"\x00" * 99]
)
def test_a_tokenizer_that_is_none_is_told(tmp_path, content):
    directory = copy_demo(tmp_path / "t")
    (directory / make.TOKENIZER).write_bytes(content)
    with pytest.raises(ArtifactError, match=r"tokenizer.json: is not a tokenizer: \S+") as caught:
        Tokenizer(directory)
    assert caught.value.next_step


def test_another_kind_of_model_is_told(tmp_path):
    directory = copy_demo(tmp_path / "t")
    model = {"type": "WordLevel", "vocab": {"<unk>": 0, "<bos>": 1}, "unk_token": "<unk>"}
    edit(directory / make.TOKENIZER, {"model": model, "added_tokens": [], "post_processor": None})
    with pytest.raises(ArtifactError, match="holds a model of the kind WordLevel; a Gemma's is BPE"):
        Tokenizer(directory)


def test_panics_of_the_library_are_sentences(tmp_path, capfd):
    """In its Rust code; they are no `Exception` in Python."""
    directory = copy_demo(tmp_path / "t", tokenizer_class="PreTrainedTokenizerFast")
    edit(directory / make.TOKENIZER, {"pre_tokenizer": {"type": "FixedLength", "length": 0}})
    with pytest.raises(DeployError, match=r"tokenizer.json: makes no tokens of a text: chunk size must be non-zero"):
        Tokenizer(directory).encode("the list")
    pattern = {"type": "Split", "pattern": {"Regex": "(a|aa)+$"}, "behavior": "Isolated", "invert": False}
    edit(directory / make.TOKENIZER, {"pre_tokenizer": pattern})
    for encode in (Tokenizer(directory).encode, lambda text: Tokenizer(directory).encode_batch([text])):
        with pytest.raises(DeployError, match="retry-limit-in-match over"):
            encode("a" * 400 + "b")
    capfd.readouterr()  # what the library writes about it


@pytest.mark.parametrize(
    "normalizer",
    [
        {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000},
        {"type": "Replace", "pattern": {"Regex": "."}, "content": "a" * 1000},
        {"type": "Replace", "pattern": {"String": ""}, "content": "a" * 1000},
        {"type": "Prepend", "prepend": "a" * 1000},
        {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 40},
    ],
)
def test_normalizers_that_make_texts_long_are_refused(tmp_path, normalizer):
    directory = copy_demo(tmp_path / "t", tokenizer_class="PreTrainedTokenizerFast")
    edit(directory / make.TOKENIZER, {"normalizer": normalizer})
    with pytest.raises(ArtifactError, match=r"its normalizer makes texts up to \d+ times as long"):
        Tokenizer(directory)


@pytest.mark.parametrize(
    "content", [b"", b"\x0a", b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", b"\x0b", b"\x12\x00"]
)
def test_a_sentencepiece_model_that_is_none_is_told(tmp_path, content):
    directory = copy_demo(tmp_path / "t")
    (directory / make.TOKENIZER).unlink()
    (directory / "tokenizer.model").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"tokenizer.model: is not a SentencePiece model: "):
        Tokenizer(directory)


def test_no_vocabulary_at_all(tmp_path):
    directory = copy_demo(tmp_path / "t")
    (directory / make.TOKENIZER).unlink()
    with pytest.raises(ArtifactError, match=r"tokenizer.json: the tokenizer is missing: text cannot"):
        Tokenizer(directory)
    checkpoint = copy_demo(tmp_path / "c", weights=True)
    (checkpoint / make.TOKENIZER).unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer.json: the tokenizer is missing: text cannot"):
        Tokenizer.of(Checkpoint.open(checkpoint))
    (tmp_path / "bare").mkdir()
    bare = make.write_gguf(tmp_path / "bare" / "m.gguf", "gemma2", metadata={"ggml.tokens": None})
    with pytest.raises(CheckpointError, match="holds no tokenizer: text cannot become tokens"):
        Tokenizer.of(Checkpoint.open(bare))
