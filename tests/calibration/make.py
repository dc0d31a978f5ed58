"""A small tokenizer, and data files in the three real formats, for these tests."""

# ruff: noqa: RUF001 (Chinese punctuation is meant)
from __future__ import annotations

import csv
import gzip
import io
import json
import zipfile
from pathlib import Path
from typing import Any

WORDS = "the window of a layer sees tokens and the next layer adds what it found in them"
SPECIALS = ["<pad>", "<eos>", "<bos>", "<unk>"]
HEADER = ["id", "question", "A", "B", "C", "D", "answer"]


def write_tokenizer(directory: Path, vocab_size: int = 400) -> None:
    """A byte-level BPE with Gemma's special tokens at Gemma's ids; it pads and truncates, which windows must not."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(story(n)) for n in range(20)], trainer)
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=300)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<bos>", "tokenizer_class": "PreTrainedTokenizerFast"})
    )


def story(number: int) -> list[str]:
    """Words of one text; no two numbers give the same."""
    words = WORDS.split()
    return [f"Text {number}:", *(words[(number * 7 + i * (number % 5 + 1)) % len(words)] for i in range(30)), "."]


def c4_lines(count: int = 40) -> list[dict[str, Any]]:
    return [
        {"text": " ".join(story(n)), "timestamp": "2019-04-25T12:57:54Z", "url": f"https://example.org/{n}"}
        for n in range(count)
    ]


def write_c4(path: Path, entries: list[Any] | None = None) -> Path:
    entries = c4_lines() if entries is None else entries
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    path.write_bytes(gzip.compress("".join(f"{line}\n" for line in lines).encode(), mtime=0))
    return path


def table(rows: list[list[str]], header: list[str] | None = None) -> bytes:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([header or HEADER, *rows])
    return out.getvalue().encode()


def questions(count: int, what: str) -> list[list[str]]:
    return [
        [str(n), f"{what} 第{n}题，选____。", f"甲{n}", "乙", "丙", '丁, "四"', "ABCD"[n % 4]] for n in range(count)
    ]


def write_ceval(path: Path, members: dict[str, bytes] | None = None, folder: str = "ceval-exam/") -> Path:
    if members is None:
        explained = [[*row, f"解析{row[0]}"] for row in questions(5, "dev")]
        members = {
            "dev/logic_dev.csv": table(explained, [*HEADER, "explanation"]),
            "test/logic_test.csv": table([row[:-1] for row in questions(5, "test")], HEADER[:-1]),
            "val/logic_val.csv": table(questions(5, "val")),
        }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(folder + name, data)
    return path


def alpaca_entries(count: int = 20) -> list[dict[str, Any]]:
    return [
        {"instruction": f"Count to {n}.", "input": "one by one" if n % 2 else "", "output": " ".join(story(n))}
        for n in range(count)
    ]


def write_alpaca(path: Path, entries: Any = None) -> Path:
    path.write_text(json.dumps(alpaca_entries() if entries is None else entries), encoding="utf-8")
    return path
