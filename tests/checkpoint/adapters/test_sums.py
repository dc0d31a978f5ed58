"""What is computed does not depend on the block that is asked for, on threads, or on what was asked before."""

import subprocess
import sys

import numpy as np
import pytest

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.checkpoint.adapters import Adapter, sums
from gemma_deploy.checkpoint.adapters.sums import FirstFactors, Step, Sum
from tests.checkpoint.adapters.make import PREFIX, TABLE, pair, write_adapter
from tests.checkpoint.make import config, weights, write_checkpoint

RANKS = 8, 33, 600
TILE = 64  # rows, by the fixture below
WIDE = {"hidden_size": 96, "intermediate_size": 300, "vocab_size": 200}
UP = f"{PREFIX}model.layers.1.mlp.up_proj"
NAME, TABLE_NAME = "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"


@pytest.fixture(params=["lora", "dora"])
def opened(request, tmp_path, monkeypatch):
    """A checkpoint whose up_proj [300, 96] and table [200, 96] an adapter of rank 33 changes; and its tensors."""
    monkeypatch.setattr(sums, "TILE_BYTES", TILE * 4 * 96)
    raw = config(**WIDE)
    tensors = write_checkpoint(tmp_path / "base", raw, weights(raw), dtype="BF16")
    rng = np.random.default_rng(1)
    added = pair(UP, (300, 96), r=33) | {
        f"{TABLE}.lora_embedding_A": rng.standard_normal((33, 200), np.float32),
        f"{TABLE}.lora_embedding_B": rng.standard_normal((96, 33), np.float32),
    }
    if request.param == "dora":
        added[f"{UP}.lora_magnitude_vector"] = rng.random(300, np.float32) + 1
        added[f"{TABLE}.lora_magnitude_vector"] = rng.random(96, np.float32) + 1
    fields = {"r": 33, "lora_alpha": 8, "use_dora": request.param == "dora"}
    adapter = write_adapter(tmp_path / "adapter", added, **fields)
    return Checkpoint.open(tmp_path / "base", adapter), tensors, added


def expected(opened, name):
    """In float64, from the definition."""
    base, added = Checkpoint.open(opened[0].path), opened[2]
    weight = base.rows(name, 0, base.tensors[name].shape[0]).astype(np.float64)
    module = UP if name == NAME else TABLE
    if name == NAME:
        delta = added[f"{UP}.lora_B.weight"].astype(np.float64) @ added[f"{UP}.lora_A.weight"]
    else:
        delta = (added[f"{TABLE}.lora_embedding_B"].astype(np.float64) @ added[f"{TABLE}.lora_embedding_A"]).T
    found = weight + 8 / 33 * delta
    magnitude = added.get(f"{module}.lora_magnitude_vector")
    if magnitude is None:
        return found
    axis = 1 if name == NAME else 0
    lengths = np.linalg.norm(found, axis=axis)
    return found * np.expand_dims(magnitude / lengths, axis)


@pytest.mark.parametrize("name", [NAME, TABLE_NAME])
def test_it_is_the_definition(opened, name):
    found = opened[0].rows(name, 0, opened[0].tensors[name].shape[0])
    assert found.dtype == np.float32
    # Float32 sums of 33 products of numbers of size 1: measured at most 1.6e-6.
    np.testing.assert_allclose(found, expected(opened, name), rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", [NAME, TABLE_NAME])
@pytest.mark.parametrize("step", [1, 7, TILE - 1, TILE, TILE + 1, 199])
def test_a_row_is_the_same_bits_in_every_block(opened, name, step):
    count = opened[0].tensors[name].shape[0]
    whole = opened[0].rows(name, 0, count)
    parts = [opened[0].rows(name, at, min(at + step, count)) for at in range(0, count, step)]
    assert np.concatenate(parts).tobytes() == whole.tobytes()
    assert opened[0].raw_rows(name, 3, 9).tobytes() == whole[3:9].tobytes()


def test_other_tensors_are_the_checkpoint_s_own(opened):
    own = Checkpoint.open(opened[0].path)
    name = "model.layers.1.mlp.down_proj.weight"
    assert opened[0].tensors[name] == own.tensors[name]
    np.testing.assert_array_equal(opened[0].raw_rows(name, 0, 5), own.raw_rows(name, 0, 5))
    assert opened[0].tensors[NAME].dtype == "float32"
    assert opened[0].tensors[NAME].nbytes == 4 * 300 * 96


@pytest.fixture(scope="module")
def said():
    """Rank -> what processes of 1, 2 and 4 threads say of a product."""
    code = (
        "import numpy as np, hashlib\n"
        "from gemma_deploy.checkpoint.adapters.sums import multiplied, tile_rows\n"
        f"for rank in {RANKS}:\n"
        "    rng = np.random.default_rng(0); a = rng.standard_normal((rank, 2048), np.float32)\n"
        "    b = rng.standard_normal((tile_rows(2048), rank), np.float32)\n"
        "    print(hashlib.sha256(multiplied(b, a).tobytes()).hexdigest())"
    )
    found = []
    for threads in ("1", "2", "4"):
        variables = {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads, "PYTHONPATH": ":".join(sys.path)}
        done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
        found.append(done.stdout.split())
    return dict(zip(RANKS, zip(*found, strict=True), strict=True))


@pytest.mark.parametrize("rank", RANKS)
def test_threads_change_no_bit(rank, said):
    assert len(said[rank]) == 3
    assert len(set(said[rank])) == 1


def test_the_writer_s_blocks_are_tiles():
    """Else the products of a tile would be computed for each block of it."""
    from gemma_deploy.params.writer import BLOCK_BYTES

    assert all(max(1, BLOCK_BYTES // (4 * width)) == sums.tile_rows(width) for width in (640, 2048, 16384, 1 << 20))


def test_factors_in_memory_are_bounded(tmp_path):
    from tests.checkpoint.adapters.make import DOWN, Q, factors, model

    adapter = Adapter.open(write_adapter(tmp_path, factors()), model())
    q, down = adapter.updates.values()
    kept = FirstFactors(limit=q.a().nbytes)
    kept.of(q)
    np.testing.assert_array_equal(kept.of(down), factors()[f"{DOWN}.lora_A.weight"])
    np.testing.assert_array_equal(kept.of(q), factors()[f"{Q}.lora_A.weight"])
    assert len(kept._kept) == 1
    assert Sum(q.second, (Step(q, 1.0),), kept) == Sum(q.second, (Step(q, 1.0),), kept)


def test_nothing_is_added_twice_and_weights_scale(tmp_path):
    from gemma_deploy.checkpoint import AdapterRef

    raw = config(**WIDE)
    write_checkpoint(tmp_path / "base", raw, weights(raw))
    adapter = write_adapter(tmp_path / "a", pair(UP, (300, 96), r=4), r=4, lora_alpha=4)
    own = Checkpoint.open(tmp_path / "base").rows(NAME, 0, 300)
    once = Checkpoint.open(tmp_path / "base", adapter).rows(NAME, 0, 300) - own
    refs = [AdapterRef(adapter, 0.5), AdapterRef(adapter, 0.25)]
    both = Checkpoint.open(tmp_path / "base", refs).rows(NAME, 0, 300) - own
    np.testing.assert_allclose(both, 0.75 * once, atol=2e-6)
