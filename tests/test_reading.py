"""Reading files that others wrote: only text of a bounded size, only sentences when something is wrong with it."""

import json
import os
import socket
import stat
import subprocess
import sys
import time

import pytest

from gemma_deploy import reading
from gemma_deploy.errors import CheckpointError
from gemma_deploy.reading import FileKind, NotJsonError

CONFIG = FileKind(
    error=CheckpointError,
    expected="a JSON object",
    next_step="copy it again",
    missing="download it",
    unreadable="allow reading it",
    limit_bytes=1000,
)


def refusal(read, path, kind=CONFIG):
    """The one error that reading gives; it names the file, what was expected and a next step."""
    with pytest.raises(kind.error) as caught:
        read(path, kind)
    assert caught.value.where == str(path)
    assert caught.value.expected == kind.expected
    assert caught.value.next_step
    return caught.value


# --- what is opened ----------------------------------------------------------------------------------------------


def fifo(path):
    os.mkfifo(path)


def unix_socket(path):
    """Bound and left; the short working directory keeps its address under 108 bytes."""
    before = os.getcwd()
    os.chdir(path.parent)
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(before)


NOT_FILES = {
    "named pipe": (fifo, "it is a named pipe, not a file"),
    "directory": (lambda path: path.mkdir(), "Is a directory"),
    "socket": (unix_socket, "it is a socket, not a file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "it is a device, not a file"),
    "link to itself": (lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
}


@pytest.mark.parametrize("name", NOT_FILES)
def test_what_is_no_file_is_refused_at_once(tmp_path, name):
    make, words = NOT_FILES[name]
    path = tmp_path / "config.json"
    make(path)
    began = time.monotonic()
    for read in (reading.read_bytes, reading.read_text, reading.read_json, reading.read_object):
        error = refusal(read, path)
        assert error.what == f"cannot be read: {words}"
        assert error.next_step == "allow reading it"
    with pytest.raises(OSError, match=words):
        reading.open_regular(path)
    assert time.monotonic() - began < 2
    assert not reading.is_file(path)


def test_a_pipe_of_the_shell_is_read_where_it_may_be():
    """`<(...)` is /dev/fd/N: it has a writer and ends."""
    reader, writer = os.pipe()
    os.write(writer, b"name: x")
    os.close(writer)
    try:
        path = f"/dev/fd/{reader}"
        assert refusal(reading.read_text, path).what == "cannot be read: it is a pipe, not a file"
        assert reading.read_text(path, CONFIG, pipes=True) == "name: x"
    finally:
        os.close(reader)


def test_a_named_pipe_is_refused_where_pipes_of_the_shell_are_read(tmp_path):
    fifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="a named pipe"):
        reading.read_text(tmp_path / "pipe", CONFIG, pipes=True)


BAD_NAMES = {
    "part of 300 characters": ("x" * 300, "File name too long"),
    "path of 8000 characters": ("a/" * 4000, "File name too long"),
    "NUL": ("a\0b", "no file can have this name"),
    "lone surrogate": ("a\ud83d", "no file can have this name"),
    "below a file": ("/etc/passwd/config.json", "Not a directory"),
}


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_no_file_has(name):
    path, words = BAD_NAMES[name]
    assert refusal(reading.read_json, path).what == f"cannot be read: {words}"
    for asks in (reading.exists, reading.is_file, reading.is_dir):
        assert asks(path) is False


def test_a_missing_file_has_its_own_next_step(tmp_path):
    error = refusal(reading.read_json, tmp_path / "config.json")
    assert (error.what, error.next_step) == ("is missing", "download it")
    error = refusal(reading.read_json, tmp_path / "config.json", small(10))
    assert (error.what, error.next_step) == ("cannot be read: No such file or directory", "copy it")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("{}")
    path.chmod(0)
    assert refusal(reading.read_json, path).what == "cannot be read: Permission denied"


def test_files_and_folders_are_told_apart(tmp_path):
    (tmp_path / "a").write_text("")
    (tmp_path / "link").symlink_to("a")
    asks = (reading.exists, reading.is_file, reading.is_dir)
    assert [ask(tmp_path) for ask in asks] == [True, False, True]
    assert [ask(tmp_path / "link") for ask in asks] == [True, True, False]
    assert [ask(tmp_path / "b") for ask in asks] == [False, False, False]


UNREACHABLE = {
    "/dev/zero": "it is a device, neither a file nor a directory",
    **{path: words for path, words in BAD_NAMES.values()},
    "/nowhere/at/all": "there is no such file or directory",
    "/etc/passwd": None,
    "/etc": None,
}


@pytest.mark.parametrize("path", UNREACHABLE, ids=lambda path: ascii(path)[:20])
def test_why_a_path_leads_nowhere(path):
    assert reading.why_absent(path) == UNREACHABLE[path]


def test_an_open_file_is_regular_and_not_inherited(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    with reading.open_regular(tmp_path / "a") as file:
        assert stat.S_ISREG(os.fstat(file.fileno()).st_mode)
        assert not os.get_inheritable(file.fileno())
        assert os.get_blocking(file.fileno())
        assert file.read() == b"12345"


# --- homes -------------------------------------------------------------------------------------------------------


def test_homes(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert str(reading.expand("~/model")) == "/home/me/model"
    assert str(reading.expand("model/~")) == "model/~"
    assert str(reading.expand("~nosuchuser/model")) == "~nosuchuser/model"
    assert str(reading.expand("~\0")) == "~\0"
    assert str(reading.expand("~\ud83d/a")) == "~\ud83d/a"
    assert str(reading.expand("")) == "."


def test_where_there_is_no_home(monkeypatch):
    import pwd

    def nobody(uid):
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert str(reading.expand("~/model")) == "~/model"


# --- text --------------------------------------------------------------------------------------------------------


def test_text_with_and_without_a_byte_order_mark(tmp_path):
    path = tmp_path / "a"
    for raw in ("größe\n".encode(), b"\xef\xbb\xbf" + "größe\n".encode()):
        path.write_bytes(raw)
        assert reading.read_text(path, CONFIG) == "größe\n"
        assert reading.read_bytes(path, CONFIG) == raw


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ("größe".encode("latin-1"), "is not UTF-8 text (byte 2)"),
        ("{}".encode("utf-16"), "is not UTF-8 text (byte 0)"),
        (b"\xed\xa0\xbd", "is not UTF-8 text (byte 0)"),  # half a surrogate pair
    ],
)
def test_other_bytes(tmp_path, raw, words):
    (tmp_path / "a").write_bytes(raw)
    assert refusal(reading.read_text, tmp_path / "a").what == words
    assert refusal(reading.read_json, tmp_path / "a").what == words


def test_the_limit_of_size_is_exact_and_read_no_further(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"x" * 1000)
    assert len(reading.read_text(path, CONFIG)) == 1000
    path.write_bytes(b"x" * 1001)
    error = refusal(reading.read_text, path)
    assert error.what == "has 1001 bytes; at most 1000 are read"
    with path.open("wb") as file:
        file.truncate(1 << 43)  # a hole: reading it would take the memory of the machine
    assert refusal(reading.read_bytes, path).what == f"has {1 << 43} bytes; at most 1000 are read"


def test_a_file_that_says_it_is_empty_is_read_to_the_limit():
    """Files of /proc have no size."""
    text = reading.read_text("/proc/self/status", FileKind(CheckpointError, "", "", limit_bytes=1 << 20))
    assert text.startswith("Name:")
    assert "more than 10 bytes" in refusal(reading.read_text, "/proc/self/status", small(10)).what


def small(limit):
    return FileKind(CheckpointError, "text", "copy it", limit_bytes=limit)


# --- JSON --------------------------------------------------------------------------------------------------------


def test_values_are_those_of_the_json_module():
    text = '{"a": [1, -2.5, 1e3, true, null, "x\\u00e9\\ud83d\\ude00"], "b": {"c": NaN, "d": 12345678901234567890123}}'
    assert repr(reading.parse_json(text)) == repr(json.loads(text))
    assert repr(reading.parse_json(b"\xef\xbb\xbf" + text.encode())) == repr(json.loads(text))


NOT_JSON = {
    "cut": (b'{"a": 1', "Expecting ',' delimiter: line 1 column 8 (char 7)"),
    "empty": (b"", "Expecting value: line 1 column 1 (char 0)"),
    "nested lists": (b"[" * 100_000, "nested too deep"),
    "nested objects": (b'{"a":' * 100_000, "nested too deep"),
    "whole number of 5000 digits": (b'{"n": -' + b"9" * 5000 + b"}", "a number has 5000 digits"),
    "whole number of 301 digits": (b"[" + b"9" * 301 + b"]", "a number has 301 digits"),
    "millions of values": (b"[" + b"[]," * 5_000_000 + b"1]", "more than 2500000 values"),
    "a million numbers of 300 digits": (b"[" + (b"1" * 301 + b",") * 100 + b"1]", "a number has 301 digits"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_JSON)
def test_what_is_no_json_of_a_bounded_size(name):
    raw, words = NOT_JSON[name]
    with pytest.raises(NotJsonError) as caught:
        reading.parse_json(raw)
    assert str(caught.value) == words


def test_digits_inside_text_and_fractions_are_no_long_numbers():
    assert reading.parse_json(json.dumps({"text": "9" * 5000}))["text"] == "9" * 5000
    assert reading.parse_json("[0." + "3" * 5000 + "]") == [1 / 3]
    assert reading.parse_json("[" + "9" * 300 + "]") == [10**300 - 1]


def test_every_whole_number_can_become_a_float():
    assert float(reading.parse_json("9" * 300)) < float("inf")


def test_looking_for_long_numbers_takes_time_in_proportion():
    raw = b'["' + b"9" * (8 << 20) + b'"]'
    began = time.process_time()
    reading.parse_json(raw)
    assert time.process_time() - began < 2


def test_keys_that_occur_twice():
    text = '{"a": {"b": 1, "b": 2}}'
    assert reading.parse_json(text) == {"a": {"b": 2}}
    with pytest.raises(NotJsonError, match="the key 'b' occurs twice"):
        reading.parse_json(text, unique_keys=True)


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", '{"a": -Infinity}', "[1e999]", "-1e400"])
def test_numbers_that_are_not_finite(text):
    assert repr(reading.parse_json(text)) == repr(json.loads(text))
    with pytest.raises(NotJsonError, match="is no finite number"):
        reading.parse_json(text, finite=True)
    assert reading.parse_json("[1.5, 2]", finite=True) == [1.5, 2]


@pytest.mark.parametrize("text", ['"\\ud83d"', '{"\\udc00": 1}', '["\\uD83D\\uD83D"]'])
def test_half_a_surrogate_pair(text):
    assert repr(reading.parse_json(text)) == repr(json.loads(text))
    with pytest.raises(NotJsonError, match="half a surrogate pair"):
        reading.parse_json(text, whole_characters=True)
    assert reading.parse_json('"\\ud83d\\ude00"', whole_characters=True) == "\U0001f600"


def test_json_files(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"a": [1, 2]}')
    assert reading.read_json(path, CONFIG) == reading.read_object(path, CONFIG) == {"a": [1, 2]}
    path.write_text("[1]")
    assert reading.read_json(path, CONFIG) == [1]
    assert refusal(reading.read_object, path).what == "holds a list, expected an object {...}"
    path.write_text('{"a": 1')
    assert refusal(reading.read_json, path).what == "is not JSON: Expecting ',' delimiter: line 1 column 8 (char 7)"
    path.write_text('{"a": 1, "a": 1}')
    strict = FileKind(CheckpointError, "an object", "copy it", unique_keys=True)
    assert reading.read_json(path, CONFIG) == {"a": 1}
    assert refusal(reading.read_json, path, strict).what == "is not JSON: the key 'a' occurs twice"


MEASURE = """
from gemma_deploy import reading
raw = {bomb}
try:
    reading.parse_json(raw, unique_keys=True)
except reading.NotJsonError as error:
    print(error)
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak.split()[1]) >> 10)
"""
KEYS = """b'": 1.5, "'.join(b"%07d" % i for i in range(2_499_000))"""
BOMBS = {
    "empty objects": 'b"[" + b"{},"  * (20 << 20)',
    "numbers": 'b"[" + b"1.5," * 2_499_990 + b"1]"',
    "keys": f"""b'{{"' + {KEYS} + b'": 1}}'""",
    "keys beside a wide character": f"""b'{{"\\xf0\\x9f\\x98\\x80' + {KEYS} + b'": 1}}'""",
    "objects of one key": """b"[" + b'{"a":0.5},' * 1_240_000 + b"1]" """,
    "objects of other keys": """b"[" + b",".join(b'{"%07d":1.5}' % i for i in range(1_240_000)) + b"]" """,
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_small_files_do_not_become_gigabytes(bomb):
    code = MEASURE.format(bomb=BOMBS[bomb])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) < 1024, done.stdout
