"""Adapters as inputs of ONNX Runtime's graph: PEFT's own numbers, unmerged, and nothing where there is none."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from gemma_deploy.backends.keeping import adapter_slots
from gemma_deploy.backends.onnxruntime.exact import exact
from tests.backends.make import KINDS, expected_logits, off, open_session, reference, run, step
from tests.backends.peft_make import adapted, inputs_of

CLOSE = 1e-5  # float32 sums in another order: 4.3e-6 was the most
KERNELS = (
    0.1  # what 8-bit activations lose: 0.073 was the most, of 4-bit weights; without the adapter it is 1.1 and more
)
PIECES = (20, 6, 1, 1)  # a prompt past the window of 8, a piece of several tokens, decode steps


def graph_of(one, **kernels):
    return one.graph(adapters=adapter_slots(one.config, 16, "float32"), **kernels)


def stepwise(session, tokens, adapter=None):
    """Logits at the end of each piece."""
    caches, at, found = None, 0, []
    for size in PIECES:
        logits, caches = step(session, [tokens[at : at + size]], caches, adapter=adapter)
        at += size
        found.append(logits[0, 0])
    return np.array(found)


def expected(model, tokens):
    return expected_logits(model, tokens[: sum(PIECES)])[np.cumsum(PIECES) - 1]


@pytest.mark.parametrize("kind", KINDS)
def test_float_graph_computes_what_peft_computes_and_changes_adapters_between_runs(made, tokens, kind):
    one = made(kind, "fp32")
    session = one.session(graph_of(one))
    base = reference(one)
    plain = expected(base, tokens)
    model = adapted(base, 1, rank=4, alpha=12)
    adapted(model, 2, rank=7, alpha=7, name="other", target_modules=["q_proj", "down_proj"], use_rslora=True)
    found = {}
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        found[name] = expected(model, tokens)
        assert off(stepwise(session, tokens, inputs_of(model, name)), found[name]) < CLOSE
    assert off(stepwise(session, tokens), plain) < CLOSE
    # Each is another model: what would be wrong is not hidden in the tolerance.
    assert off(found["default"], plain) > 0.1
    assert off(found["other"], found["default"]) > 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["w8", "w8t", "w8row", "w4", "w4kv"])
def test_codes_keep_a_float_adapter(made, tokens, kind, form):
    """PEFT on the weights that the file stands for: exact products are its numbers, kernels lose what they lose."""
    one = made(kind, form)
    kernels = {"integer": True, "in_14_bits": frozenset(adapter_slots(one.config, 1, "float32").linears)} if (
        form == "w8t") else {}  # fmt: skip
    model = adapted(reference(one), 1)
    wanted, adapter = expected(model, tokens), inputs_of(model)
    graph = graph_of(one, **kernels)
    assert off(stepwise(one.session(graph), tokens, adapter), wanted) < KERNELS
    strict = graph_of(one, **kernels)
    exact(strict)
    session = open_session(strict, one.folder, optimize=False)
    assert off(stepwise(session, tokens, adapter), wanted) < CLOSE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["fp32", "w8", "w8t"])
def test_without_an_adapter_every_bit_is_that_of_the_graph_without_inputs(made, tokens, kind, form):
    one = made(kind, form)
    with_inputs, without = one.session(graph_of(one)), one.session()
    here, there = run(with_inputs, [tokens[:20]]), run(without, [tokens[:20]])
    assert list(here) == list(there)
    for name in here:
        assert np.array_equal(here[name], there[name]), name


def test_inputs_are_optional_named_after_their_linears_and_of_any_rank(made):
    one = made("gemma3_text", "fp32")
    session = one.session(graph_of(one))
    assert not [value.name for value in session.get_inputs() if "lora" in value.name]
    found = {value.name: (value.type, value.shape) for value in session.get_overridable_initializers()}
    assert len(found) == 2 * 7 * one.raw["num_hidden_layers"]
    module = "model.layers.2.mlp.down_proj"
    entering, leaving = one.file.weights[f"{module}.weight"].shape[::-1]
    assert found[f"{module}.lora_A"] == ("tensor(float)", [entering, f"{module}.rank"])
    assert found[f"{module}.lora_B"] == ("tensor(float)", [f"{module}.rank", leaving])


def test_graph_without_a_section_has_no_inputs_and_the_checker_likes_both(made):
    one = made("gemma2", "fp32")
    plain, with_inputs = (ir.to_proto(graph) for graph in (one.graph(), graph_of(one)))
    assert not [value.name for value in plain.graph.input if "lora" in value.name]
    for name, graph in (("plain", plain), ("with_inputs", with_inputs)):
        onnx.save(graph, one.folder / f"{name}.onnx")
        onnx.checker.check_model(str(one.folder / f"{name}.onnx"), full_check=True)
    names = [node.name for node in with_inputs.graph.node]
    assert len(set(names)) == len(names)
