"""What a Gemma tokenizer does with text: normalizer, pre-tokenizer, BPE with bytes for what it does not know, decoder.

As `GemmaTokenizer` of transformers 5.23 sets it up, whatever tokenizer.json says. Of files that are taken as they are,
`refuse_growth` looks at what they would do with text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gemma_deploy.text.files import SETTINGS, TOKENIZER, TokenizerFiles

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NAMES = {
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
}
SPACE = "▁"
MAX_GROWTH = 100  # characters that a normalizer may make of one


def gemma_backend(vocabulary: Mapping[str, int], merges: list[tuple[str, str]], names: Mapping[str, str]) -> Tokenizer:
    """A tokenizer without added tokens.

    Args:
        vocabulary: text -> id.
        merges: pairs, the first to be merged first.
        names: see `Plan`.
    """
    from tokenizers import Tokenizer, models

    model = models.BPE(vocab=dict(vocabulary), merges=merges, fuse_unk=True, dropout=None, byte_fallback=True)
    backend = Tokenizer(model)
    make_gemma(backend, names)
    return backend


def make_gemma(backend: Tokenizer, names: Mapping[str, str]) -> None:
    """Give a tokenizer Gemma's way with text; its vocabulary, merges and added tokens stay."""
    from tokenizers import decoders, normalizers, pre_tokenizers

    model: Any = backend.model
    model.dropout, model.fuse_unk, model.byte_fallback, model.ignore_merges = None, True, True, False
    model.unk_token = names.get("unk_token", "None")  # transformers writes str(None)
    model.continuing_subword_prefix = model.end_of_word_suffix = None
    backend.normalizer = normalizers.Replace(" ", SPACE)
    backend.pre_tokenizer = pre_tokenizers.Split(pattern=" ", behavior="merged_with_previous", invert=False)
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])


def merges_of(vocabulary: Mapping[str, int], *, longest_first: bool) -> list[tuple[str, str]]:
    """Every way to make a token out of two others, in the order of the tokens (`generate_merges` of transformers).

    Args:
        vocabulary: text -> id.
        longest_first: of one token's ways, whether the one with the longest left half comes first, or last.
    """
    merges = []
    for token in sorted(vocabulary, key=vocabulary.__getitem__):
        cuts = range(len(token) - 1, 0, -1) if longest_first else range(1, len(token))
        for cut in cuts:
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                merges.append((left, right))
    return merges


def check_model(files: TokenizerFiles, backend: Tokenizer) -> None:
    """Refuse a model that is no BPE.

    Raises:
        files.error: it is another.
    """
    kind = type(backend.model).__name__
    if kind != "BPE":
        raise files.error(
            f"holds a model of the kind {kind}; a Gemma's is BPE",
            where=files.where(TOKENIZER),
            expected="vocabulary and merges of a BPE",
            next_step=f'copy it again, or set "tokenizer_class": "PreTrainedTokenizerFast" in {SETTINGS} to take it as '
            "it is",
        )


def refuse_growth(files: TokenizerFiles, backend: Tokenizer) -> None:
    """Refuse normalizers that make a text many times as long.

    Raises:
        files.error: they do.
    """
    if backend.normalizer is None:
        return
    grows = _growth(json.loads(backend.normalizer.__getstate__()))
    if grows > MAX_GROWTH:
        raise files.error(
            f"its normalizer makes texts up to {grows} times as long",
            where=files.where(TOKENIZER),
            expected=f"at most {MAX_GROWTH} times",
            next_step="do not use this tokenizer unless you know who made it",
        )


def _growth(normalizer: Any) -> int:
    """Characters that a normalizer makes of one, at most; of Unicode's own normal forms 18."""
    if not isinstance(normalizer, dict):
        return 1
    kind = normalizer.get("type")
    if kind == "Sequence":
        grows = 1
        for one in normalizer.get("normalizers", []):
            grows = min(grows * _growth(one), 1 << 62)
        return grows
    if kind == "Replace":
        pattern, content = normalizer.get("pattern", {}), normalizer.get("content", "")
        replaced = pattern.get("String") if isinstance(pattern, dict) else None
        return -(-len(content) // len(replaced)) + 1 if replaced else len(content) + 1
    if kind == "Prepend":
        return 1 + len(normalizer.get("prepend", ""))
    return 18 if kind in ("NFKC", "NFKD", "NFC", "NFD") else 1
