"""The artifact's weights against the checkpoint's: red for faults that an artifact shares with its own reference."""

import json
import shutil

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.artifact.weights import ArtifactWeights
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.cli import main
from gemma_deploy.parity.gates import STORED_WEIGHTS
from gemma_deploy.parity.weights import LIMITS, weights_line
from gemma_deploy.schemes import QUANTIZERS
from gemma_deploy.testing import write_tiny_checkpoint
from tests.calibration.make import write_tokenizer
from tests.parity.breaking import change_tensor
from tests.parity.conftest import gate

LAYERS = {"gemma": 2, "gemma2": 2, "gemma3_text": 3}
HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def compiled(once):
    """(generation, quantize section, tied) -> an artifact for ONNX Runtime, without its gate; read only."""

    def get(model_type, quantize, tied=True):
        def make(root):
            changes = {"sliding_window_pattern": 3} if model_type == "gemma3_text" else {}
            layers = LAYERS[model_type]
            path = write_tiny_checkpoint(
                root / "checkpoint", model_type, num_hidden_layers=layers, tie_word_embeddings=tied, **changes
            )
            write_tokenizer(path)
            content = {
                "name": "x",
                "frontend": {
                    "checkpoint": str(path),
                    "shape": {"input_ids": [[32], [48]]},
                    "quantize": {"calib_args": {"sensitivity": False}, **quantize},
                },
                "dataset": {"name": "c4:4", "seqlen": 64},
                "backend": {"type": "onnxruntime", "dtype": "int8"},
                "parity": {"prompt_tokens": 32, "decode_tokens": 4},
                "workspace": {"path": str(root)},
            }
            (root / "r.yaml").write_text(yaml.safe_dump(content))
            assert main(["compile", str(root / "r.yaml"), "--no-parity"]) == 0

        name = "-".join([model_type, *map(str, quantize.values()), "tied" if tied else "untied"])
        return once(f"weights-{name}", make) / "x"

    return get


def line_of(artifact, checkpoint=None):
    manifest = Artifact.open(artifact).manifest
    opened = Checkpoint.open(checkpoint or manifest.recipe.frontend.checkpoint)
    stored = ArtifactWeights(opened.config, artifact, manifest)
    return weights_line(opened, stored, folded=manifest.scheme in QUANTIZERS, embed_scale="exact")


SLOW = [
    ("gemma", {"type": "w8a16"}, "int8", False),
    ("gemma2", {"type": "w8a16_gptq", "table": "int8"}, "int8", True),
    ("gemma3_text", {"type": "w4a16_gptq", "table": "int8"}, "int4", False),
    ("gemma2", {"type": "w8a8", "table": "fp16"}, "int8", False),
    ("gemma", {"type": "w8a8", "table": "int8"}, "int8", True),
    ("gemma", {"type": "w4a16"}, "int4", True),
]


@pytest.mark.parametrize(
    ("model_type", "quantize", "dtype", "tied"),
    [
        ("gemma3_text", {"type": "w8a16_gptq", "table": "int8"}, "int8", False),
        ("gemma3_text", {"type": "w8a16_gptq"}, "int8", True),
        ("gemma3_text", {"type": "w4a16_gptq"}, "int4", True),
        *(pytest.param(*row, marks=pytest.mark.slow) for row in SLOW),
    ],
)
def test_what_is_right_stays_far_below_its_limit(compiled, model_type, quantize, dtype, tied):
    line = line_of(compiled(model_type, quantize, tied))
    assert line.passed
    assert 0 < line.value < 0.5 * LIMITS[dtype]
    assert dtype in line.name


@pytest.mark.parametrize(("kind", "scheme"), [("gemma2", "fp32"), ("gemma3_text", "bf16"), ("gemma3_text", "fp16")])
def test_floats_are_what_they_were(finished, kind, scheme):
    line = line_of(finished(kind, scheme))
    assert line.passed
    assert line.value <= (1e-8 if scheme == "fp16" else 0)  # float16: what is below its smallest normal number


def swap(artifact, first, second, parts):
    """Exchange two tensors of one shape in the parameter file."""
    stored = load_file(artifact / "params.safetensors")
    for part in parts:
        for one, other in ((first, second), (second, first)):
            change_tensor(artifact, f"{one}.{part}", lambda _, name=f"{other}.{part}": stored[name])


@pytest.mark.parametrize(
    ("scheme", "module"),
    [
        ("w8a16_gptq", "mlp.gate_proj"),
        ("w4a16_gptq", "mlp.down_proj"),
        pytest.param("w8a16_gptq", "self_attn.o_proj", marks=pytest.mark.slow),
        pytest.param("w4a16_gptq", "self_attn.q_proj", marks=pytest.mark.slow),
    ],
)
def test_two_tensors_that_changed_places_are_seen_although_the_artifact_repeats_its_reference(
    compiled, tmp_path, scheme, module
):
    artifact = shutil.copytree(compiled("gemma3_text", {"type": scheme}), tmp_path / "copy")
    swap(artifact, f"model.layers.0.{module}", f"model.layers.1.{module}", ("weight", "scale"))
    lines = {line.comparison: line for line in gate(artifact).lines}
    assert lines[f"patched {scheme} = strict"].passed  # both read the same wrong weights
    assert not lines[STORED_WEIGHTS].passed
    assert module in lines[STORED_WEIGHTS].name
    assert 1 < lines[STORED_WEIGHTS].value < 2


def test_a_head_that_was_not_multiplied_by_what_its_norm_was_divided_by(compiled, tmp_path):
    artifact = shutil.copytree(
        compiled("gemma3_text", {"type": "w8a16_gptq", "table": "int8"}, False), tmp_path / "copy"
    )
    factors = np.random.default_rng(0).uniform(0.8, 1.4, 64).astype(np.float32)
    change_tensor(artifact, "model.norm.weight", lambda weight: (1 + weight) / factors - 1)
    line = line_of(artifact)
    assert not line.passed
    assert f"LM head, {HEAD}" in line.name


@pytest.mark.parametrize("norm", ["input_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"])
def test_a_norm_that_changed(compiled, tmp_path, norm):
    artifact = shutil.copytree(compiled("gemma3_text", {"type": "w8a16_gptq"}), tmp_path / "copy")
    change_tensor(artifact, f"model.layers.1.{norm}.weight", lambda weight: weight + 0.1)
    line = line_of(artifact)
    assert not line.passed
    assert "model.layers.1." in line.name


@pytest.mark.parametrize("scheme", ["fp32", "fp16", "bf16"])
def test_one_number_of_a_float_tensor(copy_of, scheme):
    artifact = copy_of("gemma3_text", scheme)

    def changed(weight):
        if weight.dtype == np.uint16:
            weight[1, 2] ^= np.uint16(0x4000)
        else:
            weight[1, 2] += 1
        return weight

    change_tensor(artifact, "model.layers.2.mlp.up_proj.weight", changed)
    line = line_of(artifact)
    assert not line.passed
    assert "model.layers.2.mlp.up_proj.weight" in line.name


def test_a_weight_that_is_no_number_is_the_worst(copy_of):
    artifact = copy_of("gemma3_text")

    def change(weight):
        weight[0, 0] = np.nan
        return weight

    change_tensor(artifact, "model.layers.1.self_attn.v_proj.weight", change)
    line = line_of(artifact)
    assert not line.passed
    assert "model.layers.1.self_attn.v_proj.weight" in line.name
    assert json.dumps(line.to_json(), allow_nan=False)


def test_the_checkpoint_of_another_seed(finished, tmp_path):
    line = line_of(finished("gemma"), write_tiny_checkpoint(tmp_path / "other", "gemma", seed=1))
    assert not line.passed
    assert line.value > 0.3
