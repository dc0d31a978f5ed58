"""Text and tokenizer of the demo checkpoint (train_demo.py): collected and trained deterministically.

The text is that of the running interpreter's standard library, in order of path; every twentieth document, chosen by
its hash, is held out.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import io
import json
import re
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>")
PAD, EOS, BOS, UNK, MASK, START_OF_TURN, END_OF_TURN = range(len(SPECIAL))
VOCAB_SIZE = 4096
HELD_OUT_ONE_IN = 20
SKIPPED = {"site-packages", "ensurepip", "test", "tests", "idle_test", "__pycache__", "lib2to3", "encodings"}
FOREIGN = re.compile(r"copyright|licen[cs]e|all rights reserved|permission to use", re.IGNORECASE)
SHORTEST, LONGEST = 40, 6000  # characters; longer documents are cut at a paragraph
# Words with the space before them, single digits, runs of spaces, newlines and marks: no merge crosses these.
PIECES = Regex(r"\u2581?[A-Za-z]+|\d|\n+|\u2581+(?=\u2581)|\u2581?[^\u2581\sA-Za-z\d]+|\u2581+")
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)


def collect() -> tuple[list[str], list[str], list[str]]:
    """Training documents, held-out documents, and conversations made of half of the training docstrings."""
    train: list[str] = []
    held: list[str] = []
    chats: list[str] = []
    seen: set[bytes] = set()
    for question, text in _documents(Path(sysconfig.get_paths()["stdlib"])):
        text = _tidy(text)
        digest = hashlib.sha256(text.encode()).digest()
        if len(text) < SHORTEST or digest in seen or FOREIGN.search(text) or not text.isascii():
            continue
        seen.add(digest)
        if digest[0] % HELD_OUT_ONE_IN == 0:
            held.append(text)
            continue
        train.append(text)
        answer = text.split("\n\n")[0]
        if question and digest[1] % 2 and 30 <= len(answer) <= 400:
            chats.append(f"<start_of_turn>user\n{question}<end_of_turn>\n<start_of_turn>model\n{answer}<end_of_turn>\n")
    return train, held, chats


def _documents(stdlib: Path) -> Iterator[tuple[str, str]]:
    """(question or "", text) of every file in order of path."""
    for file in sorted(stdlib.rglob("*.py")):
        relative = file.relative_to(stdlib)
        if SKIPPED.intersection(relative.parts):
            continue
        try:
            source = file.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):
            continue
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        if module == "pydoc_data.topics":
            yield from (("", part) for part in _topics(tree))
            continue
        yield from _docstrings(tree, module)
        yield from (("", block) for block in _comments(source))


def _docstrings(tree: ast.Module, module: str) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if not text:
                continue
            if isinstance(node, ast.Module):
                yield f"What is the module {module} for?", text
            else:
                verb = "What is" if isinstance(node, ast.ClassDef) else "What does"
                end = "?" if isinstance(node, ast.ClassDef) else " do?"
                yield f"{verb} {module}.{node.name}{end}", text


def _topics(tree: ast.Module) -> Iterator[str]:
    """The language reference, cut at its paragraphs into documents of at most LONGEST characters."""
    assignment = next(node for node in tree.body if isinstance(node, ast.Assign))
    for _, text in sorted(ast.literal_eval(assignment.value).items()):
        part = ""
        for paragraph in inspect.cleandoc(text).split("\n\n"):
            if part and len(part) + len(paragraph) > LONGEST:
                yield part
                part = ""
            part += paragraph + "\n\n"
        yield part


def _comments(source: str) -> Iterator[str]:
    """Comments of at least three whole lines that are mostly words."""
    block: list[str] = []
    last = 0
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (tokenize.TokenError, IndentationError):
        return
    for token in [t for t in tokens if t.type == tokenize.COMMENT and t.line.strip() == t.string] + [None]:
        if block and (token is None or token.start[0] != last + 1):
            text = inspect.cleandoc("\n".join(block))
            if len(block) >= 3 and sum(c.isalpha() or c == " " for c in text) > 0.85 * len(text):
                yield text
            block = []
        if token is not None:
            block.append(token.string.lstrip("#").removeprefix(" "))
            last = token.start[0]


def _tidy(text: str) -> str:
    lines = [line.rstrip().replace("\t", "    ") for line in text.strip().splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))[:LONGEST]


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-pair vocabulary in the form of Gemma's: spaces as U+2581, unknown characters as bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(PIECES, "isolated")
    trained = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))],
        initial_alphabet=["\u2581", "\n", *map(chr, range(33, 127))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trained)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    whole = Tokenizer(models.BPE(model["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    whole.normalizer = normalizers.Replace(" ", "\u2581")
    whole.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    whole.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    whole.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", BOS)]
    )
    whole.add_special_tokens(list(SPECIAL))
    return whole


def write_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """tokenizer.json and tokenizer_config.json, as transformers' GemmaTokenizer reads them."""
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    names = {f"{role}_token": f"<{role}>" for role in ("bos", "eos", "pad", "unk", "mask")}
    values = {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "add_eos_token": False, **names}
    values["model_max_length"] = 2048
    values["additional_special_tokens"] = ["<start_of_turn>", "<end_of_turn>"]
    (out / "tokenizer_config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
