"""Each data set in its real format, and every way a file can be wrong: named, explained, and nothing else."""

# ruff: noqa: RUF001 (Chinese punctuation is meant)
import gzip
import json
import os
import zipfile
from pathlib import Path

import pytest

from gemma_deploy.calibration.datasets import locate
from gemma_deploy.calibration.mix import MixEntry
from gemma_deploy.calibration.sources import SOURCES, c4, ceval
from gemma_deploy.errors import CalibrationError
from gemma_deploy.paths import calib_dir
from tests.calibration import make

SHARED = Path(__file__).parents[3] / "shared" / "data"
GOOD = '{"text": "a", "timestamp": "t", "url": "u"}'


def zipped(content):
    return gzip.compress(content, mtime=0)


def message(reader, path):
    with pytest.raises(CalibrationError) as caught:
        list(reader(path))
    assert caught.value.expected
    assert caught.value.next_step
    assert str(path) in caught.value.where
    return f"{caught.value.where.removeprefix(str(path))}: {caught.value.what}"


def test_c4_gives_the_texts_in_order_without_the_empty_ones(tmp_path):
    entries = [*make.c4_lines(3), {"text": " \n", "timestamp": "t", "url": "u"}, "", {"text": "last"}]
    expected = [entry["text"] for entry in make.c4_lines(3)] + ["last"]
    assert list(SOURCES["c4"].texts(make.write_c4(tmp_path / "x.json.gz", entries))) == expected
    plain = tmp_path / "x.json"
    plain.write_bytes(gzip.decompress((tmp_path / "x.json.gz").read_bytes()))
    assert list(SOURCES["c4"].texts(plain)) == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", ": the file is empty"),
        (zipped(b"".join(b'{"text": "%d"}\n' % n for n in range(3)))[:-9], "the gzip stream is cut short after line"),
        (zipped((GOOD + "\n").encode() * 500)[:40] + b"\0" * 40, "the gzip stream is damaged after line"),
        (zipped(f"{GOOD}\n{GOOD[:-1]}\n".encode()), ", line 2: is not JSON: Expecting ',' delimiter (character 43)"),
        (zipped(b'{"text": "\xff"}\n'), ", line 1: is not UTF-8 text (byte 10)"),
        (zipped(b'{"txt": "a", "url": "u"}\n'), ", line 1: has no 'text' (its keys: txt, url)"),
        (zipped(b'{"text": null}\n'), ", line 1: 'text' is null, not text"),
        (zipped(b"[1]\n"), ", line 1: is a list, not an object"),
        (b"PK\x03\x04 not lines at all", ", line 1: is not JSON: Expecting value (character 1)"),
        (zipped(b"[" * 100_000), ", line 1: is not JSON: nested too deep"),
        (zipped(f'{GOOD}\n{{"text": "a", "n": {"9" * 5000}}}\n'.encode()), ", line 2: is not JSON: a number has 5000"),
        (zipped(b"\n" * 200_000), ", line 100001: holds no text, as 100000 lines before it"),
        (zipped(b'{"text": " "}\n' * 200_000), ", line 100001: holds no text, as 100000 lines before it"),
        (zipped((GOOD + " " * 1000 + "\n").encode() * 20_000), ": unpacks to more than 100 times its size"),
    ],
    ids=lambda value: value[-24:] if isinstance(value, str) else "file",
)
def test_c4_says_what_is_wrong_with_a_file(tmp_path, content, expected):
    path = tmp_path / "x.json.gz"
    path.write_bytes(content)
    assert expected in message(SOURCES["c4"].texts, path)


def test_a_line_without_end_is_refused_before_it_fills_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(c4, "LONGEST_LINE_BYTES", 1000)
    path = make.write_c4(tmp_path / "x.json.gz", [GOOD, json.dumps({"text": "a" * 1000})])
    assert ", line 2: is longer than" in message(SOURCES["c4"].texts, path)


@pytest.mark.parametrize("name", SOURCES)
def test_a_missing_file_and_a_directory_are_named(tmp_path, name):
    assert "cannot be read: No such file or directory" in message(SOURCES[name].texts, tmp_path / "none")
    assert "cannot be read: Is a directory" in message(SOURCES[name].texts, tmp_path)


@pytest.mark.parametrize("folder", ["ceval-exam/", ""])
def test_ceval_renders_questions_and_leaves_val_for_evaluation(tmp_path, folder):
    found = list(SOURCES["ceval"].texts(make.write_ceval(tmp_path / "x.zip", folder=folder)))
    assert len(found) == 10
    assert found[1] == 'dev 第1题，选____。\nA. 甲1\nB. 乙\nC. 丙\nD. 丁, "四"\n答案：B\n解析1'
    assert found[5] == 'test 第0题，选____。\nA. 甲0\nB. 乙\nC. 丙\nD. 丁, "四"'
    assert not any("val" in text for text in found)


def test_ceval_takes_val_when_nothing_else_is_there(tmp_path):
    members = {"val/a_val.csv": make.table(make.questions(2, "val")), "__MACOSX/dev/._a_dev.csv": b"\0"}
    assert len(list(SOURCES["ceval"].texts(make.write_ceval(tmp_path / "x.zip", members)))) == 2


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        (
            {"dev/a_dev.csv": make.table([], ["id", "q", "A"])},
            "dev/a_dev.csv: the CSV header is wrong: its first line is 'id,q,A'",
        ),
        (
            {"dev/a_dev.csv": make.table([], [*make.HEADER, "extra"])},
            "the CSV header is wrong: its first line is 'id,question,",
        ),
        ({"dev/a_dev.csv": b""}, "dev/a_dev.csv: the CSV header is wrong: the file is empty"),
        ({"dev/a_dev.csv": make.table([["0", "q", "a"]])}, "dev/a_dev.csv, line 2: has 3 fields, the header has 7"),
        (
            {"dev/a_dev.csv": make.table([["0", *"qabcdA", "x", "y"]])},
            "dev/a_dev.csv, line 2: has 9 fields, the header has 7",
        ),
        ({"dev/a_dev.csv": make.table([]) + b'0,"open'}, "dev/a_dev.csv, line 2: is not CSV: unexpected end of data"),
        ({"dev/a_dev.csv": make.table([]) + b"0,\xff"}, "dev/a_dev.csv: is not UTF-8 text (byte 29)"),
        ({"readme.txt": b"x"}, ": has no C-Eval file in it (it holds: ceval-exam/readme.txt)"),
        ({}, ": has no C-Eval file in it (it holds: nothing)"),
    ],
)
def test_ceval_says_what_is_wrong_with_a_file(tmp_path, members, expected):
    assert expected in message(SOURCES["ceval"].texts, make.write_ceval(tmp_path / "x.zip", members))


def test_ceval_knows_what_is_no_zip_or_a_damaged_one(tmp_path):
    path = make.write_ceval(tmp_path / "x.zip")
    whole = path.read_bytes()
    for content in (b"id,question,A,B,C,D\n", whole[:-30]):
        path.write_bytes(content)
        assert ": is not a zip archive, or is cut short" in message(SOURCES["ceval"].texts, path)
    path.write_bytes(b"")
    assert ": the file is empty" in message(SOURCES["ceval"].texts, path)
    at = zipfile.ZipFile(make.write_ceval(path)).getinfo("ceval-exam/dev/logic_dev.csv").header_offset + 80
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
    assert "dev/logic_dev.csv: cannot be unpacked" in message(SOURCES["ceval"].texts, path)


def test_a_huge_member_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(ceval, "LARGEST_MEMBER_BYTES", 100)
    assert "dev/logic_dev.csv: is larger than" in message(SOURCES["ceval"].texts, make.write_ceval(tmp_path / "x.zip"))


def test_alpaca_renders_both_prompts(tmp_path):
    first, second = list(SOURCES["alpaca"].texts(make.write_alpaca(tmp_path / "x.json", make.alpaca_entries(2))))
    assert "### Input" not in first
    assert first.endswith("### Instruction:\nCount to 0.\n\n### Response:\n" + " ".join(make.story(0)))
    assert "### Instruction:\nCount to 1.\n\n### Input:\none by one\n\n### Response:\nText 1:" in second


def test_braces_in_a_task_are_text_and_not_fields(tmp_path):
    entry = {"instruction": "print {input}", "input": "{0} {x}", "output": "{"}
    (text,) = SOURCES["alpaca"].texts(make.write_alpaca(tmp_path / "x.json", [entry]))
    assert text.endswith("print {input}\n\n### Input:\n{0} {x}\n\n### Response:\n{")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", ": the file is empty"),
        ("[{]", ": is not JSON: Expecting property name enclosed in double quotes (line 1, character 3)"),
        ('{"instruction": "a"}', ": is an object, not a list"),
        ('[{"instruction": "a", "input": "", "output": "b"}, {"input": ""}, 3]',
         ", entry 1: has no 'instruction' and no 'output' (its keys: input); 1 more entries are wrong"),
        ('[{"instruction": "a", "input": 1, "output": "b"}]', ", entry 0: 'input' is a number, not text"),
    ],
)  # fmt: skip
def test_alpaca_says_what_is_wrong_with_a_file(tmp_path, content, expected):
    path = tmp_path / "x.json"
    path.write_text(content)
    assert expected in message(SOURCES["alpaca"].texts, path)


def test_half_a_surrogate_pair_is_replaced(tmp_path):
    path = tmp_path / "x"
    path.write_text('{"text": "a \\ud83d b \\ud83d\\ude00"}\n')
    assert list(SOURCES["c4"].texts(path)) == ["a \ufffd b \U0001f600"]
    path.write_text('[{"instruction": "a\\udc9d", "input": "", "output": "b"}]')
    assert "### Instruction:\na\ufffd\n" in next(iter(SOURCES["alpaca"].texts(path)))


MARK = b"\xef\xbb\xbf"


def test_files_of_an_editor_that_writes_a_byte_order_mark(tmp_path):
    path = tmp_path / "x"
    for content in (MARK + GOOD.encode(), zipped(MARK + GOOD.encode())):
        path.write_bytes(content)
        assert list(SOURCES["c4"].texts(path)) == ["a"]
    entries = make.alpaca_entries(2)
    expected = list(SOURCES["alpaca"].texts(make.write_alpaca(path, entries)))
    path.write_bytes(MARK + path.read_bytes())
    assert list(SOURCES["alpaca"].texts(path)) == expected
    table = {"dev/a_dev.csv": MARK + make.table(make.questions(1, "dev"))}
    assert len(list(SOURCES["ceval"].texts(make.write_ceval(path, table)))) == 1


@pytest.mark.parametrize("name", SOURCES)
def test_a_pipe_that_nobody_writes_to_is_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / "pipe")
    assert ": cannot be read: it is a named pipe" in message(SOURCES[name].texts, tmp_path / "pipe")
    part = MixEntry(name, 1, tmp_path / "pipe")
    with pytest.raises(CalibrationError, match="it is a named pipe"):
        locate([part], 1)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[" * 100_000, ": is not JSON: nested too deep"),
        ('[{"n": ' + "9" * 5000 + "}]", ": is not JSON: a number has 5000 digits"),
        ("[" + "{}," * 3_000_000 + "{}]", ": is not JSON: more than 2500000 values"),
    ],
    ids=["deep", "digits", "values"],
)
def test_alpaca_files_without_measure(tmp_path, content, expected):
    path = tmp_path / "x.json"
    path.write_text(content)
    assert expected in message(SOURCES["alpaca"].texts, path)


def test_an_alpaca_file_too_large_for_memory_is_refused_unread(tmp_path):
    with (tmp_path / "x.json").open("wb") as file:
        file.truncate(1 << 40)
    assert f": has {1 << 40} bytes; at most" in message(SOURCES["alpaca"].texts, tmp_path / "x.json")


def changed(path, at, value):
    """The archive with another two-byte field in the local and the central header of its first member."""
    raw = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", at), (b"PK\x01\x02", at + 2)):
        start = raw.index(signature) + offset
        raw[start : start + 2] = value.to_bytes(2, "little")
    path.write_bytes(bytes(raw))


LOCAL_VERSION, LOCAL_FLAGS, LOCAL_METHOD = 4, 6, 8  # offsets in a local header; two more in the central one


@pytest.mark.parametrize(
    ("at", "value", "expected"),
    [
        (LOCAL_VERSION, 99, "cannot be unpacked: zip file version 9.9"),
        (LOCAL_FLAGS, 1, "cannot be unpacked: it is encrypted"),
        (LOCAL_METHOD, 14, "cannot be unpacked: it is packed with method 14 (stored and deflate are read)"),
        (LOCAL_METHOD, 12, "cannot be unpacked: it is packed with method 12 (stored and deflate are read)"),
        (LOCAL_METHOD, 77, "cannot be unpacked: it is packed with method 77 (stored and deflate are read)"),
    ],
)
def test_zips_that_this_python_or_nobody_can_unpack(tmp_path, at, value, expected):
    """LZMA is refused whatever the file: a header of it can demand 4 GB."""
    path = make.write_ceval(tmp_path / "x.zip", {"dev/a_dev.csv": make.table(make.questions(1, "dev"))})
    changed(path, at, value)
    assert expected in message(SOURCES["ceval"].texts, path)


def test_zips_that_unpack_to_more_than_any_c_eval(tmp_path, monkeypatch):
    path = make.write_ceval(
        tmp_path / "x.zip", {f"dev/{n}_dev.csv": make.table(make.questions(9, "dev")) for n in "ab"}
    )
    monkeypatch.setattr(ceval, "MOST_QUESTIONS", 17)
    assert ": has more than 17 questions" in message(SOURCES["ceval"].texts, path)
    with pytest.raises(CalibrationError, match="has more than 17 questions"):
        ceval.questions(path, "dev")
    monkeypatch.setattr(ceval, "LARGEST_ARCHIVE_BYTES", 100)
    assert "bytes; at most 100 are read" in message(SOURCES["ceval"].texts, path)


@pytest.mark.parametrize(("name", "least"), [("c4", 90), ("ceval", 150), ("alpaca", 300)])
def test_the_bundled_samples_read_as_what_they_are(name, least):
    found = list(SOURCES[name].texts(calib_dir() / SOURCES[name].bundled))
    assert len(found) >= least
    assert all(text.strip() for text in found)


@pytest.mark.parametrize(
    ("name", "file", "count"), [("ceval", "ceval-exam.zip", 12602), ("alpaca", "alpaca_seed.json", 175)]
)
def test_the_real_files_read(name, file, count):
    if not (SHARED / file).exists():
        pytest.skip(f"{SHARED / file} is not on this machine")
    assert len(list(SOURCES[name].texts(SHARED / file))) == count
