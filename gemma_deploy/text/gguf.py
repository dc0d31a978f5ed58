"""The tokenizer inside a GGUF file, as the files that transformers makes of it.

A GGUF file holds the vocabulary of SentencePiece (texts, scores, kinds) and no merges, and names special tokens by
their ids. transformers 5.23 (`integrations/gguf/gguf_tokenizer_mapping.py`) puts merges in the order of the tokens, not
of their scores, for Gemma 1, 2 and 3; files of Gemma 4 hold merges. The results are the same byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_deploy.checkpoint.gguf_header import read_gguf_header
from gemma_deploy.checkpoint.mapped import MappedFile
from gemma_deploy.errors import CheckpointError
from gemma_deploy.text.files import SETTINGS, TEMPLATE, TOKENIZER
from gemma_deploy.text.library import asking
from gemma_deploy.text.pipeline import NAMES, SPACE, gemma_backend, merges_of

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

KEY = "tokenizer.ggml."
TEMPLATE_KEY = "tokenizer.chat_template"
SENTENCEPIECE, WITH_MERGES = "llama", "gemma4"  # values of tokenizer.ggml.model
CONTROL, USER_DEFINED = 3, 4
LARGEST_LENGTH = 10**30  # `model_max_length` where nobody says one, as transformers writes it
_IDS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_ARRAYS = {f"{KEY}{name}": kind for name, kind in (("tokens", str), ("merges", str), ("token_type", int))}


def has_vocabulary(path: Path) -> bool:
    """Whether a GGUF file holds one."""
    return f"{KEY}tokens" in read_gguf_header(MappedFile(path)).metadata


def tokenizer_files(path: Path) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json and, where the file has one, chat_template.jinja.

    Args:
        path: of a GGUF file with a vocabulary.

    Raises:
        CheckpointError: it is damaged, or not of a Gemma.
    """
    found = read_gguf_header(MappedFile(path), whole=_ARRAYS).metadata
    _check(path, found)
    names = {**{name: _named(path, found, f"{key}_token_id") for name, key in _IDS.items()}}
    with asking(lambda reason: _wrong(path, f"its vocabulary makes no tokenizer: {reason}")):
        backend = _backend(path, found, names)
    files = {TOKENIZER: backend.to_str(pretty=True).encode()}
    template = found.get(TEMPLATE_KEY)
    if template is not None:
        files[TEMPLATE] = template.encode()
    said = NAMES | {name: text for name, text in names.items() if text is not None}
    settings = {**said, "model_max_length": LARGEST_LENGTH, "tokenizer_class": "GemmaTokenizer"}
    files[SETTINGS] = (json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
    return files


def template_of(path: Path) -> str | None:
    """The chat template, from the header alone.

    Raises:
        CheckpointError: the header is damaged.
    """
    found = read_gguf_header(MappedFile(path)).metadata.get(TEMPLATE_KEY)
    if found is not None and not isinstance(found, str):
        raise _wrong(path, f"{TEMPLATE_KEY} is no text")
    return found


def _check(path: Path, found: Mapping[str, Any]) -> None:
    """Refuse what is no tokenizer of a Gemma, and values of another kind than the keys have."""
    model = found.get(f"{KEY}model")
    if model not in (SENTENCEPIECE, WITH_MERGES):
        raise _wrong(
            path, f"{KEY}model is {str(model)[:80]!r}", f"{SENTENCEPIECE!r} (SentencePiece) or {WITH_MERGES!r}"
        )
    for key, kind in _ARRAYS.items():
        values = found.get(key, [])
        if not isinstance(values, list) or not all(type(one) is kind for one in values):
            raise _wrong(path, f"{key} is no list of {'texts' if kind is str else 'whole numbers'}")
    tokens = found.get(f"{KEY}tokens", [])
    kinds = found.get(f"{KEY}token_type", [])
    if not tokens or len(kinds) not in (0, len(tokens)):
        raise _wrong(path, f"it has {len(tokens)} tokens and says the kind of {len(kinds)}")
    if not isinstance(found.get(TEMPLATE_KEY, ""), str):
        raise _wrong(path, f"{TEMPLATE_KEY} is no text")


def _named(path: Path, found: Mapping[str, Any], key: str) -> str | None:
    """The text of a token that is named by its id."""
    number, tokens = found.get(KEY + key), found[f"{KEY}tokens"]
    if number is None:
        return None
    if type(number) is not int or not 0 <= number < len(tokens):
        raise _wrong(path, f"{KEY}{key} is {str(number)[:40]}", f"the number of one of {len(tokens)} tokens")
    return str(tokens[number])


def _backend(path: Path, found: Mapping[str, Any], names: Mapping[str, str | None]) -> Tokenizer:
    from tokenizers import AddedToken

    tokens: list[str] = found[f"{KEY}tokens"]
    own_merges = f"{KEY}merges" in found
    spelled = tokens
    if found[f"{KEY}model"] == SENTENCEPIECE:
        # Runs of spaces are stored as spaces, and are looked up as the sign that stands for a space.
        spelled = [SPACE * len(one) if " " in one and not one.strip() else one for one in tokens]
    vocabulary = {token: number for number, token in enumerate(spelled)}
    if own_merges:
        merges = [_pair(path, one) for one in found[f"{KEY}merges"]]
    elif found[f"{KEY}model"] == SENTENCEPIECE:
        merges = merges_of(vocabulary, longest_first=True)
    else:
        raise _wrong(path, f"{KEY}merges is missing")
    backend = gemma_backend(vocabulary, merges, NAMES)
    kinds = found.get(f"{KEY}token_type", [])
    backend.add_tokens([AddedToken(text, special=True) for text in NAMES.values()])
    backend.add_special_tokens(_of_kind(tokens, kinds, CONTROL))
    backend.add_tokens([one for one in _of_kind(tokens, kinds, USER_DEFINED) if one.content in vocabulary])
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    named = dict.fromkeys(text for text in {**NAMES, **names}.values() if text is not None and text not in known)
    backend.add_tokens([AddedToken(text, special=True) for text in named])
    _put_bos_in_front(backend, names, found)
    return backend


def _of_kind(tokens: list[str], kinds: list[int], wanted: int) -> list[AddedToken]:
    from tokenizers import AddedToken

    pairs = zip(tokens, kinds, strict=False)
    return [AddedToken(text, normalized=False, special=wanted == CONTROL) for text, kind in pairs if kind == wanted]


def _put_bos_in_front(backend: Tokenizer, names: Mapping[str, str | None], found: Mapping[str, Any]) -> None:
    """What transformers' tokenizers put around a text; ours put BOS in front by themselves."""
    from tokenizers import processors

    bos, eos = names["bos_token"], names["eos_token"]
    adds_bos = found.get(f"{KEY}add_bos_token", True) and found[f"{KEY}model"] != WITH_MERGES and bos is not None
    adds_eos = bool(found.get(f"{KEY}add_eos_token", False)) and eos is not None
    single, pair = "$A:0", "$B:1"
    special = []
    if adds_bos:
        single, pair = f"{bos}:0 {single}", f"{bos}:1 {pair}"
        special.append((bos, backend.token_to_id(str(bos))))
    if adds_eos:
        single, pair = f"{single} {eos}:0", f"{pair} {eos}:1"
        special.append((eos, backend.token_to_id(str(eos))))
    backend.post_processor = processors.TemplateProcessing(
        single=single, pair=f"{single} {pair}", special_tokens=special
    )


def _pair(path: Path, merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    if not left or not right or " " in right:
        raise _wrong(path, f"{KEY}merges holds {merge[:80]!r}", "two tokens with a space between them")
    return left, right


def _wrong(
    path: Path, what: str, expected: str = "the vocabulary of a Gemma, as llama.cpp writes it"
) -> CheckpointError:
    return CheckpointError(
        what,
        where=str(path),
        expected=expected,
        next_step="convert it again with a current llama.cpp, or put the tokenizer's files beside it",
    )
