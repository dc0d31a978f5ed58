"""Strict sessions compute the graph to the letter, fast ones do not: seen in the graphs that ORT really runs."""

import shutil
from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file

from gemma_deploy.backends.tvm_vacc.runner import StaticRunner
from gemma_deploy.backends.tvm_vacc.sessions import open_session
from gemma_deploy.errors import ArtifactError, DeployError
from gemma_deploy.graph.functions import quantized_linear_per_channel
from gemma_deploy.testing import TINY_CONFIGS

# seven linears in each of the tiny model's layers, and the LM head
LINEARS = {kind: 7 * config["num_hidden_layers"] + 1 for kind, config in TINY_CONFIGS.items()}
GRAPHS = ("iter0", "iter1")


def operators(path):
    return Counter(node.op_type for node in onnx.load(str(path), load_external_data=False).graph.node)


def what_ort_runs(artifact, graph, mode, tmp_path):
    open_session(artifact / f"{graph}.onnx", mode, 1, dump=tmp_path / "dump.onnx")
    return operators(tmp_path / "dump.onnx")


def ort_alone(path, dump=None):
    """What a user gets who opens the graph without gemma-deploy: every optimisation on."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    if dump:
        options.optimized_model_filepath = str(dump)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def prefill_feeds(rng, batch=2, length=32):
    positions = np.tile(np.arange(length), (batch, 1))
    ids = rng.integers(3, 500, (batch, length))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": positions}


@pytest.mark.parametrize("graph", GRAPHS)
def test_strict_int8_session_keeps_the_dequantized_matmuls(artifacts, model_type, graph, tmp_path):
    ops = what_ort_runs(artifacts(model_type, "w8a16"), graph, "strict", tmp_path)
    assert ops["DequantizeLinear"] == LINEARS[model_type]
    assert ops["FusedMatMul"] == LINEARS[model_type]
    rewritten = [op for op in ops if "NBits" in op or "Integer" in op or "QLinear" in op or op == "QuantizeLinear"]
    assert rewritten == []


@pytest.mark.parametrize("graph", [pytest.param("iter0", marks=pytest.mark.slow), "iter1"])
def test_ort_alone_rounds_activations_to_int8(artifacts, graph, tmp_path):
    ort_alone(artifacts("gemma3_text", "w8a16") / f"{graph}.onnx", tmp_path / "dump.onnx")
    ops = operators(tmp_path / "dump.onnx")
    assert ops["MatMulNBits"] == LINEARS["gemma3_text"]
    assert ops["DequantizeLinear"] == 0


@pytest.mark.parametrize("graph", GRAPHS)
def test_fast_session_runs_the_int8_kernel(artifacts, model_type, graph, tmp_path):
    ops = what_ort_runs(artifacts(model_type, "w8a16"), graph, "fast", tmp_path)
    assert ops["MatMulNBits"] == LINEARS[model_type]
    assert ops["DequantizeLinear"] == 0


def test_fast_session_gives_the_numbers_of_orts_own_rewriting(artifacts):
    path = artifacts("gemma3_text", "w8a16") / "iter0.onnx"
    feeds = prefill_feeds(np.random.default_rng(0))
    (expected,) = ort_alone(path).run(["logits"], feeds)
    (got,) = open_session(path, "fast", 1).run(["logits"], feeds)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("external", [True, False])
def test_scales_of_another_type_are_refused_by_a_sentence(artifacts, tmp_path, external):
    artifact = shutil.copytree(artifacts("gemma3_text", "w8a16"), tmp_path / "artifact")
    model = onnx.load(str(artifact / "iter0.onnx"), load_external_data=False)
    scale = next(node.input[2] for node in model.graph.node if node.op_type == "QuantizedLinearPerChannel")
    tensor = next(one for one in model.graph.initializer if one.name == scale)
    if not external:
        tensor.CopyFrom(helper.make_tensor(scale, TensorProto.STRING, tensor.dims, [b"1"] * tensor.dims[0]))
    tensor.data_type = TensorProto.STRING
    (artifact / "iter0.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match=r"iter0\.onnx"):
        open_session(artifact / "iter0.onnx", "fast", 1)


def test_sessions_of_an_artifact_share_weights_that_live_as_long_as_they(artifacts):
    import gc

    artifact, arrays = artifacts("gemma3_text", "w8a16"), {}
    first, second = (open_session(artifact / f"{graph}.onnx", "fast", 1, arrays=arrays) for graph in GRAPHS)
    assert len(arrays) == 2 * LINEARS["gemma3_text"]
    pointers = {array.ctypes.data for array in arrays.values()}
    feeds = prefill_feeds(np.random.default_rng(2))
    (expected,) = first.run(["logits"], feeds)
    # ORT has no hold of its own on memory that it was given: the session object must
    for session in (first, second):
        assert {value.data_ptr() for value in session.given} == pointers
    arrays.clear()
    del second
    gc.collect()
    assert {value.numpy().ctypes.data for value in first.given} == pointers
    np.testing.assert_array_equal(first.run(["logits"], feeds)[0], expected)


def test_strict_int8_linear_is_the_dequantized_product_and_fast_is_not(artifacts):
    artifact = artifacts("gemma3_text", "w8a16")
    params = load_file(str(artifact / "params.safetensors"))
    names = [f"model.layers.6.{name}" for name in ("input_layernorm.out", "self_attn.q_proj.out")]
    weight, scale = (params[f"model.layers.6.self_attn.q_proj.{part}"] for part in ("weight", "scale"))
    matrix = (weight.astype(np.float64) * scale[:, None]).T
    error = {}
    for mode in ("strict", "fast"):
        session = open_session(artifact / "iter0.onnx", mode, 1, outputs=names)
        x, y = session.run(names, prefill_feeds(np.random.default_rng(1)))
        expected = x.astype(np.float64) @ matrix
        error[mode] = np.abs(y - expected).max() / np.abs(expected).max()
    # Measured 2e-7 and 5e-3: float32 sums of 64 products against activations in 8 bits.
    assert error["strict"] < 1e-6
    assert 1e-3 < error["fast"] < 2e-2


@pytest.mark.parametrize("graph", GRAPHS)
def test_strict_float32_session_keeps_every_node(artifacts, graph, tmp_path):
    artifact = artifacts("gemma3_text", "fp32")
    written, run = operators(artifact / f"{graph}.onnx"), what_ort_runs(artifact, graph, "strict", tmp_path)
    products, rest = ("MatMul", "FusedMatMul"), ("MatMul", "FusedMatMul", "Transpose")
    assert sum(written[op] for op in products) == sum(run[op] for op in products)
    assert {op: n for op, n in written.items() if op not in rest} == {op: n for op, n in run.items() if op not in rest}


def half_graph(path):
    """x [2, 8] -> matmul, square, plus x-like constant, square root: each result representable only after rounding."""
    rng = np.random.default_rng(4)
    # multiples of 1/16 below 4: products and sums of eight are exact in float32, so no order of adding matters
    w = (rng.integers(-64, 64, (8, 4)) / 16).astype(np.float16)
    b = (rng.integers(1, 64, 4) / 16).astype(np.float16)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"]),
        helper.make_node("Mul", ["product", "product"], ["square"]),
        helper.make_node("Add", ["square", "b"], ["sum"]),
        helper.make_node("Sqrt", ["sum"], ["root"]),
        helper.make_node("Div", ["root", "b"], ["ratio"]),
        helper.make_node("Cast", ["ratio"], ["y"], to=TensorProto.FLOAT),
    ]
    half = TensorProto.FLOAT16
    graph = helper.make_graph(
        nodes,
        "half",
        [helper.make_tensor_value_info("x", half, [2, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 4])],
        [numpy_helper.from_array(w, "w"), numpy_helper.from_array(b, "b")],
        value_info=[
            helper.make_tensor_value_info(n, half, [2, 4]) for n in ("product", "square", "sum", "root", "ratio")
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), str(path))
    path.with_name("params.safetensors").touch()
    return (rng.integers(-64, 64, (2, 8)) / 16).astype(np.float16), w, b


def rounded(x, w, b):
    """The graph in NumPy, every operator's result rounded to float16."""
    in_float32 = lambda value: value.astype(np.float32)  # noqa: E731
    product = (in_float32(x) @ in_float32(w)).astype(np.float16)
    square = (in_float32(product) * in_float32(product)).astype(np.float16)
    total = (in_float32(square) + in_float32(b)).astype(np.float16)
    root = np.sqrt(in_float32(total)).astype(np.float16)
    return in_float32((in_float32(root) / in_float32(b)).astype(np.float16))


def test_strict_float16_session_rounds_after_every_operator(tmp_path):
    x, w, b = half_graph(tmp_path / "half.onnx")
    (got,) = open_session(tmp_path / "half.onnx", "strict", 1).run(None, {"x": x})
    np.testing.assert_array_equal(got, rounded(x, w, b))


def test_ort_alone_does_not_round_between_float16_operators(tmp_path):
    x, w, b = half_graph(tmp_path / "half.onnx")
    (got,) = ort_alone(tmp_path / "half.onnx").run(None, {"x": x})
    assert not np.array_equal(got, rounded(x, w, b))
    np.testing.assert_allclose(got, rounded(x, w, b), rtol=2e-2)  # some roundings of 2**-11 apart, and a square root


def test_strict_float16_artifact_has_a_cast_behind_every_rounding_operator(artifacts, tmp_path):
    open_session(artifacts("gemma3_text", "fp16") / "iter1.onnx", "strict", 1, dump=tmp_path / "dump.onnx")
    graph = onnx.load(str(tmp_path / "dump.onnx"), load_external_data=False).graph
    casts = [node for node in graph.node if node.op_type == "Cast" and node.name.endswith(".round")]
    exact = {node.input[0] for node in casts}
    linears = [node for node in graph.node if node.op_type == "FusedMatMul"]
    assert len(linears) == LINEARS["gemma3_text"]
    assert len([node for node in linears if node.output[0] not in exact]) == 1  # the LM head is float32
    assert not [node.name for node in graph.node if node.name.startswith("InsertedPrecisionFreeCast")]


def test_strict_sessions_refuse_subgraphs(tmp_path):
    half = helper.make_tensor_value_info("y", TensorProto.FLOAT16, [1])
    branch = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "branch", [], [half])
    graph = helper.make_graph(
        [helper.make_node("If", ["c"], ["y"], name="choice", then_branch=branch, else_branch=branch)],
        "if",
        [
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
            helper.make_tensor_value_info("x", TensorProto.FLOAT16, [1]),
        ],
        [half],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, str(tmp_path / "if.onnx"))
    (tmp_path / "params.safetensors").touch()
    with pytest.raises(DeployError, match=r"cannot run operators with subgraphs: choice \(If\)"):
        open_session(tmp_path / "if.onnx", "strict")


def test_linears_that_do_not_fit_the_kernels_blocks_are_left_to_ort(tmp_path):
    path = tmp_path / "odd.onnx"
    rng = np.random.default_rng(6)
    weights = rng.integers(-127, 128, (5, 48), np.int8), rng.random(5, np.float32)
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("QuantizedLinearPerChannel", ["x", "w", "s"], ["y"], domain="Vastai")],
        "odd",
        [info("x", TensorProto.FLOAT, [3, 48])],
        [info("y", TensorProto.FLOAT, [3, 5])],
        [numpy_helper.from_array(array, name) for array, name in zip(weights, "ws", strict=True)],
    )
    body = ir.to_proto(quantized_linear_per_channel(21))
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("Vastai", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, functions=[body], ir_version=10), str(path))
    path.with_name("params.safetensors").touch()
    session, x = open_session(path, "fast", 1), rng.standard_normal((3, 48), np.float32)
    assert session.given == []
    expected = x @ (weights[0] * weights[1][:, None]).T
    # ORT may round activations to int8 here as well: 5e-3 of the largest
    np.testing.assert_allclose(session.run(None, {"x": x})[0], expected, atol=1e-2 * np.abs(expected).max())


def test_inner_values_are_the_same_with_and_without_asking_for_them(artifacts):
    artifact = artifacts("gemma3_text", "fp16")
    runner, plain = (StaticRunner(artifact, "strict", 1, outputs=names) for names in (["model.layers.1.out"], []))
    logits = runner.prefill([[2, 5, 6], [2, 7]])
    np.testing.assert_array_equal(logits, plain.prefill([[2, 5, 6], [2, 7]]))
    assert runner.values["model.layers.1.out"].shape == (2, 32, 64)


@pytest.mark.parametrize(
    ("location", "offset", "words"),
    [
        ("../params.safetensors", None, "model.norm.weight: '../params.safetensors'"),
        ("/etc/passwd", None, "model.norm.weight: '/etc/passwd'"),
        ("iter0.onnx", None, "model.norm.weight: 'iter0.onnx'"),
        (None, str(2**50), f"model.norm.weight: bytes {2**50} to "),
    ],
)
def test_weights_that_lie_elsewhere_are_refused_before_they_are_read(artifacts, tmp_path, location, offset, words):
    whole = artifacts("gemma", "fp32")
    (tmp_path / "params.safetensors").symlink_to(whole / "params.safetensors")
    model = onnx.load(str(whole / "iter0.onnx"), load_external_data=False)
    (norm,) = (tensor for tensor in model.graph.initializer if tensor.name == "model.norm.weight")
    for entry in norm.external_data:
        changed = {"location": location, "offset": offset}.get(entry.key)
        entry.value = entry.value if changed is None else changed
    (tmp_path / "iter0.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match=r"1 weight\(s\) do not lie in the parameter file") as caught:
        open_session(tmp_path / "iter0.onnx")
    assert caught.value.problems[0].startswith(words)


def test_a_graph_of_another_model_is_no_graph_of_this_version(artifacts, tmp_path):
    (tmp_path / "params.safetensors").symlink_to(artifacts("gemma", "fp32") / "params.safetensors")
    node = onnx.helper.make_node("QuantizedLinearPerChannel", ["x"], ["y"])
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy")
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [x], [y]))
    (tmp_path / "iter0.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match=r"iter0\.onnx: is not a graph that this version makes"):
        open_session(tmp_path / "iter0.onnx")


def test_damaged_files_are_named(artifacts, tmp_path):
    whole = artifacts("gemma", "fp32")
    for name in ("iter0.onnx", "params.safetensors"):
        (tmp_path / name).write_bytes((whole / name).read_bytes())
    graph, params = tmp_path / "iter0.onnx", tmp_path / "params.safetensors"
    with pytest.raises(ArtifactError, match=r"makes no such value\n  - model.layers.99.out"):
        open_session(graph, outputs=["model.layers.99.out"])
    params.write_bytes(params.read_bytes()[:5000])
    with pytest.raises(ArtifactError, match=r"iter0.onnx: 31 weight\(s\) do not lie in the parameter file"):
        open_session(graph)
    params.unlink()
    with pytest.raises(ArtifactError, match=r"params.safetensors: is missing"):
        open_session(graph)
    params.touch()
    graph.write_bytes(b"\x08\x0a not a graph")
    with pytest.raises(ArtifactError, match=r"iter0.onnx: is not an ONNX graph"):
        open_session(graph)
    graph.unlink()
    with pytest.raises(ArtifactError, match=r"iter0.onnx: is missing"):
        open_session(graph)
