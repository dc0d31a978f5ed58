"""The tokenizer as transformers 5.23 builds it from the files of a checkpoint.

transformers does not take tokenizer.json as it is. Where the model is a Gemma and tokenizer_config.json names no other
class, its `GemmaTokenizer` takes vocabulary and merges from the file, and brings its own normalizer, pre-tokenizer and
decoder; with a generic class (`PreTrainedTokenizerFast`) the file is taken whole. In both cases tokens of
tokenizer_config.json, special_tokens_map.json and added_tokens.json are added in a certain order, which decides the
ids of those that the vocabulary does not have. A lone tokenizer.model is converted (sentencepiece.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gemma_deploy import reading
from gemma_deploy.machine import give_memory_back
from gemma_deploy.names import CONFIG
from gemma_deploy.text import pipeline
from gemma_deploy.text.added import Named, Plan, plan_tokens
from gemma_deploy.text.files import ADDED_TOKENS, SENTENCEPIECE, SETTINGS, SPECIAL_TOKENS, TOKENIZER, TokenizerFiles
from gemma_deploy.text.library import asking

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

GEMMA, GENERIC = "GemmaTokenizer", ("TokenizersBackend", "PreTrainedTokenizer", "PythonBackend")


@dataclass(frozen=True)
class Built:
    """A tokenizer of the tokenizers library, ready to encode without special tokens.

    Args:
        backend: without padding and truncation.
        names: the special tokens that have a name, such as `bos_token`.
        own_size: tokens that the vocabulary has by itself; settings add others behind them.
    """

    backend: Tokenizer
    names: Named
    own_size: int


def build(files: TokenizerFiles) -> Built:
    """Read the files and build the tokenizer.

    Raises:
        files.error: a file is missing or damaged, or transformers would build a tokenizer of another model.
    """
    settings = files.object(SETTINGS) or {}
    generic = _is_generic(files, settings)
    data = files.data(TOKENIZER)
    if data is None:
        return _from_sentencepiece(files, settings, generic)
    with asking(lambda reason: files.wrong(TOKENIZER, f"is not a tokenizer: {reason}")):
        backend = _backend(data)
        found = sorted(backend.get_added_tokens_decoder().items())
        plan = _plan(files, settings, found, named=not generic)
        if generic:
            pipeline.refuse_growth(files, backend)
        else:
            pipeline.check_model(files, backend)
            if _assigned(backend, plan.tokens) != _shown(found):
                backend = _without_added(data)
            pipeline.make_gemma(backend, plan.names)
        return _finished(backend, plan, settings)


def _is_generic(files: TokenizerFiles, settings: Mapping[str, Any]) -> bool:
    """Whether tokenizer.json counts as it is, by the class that tokenizer_config.json or config.json names."""
    name = settings.get("tokenizer_class") or (files.object(CONFIG) or {}).get("tokenizer_class")
    if not isinstance(name, str) or name.removesuffix("Fast") == GEMMA:
        return False
    if name.removesuffix("Fast") in GENERIC:
        return True
    raise files.error(
        f"names the class {name[:80]!r}: that is no tokenizer of a Gemma",
        where=files.where(SETTINGS),
        expected=f'"tokenizer_class": "{GEMMA}", or "PreTrainedTokenizerFast" to take {TOKENIZER} as it is',
        next_step=f"correct it, or copy {SETTINGS} again from where the weights came from",
    )


def _backend(data: bytes) -> Tokenizer:
    import tokenizers

    backend = tokenizers.Tokenizer.from_buffer(data)
    give_memory_back()  # real 270M: 306 MiB are 113, which is what the tokenizer is
    backend.no_padding()  # of batches in training; a text must neither be cut nor filled up
    backend.no_truncation()
    return backend


def _plan(
    files: TokenizerFiles, settings: dict[str, Any], found: Sequence[tuple[int, AddedToken]], *, named: bool
) -> Plan:
    return plan_tokens(
        settings,
        files.object(SPECIAL_TOKENS),
        files.object(ADDED_TOKENS),
        found=found,
        defaults=pipeline.NAMES if named else {},
        wrong=lambda what: files.wrong(SETTINGS, what),
    )


def _finished(backend: Tokenizer, plan: Plan, settings: Mapping[str, Any]) -> Built:
    own_size = backend.get_vocab_size()
    backend.add_tokens(list(plan.tokens))
    backend.encode_special_tokens = settings.get("split_special_tokens") is True
    return Built(backend, plan.names, own_size)


def _assigned(backend: Tokenizer, tokens: Sequence[AddedToken]) -> dict[int, str]:
    """The ids that tokens get when they are added to the bare vocabulary: their own, or the next free ones."""
    size = backend.get_vocab_size(with_added_tokens=False)
    known: dict[str, int] = {}
    ids: dict[int, str] = {}
    free = size
    for token in tokens:
        own = known.get(token.content, backend.model.token_to_id(token.content))
        if own is None:
            own, free = free, free + 1
        known[token.content] = own
        ids[own] = repr(token)
    return ids


def _shown(tokens: Sequence[tuple[int, AddedToken]]) -> dict[int, str]:
    return {number: repr(token) for number, token in tokens}


def _without_added(data: bytes) -> Tokenizer:
    """The tokenizer without the added tokens of its file: transformers adds those of other files, in another order."""
    document = reading.parse_json(data)
    document["added_tokens"] = []
    return _backend(json.dumps(document).encode())


def _from_sentencepiece(files: TokenizerFiles, settings: dict[str, Any], generic: bool) -> Built:
    from gemma_deploy.text import sentencepiece

    data = files.data(SENTENCEPIECE)
    if data is None or generic:
        what = "the tokenizer is missing" if data is None else f"only {SENTENCEPIECE} is there"
        raise files.error(
            f"{what}: text cannot become tokens",
            where=files.where(TOKENIZER),
            expected=f"the {TOKENIZER} that the model was trained with",
            next_step=f"copy {TOKENIZER} and {SETTINGS} there, or save them with transformers: "
            "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)",
        )
    with asking(lambda reason: files.wrong(SENTENCEPIECE, f"is not a SentencePiece model: {reason}")):
        pieces = sentencepiece.read_pieces(data)
        vocabulary = {piece.text: number for number, piece in enumerate(pieces)}
        if not ({"extra_special_tokens", "additional_special_tokens"} & set(settings)):
            settings = {**settings, "extra_special_tokens": sentencepiece.special_tokens(pieces)}
        plan = _plan(files, settings, [], named=True)
        backend = pipeline.gemma_backend(vocabulary, pipeline.merges_of(vocabulary, longest_first=False), plan.names)
        return _finished(backend, plan, settings)
