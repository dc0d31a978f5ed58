"""The gate on artifacts for ONNX Runtime: sound ones pass, wrong ones fail, and the report names the module."""

import json
import shutil

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import yaml

from gemma_deploy.artifact.manifest import KernelsRecord
from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.backends.onnxruntime.decoder import build_decoder
from gemma_deploy.backends.onnxruntime.options import Kernels
from gemma_deploy.backends.onnxruntime.source import DynamicSource, line_of_14_bits, whole_logits
from gemma_deploy.checkpoint import ModelConfig
from gemma_deploy.cli import main
from gemma_deploy.names import PARAMS
from gemma_deploy.parity.cases import Case
from gemma_deploy.proving import run_parity
from gemma_deploy.testing import write_tiny_checkpoint
from tests.calibration.make import write_tokenizer
from tests.parity.breaking import Graph, change_tensor

CHANGES = {
    "gemma": {"num_hidden_layers": 2},
    "gemma2": {"num_hidden_layers": 3},
    "gemma3_text": {"num_hidden_layers": 4, "sliding_window_pattern": 3},
}
WIDE = ("model.layers.1.mlp.down_proj", "model.layers.0.self_attn.o_proj")
LEAN = {"block": 128, "integer": False, "wide": []}
PARTS = "shipped = its parts after a prompt"
LISTED = "linears of 14-bit activations = those listed"


@pytest.fixture(scope="session")
def built(once):
    """(generation, dtype) -> an artifact that nothing has proven yet, its recipe beside it; read only.

    "lean" is int8 without integer products.
    """

    def get(kind, dtype):
        backend = {"dtype": "int8", "compile": {"prefill": "lean"}} if dtype == "lean" else {"dtype": dtype}

        def make(folder):
            checkpoint = write_tiny_checkpoint(folder / "checkpoint", kind, **CHANGES[kind])
            write_tokenizer(checkpoint)
            content = {
                "name": "x",
                "frontend": {"checkpoint": str(checkpoint), "shape": {"input_ids": [[64], [96]]}},
                "backend": {"type": "onnxruntime", **backend},
                "parity": {"prompt_tokens": 24, "decode_tokens": 4},
                "workspace": {"path": str(folder / "workspace")},
            }
            (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
            assert main(["compile", str(folder / "recipe.yaml"), "--no-parity"]) == 0

        return once(f"onnxruntime-{kind}-{dtype}", make) / "workspace" / "x"

    return get


@pytest.fixture
def copy_of(built, tmp_path):
    """(generation, dtype) -> a copy to break; with `wide` other linears than those have 8 bits, as in w8a8."""

    def copy(kind, dtype="int8", wide=None):
        artifact = shutil.copytree(built(kind, dtype), tmp_path / "copy")
        if wide is not None:
            change_manifest(artifact, kernels={"block": 128, "integer": True, "wide": list(wide)})
            rebuild(artifact, wide)
        return artifact

    return copy


def change_manifest(artifact, **changes):
    file = artifact / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def rebuild(artifact, wide):
    """The graph that a w8a8 artifact has, on codes that were rounded to nearest."""
    opened = Artifact.open(artifact)
    config = ModelConfig.from_dict(json.loads((artifact / "config.json").read_text()), "config.json")
    kernels = Kernels(integer=True, in_14_bits=frozenset(wide))
    ir.save(
        build_decoder(config, kernels, opened.manifest.params, location=PARAMS, embed_scale=8.0),
        artifact / "model.onnx",
    )


def gate(artifact, **options):
    manifest = Artifact.open(artifact).manifest
    checkpoint = manifest.recipe.frontend.checkpoint
    return run_parity(artifact, checkpoint, manifest=manifest, prompt_tokens=24, decode_tokens=4, **options)


def failed(result):
    return {line.comparison for line in result.lines if not line.passed}


def assert_named(result, module, phase, same_weights):
    """The exact arithmetic left the reference with its weights, and the search says where."""
    assert f"{same_weights} = strict" in failed(result)
    found = result.divergence
    assert (found["module"], found["phase"]) == (module, phase), found["text"]
    assert found["error"] > found["tolerance"]
    assert f"first differs in {module} ({phase})" in result.summary
    assert (found["reference"], found["test"]) == (same_weights, "strict")


@pytest.mark.parametrize(
    ("kind", "dtype", "wide"),
    [
        ("gemma2", "fp32", None),
        ("gemma3_text", "int8", WIDE),
        ("gemma2", "int8", None),
        ("gemma", "lean", None),
        pytest.param("gemma3_text", "fp32", None, marks=pytest.mark.slow),
        pytest.param("gemma2", "int8", WIDE, marks=pytest.mark.slow),
        pytest.param("gemma", "int8", (), marks=pytest.mark.slow),
    ],
)
def test_sound_artifacts_pass(copy_of, kind, dtype, wide):
    result = gate(copy_of(kind, dtype, wide))
    assert result.passed, result.summary
    assert result.divergence is None
    values = {(line.comparison, line.name): line.value for line in result.lines}
    same_weights = "patched" if dtype == "fp32" else "patched w8a16"
    assert 0 < values[f"{same_weights} = strict", "relative error"] < 3e-6  # a tenth of it is seen
    assert values[PARTS, "relative error"] <= 1e-5
    assert ((LISTED, "others") in values) == (dtype != "fp32")
    compared = {(row["reference"], row["test"], row["phase"]) for row in result.measures}
    assert {("hf", test, phase) for test in ("strict", "shipped") for phase in ("prefill", "decode")} <= compared
    if kind != "gemma":
        assert any("longer than the sliding window (8)" in note for note in result.notes)


def flipped(artifact, name):
    def change(codes):
        codes[3, 5] ^= 0x40
        return codes

    change_tensor(artifact, name, change)


def test_one_code_is_no_longer_what_was_written(copy_of, capsys):
    """The reference has the artifact's own codes, so one of them is a matter of the hashes."""
    artifact, name = copy_of("gemma2"), "model.layers.1.mlp.up_proj.weight"
    flipped(artifact, name)
    for command in ("verify", "parity"):
        assert main([command, str(artifact)]) == 1
        assert name in capsys.readouterr().err


OTHERWISE = {
    "unsigned": lambda codes: (codes.view(np.uint8) ^ 0x80).view(codes.dtype),
    "[out, in]": lambda codes: np.ascontiguousarray(codes.T),  # which a square matrix hides
}


@pytest.mark.parametrize(("dtype", "how"), [("lean", "unsigned"), ("int8", "unsigned"), ("int8", "[out, in]")])
def test_codes_in_the_other_convention(copy_of, dtype, how):
    """Unsigned where signed ones are meant or the other way round: consistent in itself, and no Gemma any more."""
    artifact = copy_of("gemma2", dtype)
    change_tensor(artifact, "model.layers.1.self_attn.v_proj.weight", OTHERWISE[how])
    assert {"hf = strict", "hf = shipped"} <= failed(gate(artifact))


def test_one_number_of_float32(copy_of):
    artifact = copy_of("gemma2", "fp32")

    def change(weight):
        weight[3, 5] += 0.25
        return weight

    change_tensor(artifact, "model.layers.1.mlp.up_proj.weight", change)
    result = gate(artifact)
    assert_named(result, "model.layers.1.mlp.up_proj", "prefill", "patched")
    assert {"patched = strict", "hf = strict", "hf = shipped"} <= failed(result)


def test_a_norm_without_its_one_plus(copy_of):
    artifact = copy_of("gemma3_text", "fp32")
    change_tensor(artifact, "model.layers.2.self_attn.k_norm.weight", lambda weight: weight - 1)
    assert_named(gate(artifact), "model.layers.2.self_attn.k_norm", "prefill", "patched")


def attention(graph, layer):
    return [node for node in graph.graph.node if node.op_type == "GroupQueryAttention"][layer]


def attribute(node, name):
    return next(each for each in node.attribute if each.name == name)


@pytest.mark.parametrize("change", [1, -1])
@pytest.mark.parametrize(("kind", "dtype", "layer"), [("gemma2", "fp32", 2), ("gemma3_text", "int8", 1)])
def test_a_window_wider_or_narrower_by_one(copy_of, kind, dtype, layer, change):
    artifact = copy_of(kind, dtype)
    with Graph(artifact, "model") as graph:
        attribute(attention(graph, layer), "local_window_size").i += change
    result = gate(artifact)
    same_weights = "patched" if dtype == "fp32" else "patched w8a16"
    # No value between the projections has a name; the first that has one is made of what attention gives.
    assert_named(result, f"model.layers.{layer}.self_attn.o_proj", "prefill", same_weights)


@pytest.mark.parametrize("name", ["softcap", "scale"])
def test_attention_without_its_cap_or_with_another_scale(copy_of, name):
    artifact = copy_of("gemma2", "fp32")
    with Graph(artifact, "model") as graph:
        node = attention(graph, 1)
        if name == "softcap":
            node.attribute.remove(attribute(node, "softcap"))
        else:
            attribute(node, "scale").f *= 1.01
    assert_named(gate(artifact), "model.layers.1.self_attn.o_proj", "prefill", "patched")


def test_logits_without_their_cap(copy_of):
    artifact = copy_of("gemma2", "fp32")
    with Graph(artifact, "model") as graph:
        (tanh,) = (node for node in graph.graph.node if node.op_type == "Tanh")
        tanh.op_type = "Identity"
    result = gate(artifact)
    assert {"patched = strict", "hf = strict", "hf = shipped"} <= failed(result)


def test_layers_in_the_wrong_order(copy_of):
    """Layer 0 global and layer 1 sliding: what onnxruntime-genai's builder makes of a Gemma 2."""
    artifact = copy_of("gemma2", "fp32")
    with Graph(artifact, "model") as graph:
        sliding, whole = attention(graph, 0), attention(graph, 1)
        window = attribute(sliding, "local_window_size")
        whole.attribute.append(onnx.helper.make_attribute("local_window_size", window.i))
        sliding.attribute.remove(window)
    assert_named(gate(artifact), "model.layers.0.self_attn.o_proj", "prefill", "patched")


def test_one_rotary_base_for_all_layers(copy_of):
    artifact = copy_of("gemma3_text", "fp32")
    with Graph(artifact, "model") as graph:
        node = attention(graph, 2)
        node.input[:] = [name.replace("rotary.full_attention", "rotary.sliding_attention") for name in node.input]
    assert_named(gate(artifact), "model.layers.2.self_attn.o_proj", "prefill", "patched")


def test_the_norms_of_two_layers_exchanged(copy_of):
    artifact = copy_of("gemma3_text", "int8")
    with Graph(artifact, "model") as graph:
        for node in graph.graph.node:
            node.input[:] = [
                name.replace("layers.1.input", "layers.x.input").replace("layers.2.input", "layers.1.input")
                .replace("layers.x.input", "layers.2.input") if node.op_type == "RMSNormalization" else name
                for name in node.input
            ]  # fmt: skip
    assert_named(gate(artifact), "model.layers.1.input_layernorm", "prefill", "patched w8a16")


@pytest.mark.parametrize(
    ("kind", "dtype"), [("gemma2", "lean"), pytest.param("gemma3_text", "int8", marks=pytest.mark.slow)]
)
def test_the_choice_of_the_last_token(copy_of, kind, dtype):
    """Every position's own logits are right, and the one before the last is taken."""
    artifact = copy_of(kind, dtype)
    with Graph(artifact, "model") as graph:
        node = next(node for node in graph.graph.node if node.output[0] == "last")
        graph.replace_constant(node, 1, lambda one: one + 1)
    assert failed(gate(artifact)) == {PARTS}


@pytest.mark.parametrize("wrong", ["narrow", "unlisted", "lean", "nothing"])
def test_which_linears_have_14_bits(copy_of, wrong):
    artifact = copy_of("gemma3_text", wide=WIDE)
    if wrong == "narrow":
        rebuild(artifact, WIDE[1:])
    elif wrong == "unlisted":
        rebuild(artifact, [*WIDE, "model.layers.3.self_attn.o_proj"])
    elif wrong == "lean":
        change_manifest(artifact, kernels=LEAN)
    kernels = Artifact.open(artifact).manifest.kernels
    line = line_of_14_bits(artifact, kernels)
    assert (line.comparison, line.passed) == (LISTED, wrong == "nothing")
    assert line.value == {"narrow": 1, "unlisted": 1, "lean": 3, "nothing": 0}[wrong]


def kernels_of(**changes):
    return KernelsRecord(**LEAN | {"wide": ()} | changes)


def test_blocks_that_are_listed_as_integer_products(copy_of):
    artifact = copy_of("gemma", "lean")
    assert line_of_14_bits(artifact, kernels_of()).passed
    assert line_of_14_bits(artifact, kernels_of(integer=True)).value == 1
    assert line_of_14_bits(artifact, kernels_of(integer=True, wide=tuple(WIDE))).value == 3


def test_by_default_every_linear_has_14_bits(built):
    artifact = built("gemma3_text", "int8")
    kernels = Artifact.open(artifact).manifest.kernels
    assert len(kernels.wide) == 7 * 4
    assert line_of_14_bits(artifact, kernels).passed
    fewer = [name for name in kernels.wide if not name.endswith("3.mlp.down_proj")]
    assert line_of_14_bits(artifact, kernels.model_copy(update={"wide": tuple(fewer)})).value == 1


def test_a_linear_made_narrow_turns_the_gate_red(copy_of):
    artifact = copy_of("gemma3_text", wide=WIDE)
    rebuild(artifact, WIDE[1:])
    assert failed(gate(artifact)) == {LISTED}


def test_wrong_rounding_is_seen_with_the_shipped_kernels_alone(copy_of):
    """Exact arithmetic rounds nothing, so the comparison of the kernels with the model is what sees it."""
    artifact = copy_of("gemma3_text", wide=WIDE)
    with Graph(artifact, "model") as graph:
        step = next(each for each in graph.graph.initializer if each.name.startswith("float32.0.00787"))
        step.CopyFrom(onnx.numpy_helper.from_array(np.float32(1 / 1024), step.name))  # all but small values clip
    result = gate(artifact)
    assert failed(result) == {"hf = shipped"}
    rows = [row for row in result.measures if (row["reference"], row["test"]) == ("strict", "shipped")]
    assert {row["phase"]: row["kl_mean"] > 0.02 for row in rows if row["case"] == "text"}["prefill"]


def test_the_parity_command_fails_on_a_broken_artifact(copy_of, capsys):
    artifact = copy_of("gemma2", "fp32")
    with Graph(artifact, "model") as graph:
        attribute(attention(graph, 0), "local_window_size").i += 1
    assert main(["parity", str(artifact)]) == 1
    assert "strict first differs in model.layers.0.self_attn.o_proj (prefill)" in capsys.readouterr().out


# The source itself


def test_a_source_gives_the_same_token_by_token_and_together(built):
    """Forced tokens go one by one through the shipped kernels, together through the exact ones."""
    case = Case("random", ((2, *range(30, 52)),), (tuple(range(60, 66)),))
    artifact = built("gemma3_text", "int8")
    (exact,), (kernels,) = (DynamicSource(artifact, which).run([case])[0] for which in ("strict", "shipped"))
    assert exact.shape == kernels.shape == (29, 64)
    whole = Case("random", (case.sequence(0),), ((),))
    (together,) = DynamicSource(artifact, "strict").run([whole])[0]
    np.testing.assert_allclose(exact, together, rtol=0, atol=1e-5 * np.abs(together).max())
    assert 1e-4 < np.abs(kernels - exact).max() / np.abs(exact).max() < 0.1


def test_whole_logits_are_those_of_the_last_token(built):
    artifact, prompt = built("gemma2", "fp32"), (2, *range(30, 52))
    source = DynamicSource(artifact, "shipped")
    (hidden,) = source.run([Case("random", (prompt,), ((),))])[0]
    np.testing.assert_allclose(whole_logits(artifact, prompt), source.head(hidden[-1:]), rtol=0, atol=1e-5)


def test_watched_values_are_of_the_prompt_and_then_of_the_steps(built):
    """And those of codes that lie otherwise and go through another kernel, where arithmetic is exact."""
    name, case = "model.layers.1.mlp.gate_proj.out", Case("random", ((2, *range(30, 52)),), ((60, 61),))
    found = []
    for dtype in ("int8", "lean"):
        source = DynamicSource(built("gemma3_text", dtype), "strict", watched=[name])
        source.run([case])
        assert [len(piece) for piece in source.values[name]] == [23, 2]
        found.append(np.concatenate(source.values[name]))
    np.testing.assert_allclose(*found, rtol=0, atol=1e-5 * np.abs(found[0]).max())
