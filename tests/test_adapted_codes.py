"""`calibrate` and GPTQ with an adapter see the merged model: codes are those of the checkpoint that `merge` wrote."""

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from gemma_deploy.cli import main
from gemma_deploy.testing import write_tiny_checkpoint
from tests.calibration.make import write_tokenizer
from tests.checkpoint.adapters.make import PREFIX, TABLE, pair, write_adapter

SHAPES = {
    "model.layers.0.self_attn.v_proj": (64, 64),
    "model.layers.0.mlp.down_proj": (64, 160),
    "model.layers.1.self_attn.q_proj": (128, 64),
    "model.layers.1.mlp.gate_proj": (160, 64),
}


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A tiny Gemma 2 in bfloat16 with a tokenizer, an adapter of linears and table, and what `merge` makes of them."""
    monkeypatch.chdir(tmp_path)
    write_tokenizer(write_tiny_checkpoint(tmp_path / "base", "gemma2", num_hidden_layers=2))
    rng = np.random.default_rng(7)
    tensors = {
        f"{TABLE}.lora_embedding_A": 0.05 * rng.standard_normal((4, 512)).astype(np.float32),
        f"{TABLE}.lora_embedding_B": rng.standard_normal((64, 4)).astype(np.float32),
    }
    for seed, (name, shape) in enumerate(SHAPES.items()):
        tensors |= pair(PREFIX + name, shape, seed=seed)
    tensors = {name: one * (0.1 if "lora_B" in name else 1) for name, one in tensors.items()}
    write_adapter(tmp_path / "a", tensors, base_model_name_or_path="base")
    assert main(["merge", "base", "a", "merged", "--dtype", "fp32"]) == 0
    return tmp_path


def compiled(name, scheme, checkpoint, adapter=None):
    """The parameters of an artifact, and of what order they are."""
    content = {
        "name": name,
        "frontend": {
            "checkpoint": checkpoint,
            "adapter": adapter,
            "shape": {"input_ids": [[32], [48]]},
            "quantize": {"type": scheme},
        },
        "dataset": {"name": "c4:4", "seqlen": 64},
        "backend": {"dtype": "int8"},
        "workspace": {"path": "w"},
    }
    with open("r.yaml", "w") as file:
        yaml.safe_dump(content, file)
    assert main(["compile", "r.yaml", "--no-parity"]) == 0
    return load_file(f"w/{name}/params.safetensors")


@pytest.mark.slow
def test_ranges_are_those_of_the_merged_checkpoint(world):
    def measured(place, *words):
        made = main(["calibrate", "--dataset", "c4", "--nsamples", "2", "--seqlen", "64", "--workspace", place, *words])
        assert made == 0
        (file,) = (world / place).glob("calib/*/stats.safetensors")
        return load_file(file)

    adapted = measured("w1", "--checkpoint", "base", "--adapter", "a")
    merged, own = measured("w2", "--checkpoint", "merged"), measured("w3", "--checkpoint", "base")
    assert adapted.keys() == merged.keys() == own.keys()
    differing = 0
    for name, values in merged.items():
        np.testing.assert_array_equal(adapted[name], values, err_msg=name)
        differing += not np.array_equal(own[name], values)
    assert differing == len(merged)  # the table is another one too


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["w4a16_gptq", "w8a8", "w8a16_gptq+kv8"])
def test_codes_are_those_of_the_merged_checkpoint(world, scheme):
    adapted = compiled("adapted", scheme, "base", "a")
    merged = compiled("merged", scheme, "merged")
    own = compiled("own", scheme, "base")
    assert adapted.keys() == merged.keys()
    for name, tensor in merged.items():
        np.testing.assert_array_equal(adapted[name], tensor, err_msg=name)
    # Not only where the adapter is: what follows is calibrated on other activations.
    for name in ("model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        assert own[name].dtype == (np.uint8 if "w4" in scheme else np.int8)
        assert not np.array_equal(own[name], merged[name]), name
