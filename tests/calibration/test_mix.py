"""The words for data sets: what they mean, every mistake at once, and windows of several data sets in one order."""

from collections import Counter
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_deploy.calibration.mix import DATASETS, HubPlace, MixEntry, read_mix, shortened, turn_order
from gemma_deploy.calibration.pipeline import Request, calibrate, dataset_record, make_windows
from gemma_deploy.calibration.sources import SOURCES
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.errors import CalibrationError, RecipeError, UsageError
from gemma_deploy.recipe import Recipe
from tests.calibration import make

RECIPE = """
name: x
frontend: {checkpoint: demo, shape: {input_ids: [[16], [32]]}}
backend: {dtype: fp16}
"""


@pytest.fixture
def files(tmp_path):
    """A file of each data set."""
    return {
        "c4": make.write_c4(tmp_path / "c4.json.gz"),
        "ceval": make.write_ceval(tmp_path / "ceval.zip"),
        "alpaca": make.write_alpaca(tmp_path / "alpaca.json"),
    }


def keyed(files):
    return ",".join(f"{name}={file}" for name, file in files.items())


def test_every_data_set_has_a_source():
    assert tuple(SOURCES) == DATASETS


@pytest.mark.parametrize(
    ("dataset", "path", "parts"),
    [
        ("c4", None, [MixEntry("c4")]),
        ("c4", "a,b=c.json", [MixEntry("c4", None, Path("a,b=c.json"))]),
        ("c4", "x=y.json", [MixEntry("c4", None, Path("x=y.json"))]),
        ("c4", "c4=x.json", [MixEntry("c4", None, Path("x.json"))]),
        ("c4:8", "hub", [MixEntry("c4", 8, HubPlace())]),
        ("c4", "./hub", [MixEntry("c4", None, Path("hub"))]),
        ("c4:64, alpaca:32", None, [MixEntry("c4", 64), MixEntry("alpaca", 32)]),
        ("c4:1,alpaca:2", "alpaca=a,b.json", [MixEntry("c4", 1), MixEntry("alpaca", 2, Path("a,b.json"))]),
        (
            "c4:1,ceval:2",
            "ceval=z.zip,c4=hub:allenai/c4:en@main",
            [MixEntry("c4", 1, HubPlace("allenai/c4", "en", "main")), MixEntry("ceval", 2, Path("z.zip"))],
        ),
    ],
)
def test_words_mean_one_thing(dataset, path, parts):
    mix = read_mix(dataset, path)
    assert mix.problems == ()
    assert list(mix.parts) == parts


@pytest.mark.parametrize(
    ("dataset", "path", "nsamples", "said"),
    [
        ("pile", None, None, ["'pile' is not one of 'c4', 'ceval', 'alpaca'"]),
        ("cevel", None, None, ["did you mean `ceval`?"]),
        ("c4:0", None, None, ["got 'c4:0', expected c4:WINDOWS"]),
        ("c4:x,alpaca:-1", None, None, ["got 'c4:x'", "got 'alpaca:-1'"]),
        ("c4,alpaca:3", None, None, ["c4 has no number of windows"]),
        ("c4:1,c4:2", None, None, ["c4 is named twice"]),
        ("c4:1,", None, None, ["'' is not one of"]),
        ("c4:1,alpaca:2", "x.json", None, ["'x.json' says not whose it is: write c4=FILE,alpaca=FILE"]),
        ("c4:1,alpaca:2", "ceval=x,c4=,alpaca=hub:a", None, ["ceval= is not", "nothing stands after c4=", "'hub:a'"]),
        ("c4:1,alpaca:2", "c4=x,c4=y", None, ["c4= is given twice"]),
        ("c4:1,alpaca:2", None, 4, ["4, but the windows of c4:1,alpaca:2 add up to 3"]),
    ],
)
def test_every_mistake_is_told(dataset, path, nsamples, said):
    problems = read_mix(dataset, path, nsamples).problems
    assert len(problems) == len(said)
    for (_, sentence), expected in zip(problems, said, strict=True):
        assert expected in sentence


@given(st.lists(st.integers(1, 40), min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_any_first_windows_are_a_mix(counts):
    order = turn_order(counts)
    assert Counter(order) == Counter(dict(enumerate(counts)))
    for part, count in enumerate(counts):
        for taken, seen in enumerate(accumulate(one == part for one in order), 1):
            assert abs(seen - taken * count / sum(counts)) < 1


def test_a_shorter_mix_keeps_every_part():
    assert turn_order([2, 1, 1]) == [0, 1, 2, 0]
    assert shortened("c4:64,ceval:32,alpaca:32", 3) == "c4:1,ceval:1,alpaca:1"
    assert shortened("c4:100,alpaca:1", 3) == "c4:3,alpaca:1"
    assert shortened("c4", 3) == "c4"
    assert shortened("alpaca:128", 3) == "alpaca:3"


def test_a_mix_holds_the_windows_of_its_parts_interleaved(checkpoint, files):
    mixed = make_windows(checkpoint, Request("c4:4,ceval:2,alpaca:2", keyed(files), 8, 24)).ids
    c4, ceval, alpaca = (
        make_windows(checkpoint, Request(name, files[name], count, 24)).ids
        for name, count in (("c4", 4), ("ceval", 2), ("alpaca", 2))
    )
    by_hand = [c4[0], ceval[0], alpaca[0], c4[1], c4[2], ceval[1], alpaca[1], c4[3]]
    assert np.array_equal(mixed, np.stack(by_hand))


def test_a_mix_is_recorded_and_each_of_its_files_counts(checkpoint, checkpoint_path, files):
    import hashlib

    request = Request("c4:2,alpaca:1", f"c4={files['c4']},alpaca={files['alpaca']}", 3, 24)
    record = dataset_record(checkpoint, request)
    assert [(one["name"], one["windows"], one["file"]) for one in record["sources"]] == [
        ("c4", 2, "c4.json.gz"),
        ("alpaca", 1, "alpaca.json"),
    ]
    for one in record["sources"]:
        assert one["sha256"] == hashlib.sha256(files[one["name"]].read_bytes()).hexdigest()
    assert record["windows"] == {"nsamples": 3, "seqlen": 24, "seed": 0}
    seen = {record["fingerprint"], dataset_record(checkpoint, request)["fingerprint"]}
    assert len(seen) == 1
    make.write_alpaca(files["alpaca"], make.alpaca_entries(19))
    seen.add(dataset_record(checkpoint, request)["fingerprint"])
    make.write_tokenizer(checkpoint_path, vocab_size=290)
    seen.add(dataset_record(Checkpoint.open(checkpoint_path), request)["fingerprint"])
    assert len(seen) == 3


def test_a_mix_is_calibrated_and_found_again(checkpoint, files, tmp_path):
    request = Request("c4:2,alpaca:1", f"alpaca={files['alpaca']}", 3, 16)
    made = calibrate(checkpoint, request, tmp_path / "w").calibration
    assert made.path.name.startswith("c4+alpaca-")
    assert [one["bundled"] for one in made.record["inputs"]["sources"]] == [True, False]
    assert calibrate(checkpoint, request, tmp_path / "w").reused


def test_all_that_is_missing_or_too_short_is_told_before_work(checkpoint, files, tmp_path):
    words = "c4:2,ceval:2,alpaca:2"
    with pytest.raises(CalibrationError) as caught:
        calibrate(checkpoint, Request(words, f"c4=/none,ceval=/no,alpaca={files['alpaca']}", 6, 16), tmp_path / "w")
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["/none", "/no"]
    words = "c4:2,ceval:200,alpaca:300"
    with pytest.raises(CalibrationError) as caught:
        calibrate(checkpoint, Request(words, keyed(files), 502, 64), tmp_path / "w")
    assert ["too short" in problem for problem in caught.value.problems] == [True, True]
    assert "ceval:" in caught.value.next_step
    assert not (tmp_path / "w").exists()


def test_a_bundled_sample_that_is_too_small_says_so(checkpoint):
    with pytest.raises(CalibrationError) as caught:
        make_windows(checkpoint, Request("c4:2,ceval:640", None, 642, 512))
    error = caught.value
    assert error.where.endswith("ceval_sample.zip (the bundled sample)")
    assert "640 windows of 512 tokens need 327040" in error.what
    assert error.expected == "enough text for ceval:640 with --seqlen 512"
    fits = int(error.what.split()[2]) // 511
    assert error.next_step.startswith(f"ask for less (ceval:{fits}), or give the real data set with --path ceval=FILE")


def test_all_mistakes_of_a_request_come_at_once(checkpoint, tmp_path):
    with pytest.raises(UsageError) as caught:
        calibrate(checkpoint, Request("pile,c4:2", "ceval=x", 3, 9999), tmp_path)
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["--dataset", "--path", "--seqlen"]


def test_a_recipe_takes_a_mix_and_adds_up_its_windows():
    recipe = Recipe.from_text(RECIPE + "dataset: {name: 'c4:5,alpaca:2', path: 'alpaca=x.json'}")
    assert recipe.dataset.nsamples == 7
    assert Recipe.from_text(RECIPE, ["dataset.name=c4:5"]).dataset.nsamples == 5
    assert Recipe.from_text(RECIPE).dataset.nsamples == 128


def test_a_recipe_tells_all_mistakes_with_their_places():
    with pytest.raises(RecipeError) as caught:
        Recipe.from_text(RECIPE + "dataset:\n  name: c4:5,pile:2\n  path: x.json,ceval=y\n  seqlen: 0\n")
    assert [problem[: problem.index(":", 9)] for problem in caught.value.problems] == [
        "line 6: dataset.name",
        "line 8: dataset.seqlen",
    ]
    with pytest.raises(RecipeError) as caught:
        Recipe.from_text(RECIPE, ["dataset={name: 'c4:5,pile:2', path: 'c4=x,ceval=y', nsamples: 7}"])
    assert "dataset.name: 'pile' is not one of" in str(caught.value)
    assert "dataset.path: ceval= is not in the mix" in str(caught.value)
    with pytest.raises(RecipeError, match=r"dataset\.nsamples: 8, but the windows of c4:5 add up to 5"):
        Recipe.from_text(RECIPE, ["dataset={name: c4:5, nsamples: 8}"])


def test_a_number_of_thousands_of_digits_is_refused_in_short():
    """Python itself refuses to read it, with an error of its own."""
    ((_, sentence),) = read_mix("c4:" + "9" * 5000).problems
    assert sentence.startswith("got 'c4:999")
    assert "expected c4:WINDOWS with a whole number of 1 to 999999999" in sentence
    assert len(sentence) < 200
