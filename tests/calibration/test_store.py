"""Results are whole or not there, found again by their inputs, and made again when an input or a byte has changed."""

import json
import os

import numpy as np
import pytest
from safetensors.numpy import load_file

from gemma_deploy.calibration import pipeline
from gemma_deploy.calibration.pipeline import Request, calibrate
from gemma_deploy.calibration.store import Calibration
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.errors import CalibrationError, UsageError
from gemma_deploy.provenance import Code
from gemma_deploy.testing import write_tiny_checkpoint
from gemma_deploy.workdir import MARK
from tests.calibration import make


@pytest.fixture(autouse=True)
def passes(monkeypatch):
    """Counts streaming passes."""
    count = []
    measure = pipeline.measure
    monkeypatch.setattr(pipeline, "measure", lambda *args, **named: count.append(1) or measure(*args, **named))
    return count


@pytest.fixture
def request_(c4_file):
    return Request("c4", c4_file, nsamples=3, seqlen=24)


def files(directory):
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_a_result_holds_samples_ranges_record_and_picture(checkpoint, request_, tmp_path):
    made = calibrate(checkpoint, request_, tmp_path / "w").calibration
    assert made.path.parent == tmp_path / "w" / "calib"
    assert made.path.name == f"c4-{made.record['fingerprint'][:12]}"
    assert sorted(files(made.path)) == ["calibration.json", "ranges.png", "samples.safetensors", "stats.safetensors"]
    assert (made.path / "ranges.png").read_bytes()[:4] == b"\x89PNG"
    assert made.samples.shape == (3, 24)
    stats = load_file(made.path / "stats.safetensors")
    assert len(made.ranges) == 5 * 2 + 1
    for point, found in made.ranges.items():
        assert (found.minimum <= found.maximum).all()
        assert stats[f"{point}.absmax"] == [max(-found.minimum.min(), found.maximum.max())]
        assert made.record["points"][point] == {"channels": len(found.minimum), "absmax": found.absmax}
    head = made.ranges["model.layers.1.mlp.gate_proj.in"]
    assert np.array_equal(made.input_range("model.layers.1.mlp.up_proj").maximum, head.maximum)


def test_the_same_inputs_give_the_same_bytes_and_are_measured_once(checkpoint, request_, tmp_path, passes):
    first = calibrate(checkpoint, request_, tmp_path / "w")
    again = calibrate(checkpoint, request_, tmp_path / "w")
    assert (first.reused, again.reused, len(passes)) == (False, True, 1)
    before = files(first.calibration.path)
    forced = calibrate(checkpoint, request_, tmp_path / "w", force=True)
    assert (forced.reused, len(passes)) == (False, 2)
    assert files(forced.calibration.path) == before


def test_every_input_counts(checkpoint_path, request_, tmp_path, passes):
    def run(request=request_):
        return calibrate(Checkpoint.open(checkpoint_path), request, tmp_path / "w").calibration.path

    made = [run()]
    for change in ({"nsamples": 2}, {"seqlen": 16}, {"seed": 1}, {"embed_scale": "bf16"}):
        made.append(run(Request(**{**vars(request_), **change})))
    make.write_c4(request_.path, make.c4_lines(39))
    made.append(run())
    make.write_tokenizer(checkpoint_path, vocab_size=290)
    made.append(run())
    weights = checkpoint_path / "model.safetensors"
    os.utime(weights, (1, 1))
    made.append(run())
    assert len(set(made)) == len(made) == len(passes)


def test_the_rounding_of_the_embedding_scale_reaches_the_model(tmp_path, c4_file):
    path = write_tiny_checkpoint(tmp_path / "c", "gemma", hidden_size=72, num_hidden_layers=1)  # sqrt(72) is not exact
    make.write_tokenizer(path)
    exact, rounded = (
        calibrate(Checkpoint.open(path), Request("c4", c4_file, 2, 16, 0, scale), tmp_path / "w").calibration
        for scale in ("exact", "bf16")
    )
    assert np.array_equal(exact.samples, rounded.samples)
    assert exact.ranges["model.layers.0.out"].absmax != rounded.ranges["model.layers.0.out"].absmax


def test_another_version_of_the_code_measures_again(checkpoint, request_, tmp_path, passes, monkeypatch):
    calibrate(checkpoint, request_, tmp_path / "w")
    monkeypatch.setattr(Code, "sha256", "another")
    assert not calibrate(checkpoint, request_, tmp_path / "w").reused
    assert len(passes) == 2


def flip(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def reformat(file):
    file.write_text(file.read_text().replace('"format_version": 1', '"format_version": 0'))


@pytest.mark.parametrize(
    ("name", "harm", "said"),
    [
        ("stats.safetensors", flip, "stats.safetensors is not the file that was written"),
        ("samples.safetensors", flip, "samples.safetensors is not the file that was written"),
        ("samples.safetensors", os.unlink, "samples.safetensors cannot be read: No such file"),
        ("calibration.json", os.unlink, "calibration.json cannot be read: No such file"),
        ("calibration.json", lambda file: file.write_text("{"), "calibration.json is not JSON"),
        ("calibration.json", reformat, "calibration.json is of format 0, this version reads 1"),
    ],
)
def test_a_damaged_result_is_refused_and_made_again(checkpoint, request_, tmp_path, passes, caplog, name, harm, said):
    made = calibrate(checkpoint, request_, tmp_path / "w").calibration
    before = files(made.path)
    harm(made.path / name)
    with pytest.raises(CalibrationError, match="cannot be used") as caught:
        Calibration.open(made.path)
    assert said in caught.value.what
    assert not calibrate(checkpoint, request_, tmp_path / "w").reused
    assert said in caplog.text
    assert files(made.path) == before


def test_two_requests_that_share_a_directory_name_are_told_apart(checkpoint, request_, tmp_path, passes):
    made = calibrate(checkpoint, request_, tmp_path / "w").calibration
    record = json.loads((made.path / "calibration.json").read_text())
    (made.path / "calibration.json").write_text(json.dumps(record | {"fingerprint": "0" * 64}))
    assert not calibrate(checkpoint, request_, tmp_path / "w").reused


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_run_leaves_nothing_and_keeps_what_was_there(checkpoint, request_, tmp_path, monkeypatch, error):
    made = calibrate(checkpoint, request_, tmp_path / "w").calibration
    before = files(made.path)

    def interrupt(*args, **named):
        raise error

    monkeypatch.setattr(pipeline.store, "write", interrupt)
    expected = KeyboardInterrupt if error is KeyboardInterrupt else CalibrationError
    with pytest.raises(expected) as caught:
        calibrate(checkpoint, request_, tmp_path / "w", force=True)
    if expected is CalibrationError:
        assert caught.value.what == "cannot be written: No space left on device"
    assert [path.name for path in made.path.parent.iterdir()] == [made.path.name]
    assert files(made.path) == before


def test_what_a_killed_run_left_is_cleared(checkpoint, request_, tmp_path):
    made = calibrate(checkpoint, request_, tmp_path / "w").calibration
    partial = made.path.rename(made.path.with_name(made.path.name + ".partial"))
    (partial / "half.tmp").write_bytes(b"x")
    (partial / MARK).write_text('{"made_by": "gemma-deploy calibrate", "key": null, "whole": false}')
    again = calibrate(checkpoint, request_, tmp_path / "w")
    assert not again.reused
    assert not partial.exists()
    assert "half.tmp" not in files(again.calibration.path)


def test_a_workspace_that_cannot_be_written_is_named(checkpoint, request_, tmp_path):
    (tmp_path / "w").write_text("a file")
    with pytest.raises(CalibrationError, match="cannot be written: Not a directory") as caught:
        calibrate(checkpoint, request_, tmp_path / "w")
    assert caught.value.next_step


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dataset": "pile"}, "--dataset: 'pile' is not one of"),
        ({"seqlen": 1}, "windows of 1 tokens"),
        ({"nsamples": 0}, "0 windows"),
        ({"seqlen": 513}, "longer than the model's context"),
    ],
)
def test_senseless_requests_are_refused_before_work(checkpoint, request_, tmp_path, passes, change, said):
    with pytest.raises(UsageError, match=said):
        calibrate(checkpoint, Request(**{**vars(request_), **change}), tmp_path / "w")
    assert not passes
    assert not (tmp_path / "w").exists()
