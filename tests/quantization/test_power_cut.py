"""After a power cut: files of the quantizer that are gone or cut short are made again, with the same bytes."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.quantization.layer_walk import LayerWalk
from gemma_deploy.quantization.layers import layer_file, quantize_layers
from gemma_deploy.quantization.rescaling import Rescaling
from gemma_deploy.quantization.solver import Settings
from gemma_deploy.quantization.table import scale_table
from gemma_deploy.schemes import Codes
from gemma_deploy.stages.calibration import choose_rescaling, layer_sensitivity
from gemma_deploy.testing import write_tiny_checkpoint

LAYERS, PASSES = 3, 5
IDS = np.random.default_rng(5).integers(3, 500, (2, 24))
CODES = Codes(8, 0)


class StopError(Exception):
    """Ends a run somewhere."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "checkpoint"
    return Checkpoint.open(write_tiny_checkpoint(path, "gemma", num_hidden_layers=LAYERS))


def quantize(checkpoint, folder, stop=None):
    """Layers, then the table; until so many windows have passed."""

    def progress(done, total):
        if done == stop:
            raise StopError

    records = quantize_layers(checkpoint, IDS, Settings(), folder=folder, key="k", progress=progress)
    assert len(records) == LAYERS
    if stop != "before the table":
        scale_table(checkpoint, IDS.shape, folder, codes=CODES)
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


@pytest.fixture(scope="module")
def whole(checkpoint, tmp_path_factory):
    return quantize(checkpoint, tmp_path_factory.mktemp("whole") / "q")


def cut(file, keep=0.5):
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep)])


# What the disk may hold of a run that had come to its third layer.
LOST = {
    "the last result": lambda q: layer_file(q, 1).unlink(),
    "the first result": lambda q: layer_file(q, 0).unlink(),
    "half of a result": lambda q: cut(layer_file(q, 1)),
    "all of a result but its name": lambda q: cut(layer_file(q, 1), 0),
    "hidden states": lambda q: (q / "hidden-002.f32").unlink(),
    "half of the hidden states": lambda q: cut(q / "hidden-002.f32"),
    "half of the key": lambda q: cut(q / "key.json"),
    "the key": lambda q: (q / "key.json").unlink(),
    "a key that is none": lambda q: (q / "key.json").write_text('{"a": 1}'),
}


@pytest.mark.parametrize("lost", LOST)
def test_what_is_lost_is_made_again(checkpoint, tmp_path, whole, lost):
    with pytest.raises(StopError):
        quantize(checkpoint, tmp_path / "q", stop=2 * PASSES * len(IDS) + 3)
    assert layer_file(tmp_path / "q", 1).exists()
    LOST[lost](tmp_path / "q")
    assert quantize(checkpoint, tmp_path / "q") == whole


@pytest.mark.parametrize("lost", ["hidden-003.f32", "layer-001.safetensors"])
def test_so_it_is_between_the_last_layer_and_the_table(checkpoint, tmp_path, whole, lost):
    quantize(checkpoint, tmp_path / "q", stop="before the table")
    (tmp_path / "q" / lost).unlink()
    assert quantize(checkpoint, tmp_path / "q") == whole


@pytest.mark.parametrize("harm", [lambda file: cut(file), lambda file: file.unlink()])
def test_so_it_is_with_the_table(checkpoint, tmp_path, whole, harm):
    quantize(checkpoint, tmp_path / "q")
    harm(tmp_path / "q" / "table.safetensors")
    assert quantize(checkpoint, tmp_path / "q") == whole


def test_states_of_a_run_that_was_killed_while_it_made_lost_ones_again_are_not_taken(
    checkpoint, tmp_path, whole, monkeypatch
):
    """They have their full size before they have their content."""
    folder = tmp_path / "q"

    def stop(*args):
        raise StopError

    with pytest.raises(StopError):
        quantize(checkpoint, folder, stop=2 * PASSES * len(IDS) + 3)
    (folder / "hidden-002.f32").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(LayerWalk, "leave", stop)
        with pytest.raises(StopError):
            quantize(checkpoint, folder)
    assert (folder / "hidden-001.f32").stat().st_size == 4 * IDS.size * checkpoint.config.hidden_size
    assert quantize(checkpoint, folder) == whole


def test_nothing_is_made_again_without_need(checkpoint, tmp_path, whole):
    folder = tmp_path / "q"
    quantize(checkpoint, folder)
    times = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert quantize(checkpoint, folder) == whole
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == times


RECORDS = ['{"key": "k", "expo', "", "[]", '{"exponents": {}}', "\0" * 40, '{"key": "other"}']


@pytest.mark.parametrize("text", RECORDS)
def test_a_rescaling_that_was_cut_short_is_measured_again(tmp_path, monkeypatch, text):
    job = SimpleNamespace(checkpoint=None, spec=SimpleNamespace(context=8, embed_scale="exact"))
    monkeypatch.setattr("gemma_deploy.parity.maxima.measure_rescaling", lambda *_, **__: Rescaling({"a": 1}))
    (tmp_path / "rescaling.json").write_text(text)
    for reused in (False, True):
        found = choose_rescaling(job, None, tmp_path, key="k")
        assert found == (Rescaling({"a": 1}), reused)


@pytest.mark.parametrize("text", RECORDS)
def test_a_sensitivity_that_was_cut_short_is_measured_again(tmp_path, monkeypatch, text):
    monkeypatch.setattr("gemma_deploy.parity.sensitivity.measure_sensitivity", lambda *_, **__: {"layers": [0.5]})
    monkeypatch.setattr("gemma_deploy.artifact.weights.ArtifactWeights", lambda *_: None)
    monkeypatch.setattr("gemma_deploy.stages.calibration.make_windows", lambda *_: SimpleNamespace(ids=np.array([[2]])))
    job, made = SimpleNamespace(checkpoint=None, config=None), SimpleNamespace(embed_scale="exact")
    (tmp_path / "sensitivity.json").write_text(text)
    for reused in (False, True):
        found = layer_sensitivity(job, None, made, out=tmp_path, key="k", progress=None)
        assert found == ({"layers": [0.5]}, reused)
    assert json.loads((tmp_path / "sensitivity.json").read_text()) == {"layers": [0.5], "key": "k"}
