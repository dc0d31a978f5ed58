"""Everything that has weights reads the same way, whether it is a checkpoint or made from one."""

import numpy as np
import pytest

from gemma_deploy.artifact.weights import ArtifactWeights
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.params import build_plan, write_params
from gemma_deploy.params.quantized import QuantizedCheckpoint
from gemma_deploy.params.rescaled import RescaledCheckpoint
from gemma_deploy.quantization.layers import layer_file, quantize_layers
from gemma_deploy.quantization.rescaling import Rescaling
from gemma_deploy.quantization.solver import Settings
from gemma_deploy.quantization.table import scale_table, table_file
from gemma_deploy.schemes import Codes
from gemma_deploy.testing import write_tiny_checkpoint
from tests.manifests import manifest

LAYER = "model.layers.1."
EXPONENTS = {f"{LAYER}mlp.up_proj.out": 3, f"{LAYER}mlp.down_proj.in": 3, f"{LAYER}input_layernorm.out": 2}
IDS = np.random.default_rng(3).integers(3, 500, (2, 16))


def rows(source, name):
    return source.rows(name, 0, source.tensors[name].shape[0])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources") / "c"
    return Checkpoint.open(write_tiny_checkpoint(folder, "gemma3_text", num_hidden_layers=2))


@pytest.fixture(scope="module")
def sources(checkpoint, tmp_path_factory):
    """Of every kind, by name."""
    folder, config = tmp_path_factory.mktemp("made"), checkpoint.config
    records = quantize_layers(checkpoint, IDS, Settings(), folder=folder / "q", key="k")
    scale_table(checkpoint, IDS.shape, folder / "q", codes=Codes())
    files = [*(layer_file(folder / "q", index) for index in range(2)), table_file(folder / "q")]
    file = folder / "params.safetensors"
    rescaling = Rescaling(EXPONENTS)
    rescaled = RescaledCheckpoint(checkpoint, rescaling)
    table = write_params(
        rescaled, build_plan(config, "fp16", 48, rescaling=rescaling), file, journal=folder / "journal"
    )
    found = manifest(
        contract={"context": 48},
        scheme="fp16",
        storage=None,
        rescaling=rescaling.to_json(),
        params=table.moved(file.name).to_json(),
    )
    return {
        "checkpoint": checkpoint,
        "quantized": QuantizedCheckpoint(checkpoint, files, records),
        "rescaled": rescaled,
        "artifact": ArtifactWeights(config, folder, found),
    }


@pytest.mark.parametrize("kind", ["checkpoint", "quantized", "rescaled", "artifact"])
def test_a_source_of_weights(sources, checkpoint, kind):
    source = sources[kind]
    assert source.config == checkpoint.config
    assert source.path.exists()
    assert set(checkpoint.tensors) <= set(source.tensors)
    for name, info in source.tensors.items():
        whole = rows(source, name)
        assert (whole.dtype, whole.shape, info.name) == (np.float32, info.shape, name)
        assert np.isfinite(whole).all()
        np.testing.assert_array_equal(source.rows(name, 3, 5), whole[3:5])
        raw = source.raw_rows(name, 0, info.shape[0])
        assert raw.nbytes == info.nbytes
        np.testing.assert_array_equal(source.raw_rows(name, 3, 5), raw[3:5])
        if info.dtype != "bfloat16":
            np.testing.assert_array_equal(raw, whole)
            assert raw.dtype == info.dtype
        whole *= 2  # a reader may change what it was given
        assert not np.array_equal(rows(source, name), whole)
    scale = source.embedding_scale()
    assert (scale is None) == (kind != "quantized")
    assert scale is None or scale.shape == (checkpoint.config.hidden_size,)


def test_sources_are_told_apart(sources, checkpoint):
    found = {kind: source.weights_fingerprint() for kind, source in sources.items()}
    assert len(set(found.values())) == len(found)
    assert found == {kind: source.weights_fingerprint() for kind, source in sources.items()}
    other = Rescaling(EXPONENTS | {f"{LAYER}mlp.up_proj.out": 4})
    assert RescaledCheckpoint(checkpoint, other).weights_fingerprint() != found["rescaled"]


def test_powers_of_two_in_the_weights(sources, checkpoint):
    found = sources["rescaled"]
    factors = {f"{LAYER}mlp.up_proj.weight": 2.0**-3, f"{LAYER}mlp.down_proj.weight": 2.0**3}
    norm = f"{LAYER}input_layernorm.weight"
    for name in checkpoint.tensors:
        expected = rows(checkpoint, name) * np.float32(factors.get(name, 1))
        if name == norm:
            expected = ((1 + expected.astype(np.float64)) / 4 - 1).astype(np.float32)
        np.testing.assert_array_equal(rows(found, name), expected, err_msg=name)
    changed = {name for name, info in found.tensors.items() if info.dtype != checkpoint.tensors[name].dtype}
    assert changed <= {*factors, norm}


def test_an_artifact_gives_the_checkpoints_numbers_back(sources, checkpoint):
    for name, info in checkpoint.tensors.items():
        matrix = len(info.shape) == 2  # float16: 11 bits, and none below 2**-24, where a factor of 8 may have put it
        limits = {"rtol": 2.0**-11 if matrix else 0, "atol": 3e-7}
        np.testing.assert_allclose(rows(sources["artifact"], name), rows(checkpoint, name), **limits, err_msg=name)
