"""Streaming from the hub: what is asked of the libraries, and what is said when there is no network or no library."""

import builtins
import time
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest

from gemma_deploy.calibration.pipeline import Request, calibrate, dataset_record, make_windows
from gemma_deploy.calibration.sources import hub
from gemma_deploy.cli import main
from gemma_deploy.errors import CalibrationError
from tests.calibration import make

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NOWHERE = "http://127.0.0.1:9"  # refuses connections
QUESTION = {"id": 0, "A": "a", "B": "b", "C": "c", "D": "d", "answer": "A", "explanation": ""}
WORDS = " ".join(make.story(1))


@pytest.fixture(autouse=True)
def nothing_remembered():
    hub.commit.cache_clear()
    yield
    hub.commit.cache_clear()


@pytest.fixture
def asked(monkeypatch):
    """A hub of endless data sets; the calls made to it."""
    calls = []

    def info(self, repo, *, revision=None, timeout=None):
        calls.append(("info", repo, revision))
        return SimpleNamespace(sha=COMMIT)

    def load(repo, config, **options):
        calls.append(("load", repo, config, options))
        assert options["streaming"] is True
        rows = {
            "allenai/c4": [{"text": " ", "url": "u"}, *make.c4_lines(200)],
            "yahma/alpaca-cleaned": make.alpaca_entries(200),
            "ceval/ceval-exam": [
                {**QUESTION, "question": f"{config} {options['split']} {n}? {WORDS}"} for n in range(40)
            ],
            "some/other": [{"content": "x"}],
        }
        return iter(rows[repo])

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda repo, revision: ["physics", "law"])
    return calls


def loads(calls):
    return [call[1:] for call in calls if call[0] == "load"]


def options(split):
    return {"split": split, "streaming": True, "revision": COMMIT}


def test_a_stream_gives_the_windows_of_a_file_with_the_same_rows(checkpoint, asked, tmp_path):
    file = make.write_c4(tmp_path / "c4.json.gz", make.c4_lines(200))
    streamed = make_windows(checkpoint, Request("c4", "hub", 4, 24)).ids
    assert (streamed == make_windows(checkpoint, Request("c4", file, 4, 24)).ids).all()
    assert loads(asked) == [("allenai/c4", "en", options("train"))]
    assert asked[0] == ("info", "allenai/c4", None)


def test_each_source_knows_its_place(checkpoint, asked):
    make_windows(checkpoint, Request("alpaca:2,ceval:2", "alpaca=hub,ceval=hub@v1", 4, 24))
    assert loads(asked) == [
        ("yahma/alpaca-cleaned", None, options("train")),
        *(("ceval/ceval-exam", config, options(split)) for split in ("dev", "test") for config in ("law", "physics")),
    ]
    assert ("info", "ceval/ceval-exam", "v1") in asked


def test_another_place_and_config_can_be_named_and_a_commit_needs_no_question(checkpoint, asked):
    place = f"hub:yahma/alpaca-cleaned:default@{COMMIT}"
    make_windows(checkpoint, Request("alpaca", place, 2, 24))
    assert asked == [("load", "yahma/alpaca-cleaned", "default", options("train"))]


def test_the_commit_is_the_fingerprint(checkpoint, asked, tmp_path):
    request = Request("c4", "hub", 2, 16)
    record = dataset_record(checkpoint, request)
    assert record["sources"] == [
        {
            **{"name": "c4", "windows": 2, "hub": "allenai/c4", "config": "en", "splits": ["train"]},
            **{"revision": COMMIT, "rendered": "text"},
        }
    ]
    assert calibrate(checkpoint, request, tmp_path / "w").reused is False
    assert calibrate(checkpoint, request, tmp_path / "w").reused is True
    assert len(loads(asked)) == 1
    assert len([call for call in asked if call[0] == "info"]) == 1


def test_rows_of_another_format_are_named(checkpoint, asked):
    with pytest.raises(CalibrationError) as caught:
        make_windows(checkpoint, Request("c4", "hub:some/other", 2, 16))
    assert caught.value.what == "the row has no 'text' (its keys: content)"
    assert caught.value.where == f"hub:some/other@{COMMIT[:12]}, default/train, row 0"


def test_a_stream_that_breaks_is_one_message(checkpoint, asked, monkeypatch):
    def broken(*args, **options):
        yield from make.c4_lines(3)
        raise ConnectionResetError("peer went\naway")

    monkeypatch.setattr(datasets, "load_dataset", broken)
    with pytest.raises(CalibrationError) as caught:
        make_windows(checkpoint, Request("c4", "hub", 2, 16))
    assert caught.value.what == "cannot be streamed from the hub: peer went away"
    assert caught.value.where == f"hub:allenai/c4:en@{COMMIT[:12]}"


def run(checkpoint_path, tmp_path, *extra):
    args = ["calibrate", "--dataset", "c4", "--checkpoint", checkpoint_path, "--workspace", tmp_path / "w", *extra]
    return main([str(arg) for arg in args])


def test_without_a_network_it_says_so_at_once(checkpoint_path, tmp_path, capsys, monkeypatch):
    """The real libraries, and a machine that refuses the connection."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", NOWHERE)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    begun = time.perf_counter()
    assert run(checkpoint_path, tmp_path, "--path", "hub:allenai/c4") == 1
    assert time.perf_counter() - begun < 15
    err = capsys.readouterr().err
    assert "hub:allenai/c4: cannot be streamed from the hub: " in err
    assert "next: check the name and the network, or give a file with --path" in err
    assert "use the bundled sample" in err
    assert "Traceback" not in err
    assert not (tmp_path / "w").exists()


def test_without_the_library_it_says_which(checkpoint_path, tmp_path, capsys, monkeypatch):
    found = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "huggingface_hub":
            raise ModuleNotFoundError("No module named 'huggingface_hub'")
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    assert run(checkpoint_path, tmp_path, "--path", "hub") == 1
    err = capsys.readouterr().err
    assert "a library is missing (No module named 'huggingface_hub')" in err
    assert "pip install datasets" in err
