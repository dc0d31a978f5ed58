"""Experts against NumPy in float64 and transformers: right, and no expert is read that no token chose."""

import numpy as np
import onnx_ir as ir
import pytest

from gemma_deploy.backends.onnxruntime.exact import exact
from gemma_deploy.backends.onnxruntime.experts import ExpertParts, expert_modules
from gemma_deploy.backends.onnxruntime.options import Kernels
from gemma_deploy.backends.onnxruntime.parts import IR_VERSION, OPSET
from gemma_deploy.checkpoint import ModelConfig
from gemma_deploy.names import EMBEDDING_WEIGHT, MICROSOFT
from gemma_deploy.testing import TINY_CONFIGS, TINY_EXPERTS
from tests.backends.make import FILE, ParamFile, off, open_session

RAW = {**TINY_CONFIGS["gemma4_text"], **TINY_EXPERTS}
CONFIG = ModelConfig.from_dict(RAW, "config.json")
LAYER = CONFIG.layers[0]
PATH, EXPERTS, HIDDEN, MATRICES = LAYER.prefix, LAYER.experts, LAYER.hidden_size, expert_modules(LAYER)
FORMS = {"fp32": None, "int8": (8, None), "int8 in groups": (8, 16), "int4 in groups": (4, 16), "int4": (4, None)}
EXACT = 1e-6  # measured 4e-7: float32 against float64
ROUNDED = 2e-3  # measured 6e-4: activations of 14 bits


class Stack:
    """A layer's tensors in a file, and what they stand for."""

    def __init__(self, folder, form):
        rng, self.file, self.of = np.random.default_rng(3), ParamFile(folder), {}
        self.file.wide.append((EMBEDDING_WEIGHT, np.zeros((2, HIDDEN), np.float32)))
        for name, shape in LAYER.tensors().items():
            if "router" in name or "experts" in name or name.removesuffix(".weight") in EXPERTS.norms:
                self.add(name, (rng.standard_normal(shape) * (1 if len(shape) == 1 else 0.3)).astype(np.float32), form)
        self.rows = self.file.write()

    def add(self, name, values, form):
        whole = f"{PATH}{name}"
        self.of[name] = values
        if values.ndim < 3 or form is None:
            self.file.wide.append((whole, values))
            return
        bits, group = form
        most = 2 ** (bits - 1) - 1
        grouped = values.reshape(*values.shape[:2], -1, group or values.shape[2])
        scales = (np.abs(grouped).max(3) / most).astype(np.float32)
        codes = np.rint(grouped / scales[..., None]).astype(np.int8)
        self.of[name] = (codes * scales[..., None]).reshape(values.shape)
        lying = np.ascontiguousarray(codes.reshape(values.shape).transpose(0, 2, 1))  # [experts, in, out]
        self.file.wide.append((f"{whole}.scale", np.ascontiguousarray(
            scales.transpose(0, 2, 1)) if group else scales[..., 0]))  # fmt: skip
        self.file.codes.append((whole, lying, "int8" if bits == 8 else "uint4"))

    def model(self, in_14_bits=MATRICES):
        """dense, residual -> out."""
        parts = ExpertParts(CONFIG, Kernels(in_14_bits=in_14_bits), self.rows, location=FILE, embed_scale=1.0)
        given = [ir.Value(name=name, shape=ir.Shape(("b", "s", HIDDEN)), type=ir.TensorType(ir.DataType.FLOAT))
                 for name in ("dense", "residual")]  # fmt: skip
        out = parts._beside_experts(LAYER, dense=given[0], residual=given[1])
        out.type = ir.TensorType(ir.DataType.FLOAT)
        nodes = parts.nodes
        graph = ir.Graph(given, [out], nodes=nodes.nodes, initializers=list(nodes.initializers.values()),
                         opset_imports={"": OPSET, MICROSOFT: 1}, name="experts")  # fmt: skip
        return ir.Model(graph, ir_version=IR_VERSION)

    def session(self, model=None):
        return open_session(model or self.model(), self.file.folder)


def rms(x, weight=1.0):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG.rms_norm_eps) * weight


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def router(of, r):
    """Experts [.., k] and their shares."""
    scores = rms(r) * of["router.scale"] * HIDDEN**-0.5 @ of["router.proj.weight"].T.astype(np.float64)
    likely = np.exp(scores - scores.max(-1, keepdims=True))
    likely /= likely.sum(-1, keepdims=True)
    chosen = np.argsort(-likely, axis=-1)[..., : EXPERTS.chosen]
    shares = np.take_along_axis(likely, chosen, -1)
    return chosen, shares / shares.sum(-1, keepdims=True) * of["router.per_expert_scale"][chosen]


def expected(of, dense, r, rounded=0):
    """The formula of transformers' Gemma4TextDecoderLayer, in float64; what `rounded` matrices read has 8 bits."""
    dense, r, of = dense.astype(np.float64), r.astype(np.float64), {k: v.astype(np.float64) for k, v in of.items()}
    chosen, shares = router(of, r)
    x = rms(r, of[f"{EXPERTS.norm}.weight"])
    first, second = (rounded_to_8_bits if rounded > number else np.asarray for number in range(2))
    x, made = first(x), np.zeros_like(r)
    for place in np.ndindex(chosen.shape):
        expert, at = chosen[place], place[:-1]
        gate, up = np.split(of[EXPERTS.gate_up][expert] @ x[at], 2)
        made[at] += shares[place] * (of[EXPERTS.down][expert] @ second(gelu(gate) * up))
    return rms(dense, of[f"{EXPERTS.dense_post_norm}.weight"]) + rms(made, of[f"{EXPERTS.post_norm}.weight"])


@pytest.fixture(scope="module")
def stacks(tmp_path_factory):
    known = {}

    def get(form):
        if form not in known:
            known[form] = Stack(tmp_path_factory.mktemp("experts"), FORMS[form])
        return known[form]

    return get


def inputs(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal((*shape, HIDDEN)).astype(np.float32) * 2 for name in ("dense", "residual")}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 23), (2, 5)])
def test_experts_are_the_formula(stacks, form, shape):
    stack, given = stacks(form), inputs(*shape)
    right = expected(stack.of, given["dense"], given["residual"])
    (made,) = stack.session().run(None, given)
    assert off(made, right) < (EXACT if form == "fp32" else ROUNDED)
    model = stack.model()
    exact(model)
    (made,) = stack.session(model).run(None, given)
    assert off(made, right) < EXACT


def rounded_to_8_bits(x):
    """Each token's channels as codes times its largest magnitude / 127."""
    scale = np.abs(x).max(-1, keepdims=True) / 127
    return np.rint(x / scale) * scale


@pytest.mark.parametrize("form", ["int8", "int4 in groups"])
@pytest.mark.parametrize("wide", [(), MATRICES[1:]])
def test_activations_of_8_bits_where_nothing_asks_for_14(stacks, form, wide):
    """Of both matrices, or of the first alone, as w8a8 has it; its own formula, and none once it is exact."""
    stack, given = stacks(form), inputs(2, 9, seed=6)
    right = expected(stack.of, given["dense"], given["residual"], rounded=2 - len(wide))
    unrounded = expected(stack.of, given["dense"], given["residual"])
    model = stack.model(wide)
    (made,) = stack.session(model).run(None, given)
    assert off(made, right) < ROUNDED < off(made, unrounded)
    exact(model)
    (made,) = stack.session(model).run(None, given)
    assert off(made, unrounded) < EXACT


def test_experts_are_those_of_transformers(stacks):
    """Its own router and experts, of 40 tokens, several of which chose the same experts."""
    import torch
    from transformers import Gemma4TextConfig
    from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm, Gemma4TextExperts, Gemma4TextRouter

    stack, given = stacks("fp32"), inputs(1, 40, seed=1)
    config = Gemma4TextConfig(**{**RAW, "attn_implementation": "eager", "experts_implementation": "eager"})
    tensors = {name: torch.from_numpy(values) for name, values in stack.of.items()}

    def module(kind, name, *args):
        made = kind(*args)
        kept = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        made.load_state_dict(kept)
        return made

    router, experts = module(Gemma4TextRouter, "router", config), module(Gemma4TextExperts, "experts", config)
    norms = {name: module(Gemma4RMSNorm, name, HIDDEN, CONFIG.rms_norm_eps) for name in EXPERTS.norms}
    dense, r = (torch.from_numpy(given[name]) for name in ("dense", "residual"))
    with torch.no_grad():
        _, shares, chosen = router(r[0])
        made = experts(norms[EXPERTS.norm](r[0]), chosen, shares)[None]
        right = norms[EXPERTS.dense_post_norm](dense) + norms[EXPERTS.post_norm](made)
    assert off(stack.session().run(None, given)[0], right.numpy()) < EXACT


def unreached(stack, given):
    """Experts that no token chose."""
    chosen, _ = router(stack.of, given["residual"].astype(np.float64))
    return sorted(set(range(EXPERTS.count)) - set(chosen.ravel().tolist()))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [1, 2])
def test_experts_that_no_token_chose_are_not_read(tmp_path, form, tokens):
    """Numbers that would spoil everything stand in their place: NaN, or codes that are another sum."""
    stack, given = Stack(tmp_path, FORMS[form]), inputs(1, tokens)
    (right,) = stack.session().run(None, given)
    left = unreached(stack, given)
    assert len(left) >= EXPERTS.count - tokens * EXPERTS.chosen > 0
    poison(stack, left)
    np.testing.assert_array_equal(stack.session().run(None, given)[0], right)
    others = [expert for expert in range(EXPERTS.count) if expert not in left]
    poison(stack, others[:1])
    assert not np.isfinite(stack.session().run(None, given)[0]).all()


def poison(stack, experts):
    """NaN for the matrices of some experts, or for their scales."""
    rows = {row.name: row for row in stack.rows}
    with (stack.file.folder / FILE).open("r+b") as file:
        for module in MATRICES:
            row = rows.get(f"{module}.scale", rows[module])
            size = row.nbytes // EXPERTS.count
            for expert in experts:
                file.seek(row.offset + expert * size)
                file.write(np.full(size // 4, np.nan, np.float32).tobytes())


def test_each_expert_that_is_reached_is_read_once(stacks):
    """Of a prompt: the loop has as many turns as there are experts that some token chose."""
    stack, given = stacks("fp32"), inputs(1, 3, seed=4)
    model = shown(stack.model(), "experts.times", ir.DataType.INT64)
    turns = int(stack.session(model).run(None, given)[1])
    assert turns == EXPERTS.count - len(unreached(stack, given)) < 3 * EXPERTS.chosen


def test_weights_stay_in_the_file(stacks):
    """No matrix is copied into the graph, and nothing makes one of all experts when a session is opened."""
    for form in FORMS:
        model = stacks(form).model()
        matrices = {value.name: value for value in model.graph.initializers.values()
                    if value.name.removesuffix(".scale") in MATRICES}  # fmt: skip
        assert len(matrices) == (2 if form == "fp32" else 4)
        assert all(isinstance(value.const_value, ir.ExternalTensor) for value in matrices.values())
        readers = {(node.op_type, node.graph is model.graph) for value in matrices.values() for node, _ in value.uses()}
        assert readers == {("Gather", False)}


def shown(model, ending, dtype=ir.DataType.FLOAT):
    """The model with an inner value among its outputs."""
    value = next(value for node in model.graph for value in node.outputs if value.name.endswith(ending))
    value.type = ir.TensorType(dtype)
    model.graph.outputs.append(value)
    return model


def left_out(model, which):
    """Readers of a node's first output get what it reads; of gates, what they let through; of scales, the shares."""
    node = next(node for node in model.graph.all_nodes() if node.name.endswith(which))
    instead = node.inputs[0]
    if which == "own_scale":
        instead = node.inputs[1].producer().outputs[0]
    elif which == "experts.gate":
        instead = node.outputs[1]
    for user, index in list(node.outputs[0].uses()):
        user.replace_input_with(index, instead)


@pytest.mark.parametrize("broken", ["own_scale", "router.proj.in", "experts.gate", "experts.part"])
def test_the_comparison_sees_what_is_left_out(stacks, broken):
    """The scale of each expert, the router's norm and gain, the gate, the share."""
    stack, given = stacks("fp32"), inputs(1, 23)
    right, model = expected(stack.of, given["dense"], given["residual"]), stack.model()
    left_out(model, broken)
    assert off(stack.session(model).run(None, given)[0], right) > 1e-2  # measured 0.2 to 2


@pytest.mark.parametrize("broken", ["", "router.proj.even"])
def test_shares_add_up_to_one_before_they_are_scaled(stacks, broken):
    """The norm behind the experts hides a factor of all shares, so that they are compared themselves."""
    stack, given = stacks("fp32"), inputs(1, 23)
    model = shown(stack.model(), "router.proj.shares")
    if broken:
        left_out(model, broken)
    _, shares = router(stack.of, given["residual"][0].astype(np.float64))
    found = off(stack.session(model).run(None, given)[1], shares)
    assert found > 0.1 if broken else found < EXACT
