"""C-Eval: a zip of `{dev,val,test}/SUBJECT_SPLIT.csv`, with or without a folder around them (ceval-exam.zip).

Columns: id, question, A, B, C, D, answer (not in every test split), explanation (dev only). The val split is left for
evaluation, where C-Eval scores are usually taken, unless the archive has nothing else.

Questions stay plain text for models with a chat template too: of 12,602 in the real archive 260 (dev) have an answer,
so there would be no model turn to render, and C-Eval's own few-shot prompt, which scores are taken with, is plain.
"""

from __future__ import annotations

import csv
import io
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gemma_deploy.calibration.sources.reading import Row, explained, wrong
from gemma_deploy.reading import open_regular

EXPECTED = "a zip with dev/, val/ and test/ folders of SUBJECT_SPLIT.csv files (ceval-exam.zip)"
COLUMNS = ("id", "question", "A", "B", "C", "D")
OPTIONAL = ("answer", "explanation")
HEADER = f"the columns {','.join(COLUMNS)}, then answer (and explanation in dev)"
MEMBER = re.compile(r"(?:^|/)(dev|val|test)/(?!\._)[^/]+_\1\.csv$")
ANSWER = "答案："  # noqa: RUF001 (C-Eval's own prompt)
# The real archive has 1.5 MB, 13,948 questions, and 500 kB in its largest member.
LARGEST_ARCHIVE_BYTES, LARGEST_MEMBER_BYTES, MOST_QUESTIONS = 32 << 20, 4 << 20, 100_000
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
ENCRYPTED = 1  # bit of a member's flags
# What zipfile raises for archives that are damaged or made for this.
UNPACKING = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, ValueError, OverflowError)


def rows(path: Path) -> Iterator[Row]:
    """Yield every question as its columns.

    Raises:
        CalibrationError: naming the archive's member and line.
    """
    with explained(path, EXPECTED), _opened(path) as archive:
        count = 0
        for member in _members(archive, path):
            for row in _questions(_read(archive, member, path), path, member.filename):
                count = _counted(count, path)
                yield row


def questions(path: Path, split: str) -> dict[str, list[Row]]:
    """The questions of one split by subject, subjects in alphabetical order; empty when the archive has no such split.

    Raises:
        CalibrationError: naming the archive's member and line.
    """
    with explained(path, EXPECTED), _opened(path) as archive:
        members = sorted((info for one, info in _found(archive, path) if one == split), key=lambda info: info.filename)
        found: dict[str, list[Row]] = {}
        count = 0
        for member in members:
            subject = Path(member.filename).stem.removesuffix(f"_{split}")
            found[subject] = []
            for row in _questions(_read(archive, member, path), path, member.filename):
                count = _counted(count, path)
                found[subject].append(row)
        return found


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > LARGEST_ARCHIVE_BYTES:
            raise wrong(f"has {size} bytes; at most {LARGEST_ARCHIVE_BYTES} are read", path, expected=EXPECTED)
        try:
            archive = zipfile.ZipFile(file)
        except NotImplementedError as error:
            raise wrong(f"cannot be unpacked: {error}", path, expected=EXPECTED) from error
        except UNPACKING as error:
            raise wrong(f"is not a zip archive, or is cut short: {error}", path, expected=EXPECTED) from error
        yield archive


def _counted(count: int, path: Path) -> int:
    """One question more."""
    if count == MOST_QUESTIONS:
        raise wrong(f"has more than {MOST_QUESTIONS} questions", path, expected=EXPECTED)
    return count + 1


def _found(archive: zipfile.ZipFile, path: Path) -> list[tuple[str, zipfile.ZipInfo]]:
    """(split, member) of every C-Eval file."""
    found = [(match[1], info) for info in archive.infolist() if (match := MEMBER.search(info.filename))]
    if not found:
        names = [info.filename for info in archive.infolist() if not info.is_dir()][:3]
        raise wrong(f"has no C-Eval file in it (it holds: {', '.join(names) or 'nothing'})", path, expected=EXPECTED)
    return found


def _members(archive: zipfile.ZipFile, path: Path) -> list[zipfile.ZipInfo]:
    found = _found(archive, path)
    chosen = [info for split, info in found if split != "val"] or [info for _, info in found]
    return sorted(chosen, key=lambda info: info.filename)


def _read(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> str:
    at = member.filename
    if member.file_size > LARGEST_MEMBER_BYTES:
        raise wrong(f"is larger than {LARGEST_MEMBER_BYTES >> 20} MiB", path, at, expected="a C-Eval CSV file")
    reason = "it is encrypted" if member.flag_bits & ENCRYPTED else None
    if member.compress_type not in METHODS:
        reason = f"it is packed with method {member.compress_type} (stored and deflate are read)"
    if reason:
        raise wrong(f"cannot be unpacked: {reason}", path, at, expected=EXPECTED)
    try:
        return archive.read(member).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise wrong(f"is not UTF-8 text (byte {error.start})", path, at, expected="a C-Eval CSV file") from error
    except UNPACKING as error:
        raise wrong(f"cannot be unpacked: {error}", path, at, expected=EXPECTED) from error


def _questions(content: str, path: Path, member: str) -> Iterator[Row]:
    table = csv.DictReader(io.StringIO(content, newline=""), strict=True)
    try:
        header = list(table.fieldnames or ())
        extra = [name for name in header if name not in (*COLUMNS, *OPTIONAL)]
        if tuple(header[: len(COLUMNS)]) != COLUMNS or extra:
            said = f"its first line is {','.join(header)[:120]!r}" if header else "the file is empty"
            raise wrong(f"the CSV header is wrong: {said}", path, member, expected=HEADER)
        for row in table:
            if None in row or any(value is None for value in row.values()):
                at = f"{member}, line {table.line_num}"
                filled = sum(value is not None for key, value in row.items() if key is not None)
                count = filled + len(row.get(None) or ())
                raise wrong(f"has {count} fields, the header has {len(header)}", path, at, expected=HEADER)
            yield row
    except csv.Error as error:
        raise wrong(f"is not CSV: {error}", path, f"{member}, line {table.reader.line_num}", expected=HEADER) from error


def text(row: Row) -> str:
    """A question with its choices, answer and explanation."""
    lines = [row["question"], *(f"{choice}. {row[choice]}" for choice in "ABCD")]
    if row.get("answer"):
        lines.append(ANSWER + row["answer"])
    if row.get("explanation"):
        lines.append(row["explanation"])
    return "\n".join(lines)
