"""The screened head against NumPy and transformers: exact where it matters, the high halves of codes elsewhere."""

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from gemma_deploy.backends.onnxruntime import head
from gemma_deploy.backends.onnxruntime.decoder import LOGITS, NORMED
from gemma_deploy.backends.onnxruntime.exact import every_position, exact
from gemma_deploy.backends.onnxruntime.gates import SCREEN_LIMIT, dynamic_gates
from gemma_deploy.backends.onnxruntime.options import CANDIDATES as SHIPPED
from tests.backends.make import off, open_session, step
from tests.backends.test_decoder import CLOSE
from tests.backends.test_target import compile_tiny, manifest_of

VOCAB, HIDDEN, CANDIDATES = 512, 64, 24
# Activations of the high halves' product are rounded to 8 bits: 0.004 of the largest logit was the most.
ROUNDED = 0.01
# Two groups a row, one group, one scale per row with a factor for each column of the embedding.
FORMS = ["w8", "w4", "w8row"]


def head_alone(one, **kernels):
    """normed [B,S,H] -> logits, a session."""
    model = one.graph(**kernels)
    graph = ir.convenience.extract(model.graph, [NORMED], [LOGITS])
    graph.inputs[0].shape, graph.inputs[0].type = None, ir.TensorType(ir.DataType.FLOAT)
    return open_session(ir.Model(graph, ir_version=model.ir_version), one.folder)


def normed(shape, seed=4):
    return np.random.default_rng(seed).standard_normal((*shape, HIDDEN)).astype(np.float32)


def table_of(one, module="model.embed_tokens"):
    """The whole table and that of its high halves, the low ones taken for 7.5: float64 [V, H]."""
    codes, scales = one.file.signed[module].astype(np.float64), one.file.scales[module].astype(np.float64)
    scales = np.repeat(scales.reshape(VOCAB, -1), HIDDEN // scales.reshape(VOCAB, -1).shape[1], 1)
    return codes * scales, ((codes + 128) // 16 * 16 + 7.5 - 128) * scales


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(1, 1), (2, 3)])
def test_the_likeliest_are_exact_and_the_others_have_the_high_halves(made, form, shape):
    one, x = made("gemma", form), normed(shape)
    logits = head_alone(one, candidates=CANDIDATES).run([LOGITS], {NORMED: x})[0]
    whole, high = (x.astype(np.float64) @ table.T for table in table_of(one))
    fine = np.abs(logits - whole) < 1e-5 * np.abs(whole).max()
    # A few of the others may be exact by chance.
    assert (fine.sum(-1) >= CANDIDATES).all()
    assert (fine.sum(-1) < CANDIDATES + 12).all()
    assert np.abs(logits - high)[~fine].max() < ROUNDED * np.abs(whole).max()
    assert np.abs(whole - high)[~fine].max() > 5 * ROUNDED * np.abs(whole).max()
    lowest = np.where(fine, logits, np.inf).min(-1)
    assert (lowest >= np.where(fine, -np.inf, logits).max(-1) - 2 * np.abs(whole - high).max()).all()
    np.testing.assert_array_equal(logits.argmax(-1), whole.argmax(-1))


def test_with_every_token_a_candidate_it_is_the_float32_product(made):
    one, x = made("gemma", "w8"), normed((1, 2))
    logits = head_alone(one, candidates=10 * VOCAB).run([LOGITS], {NORMED: x})[0]
    assert off(logits, x.astype(np.float64) @ table_of(one)[0].T) < CLOSE


@pytest.mark.parametrize("tied", [True, False])
def test_a_table_in_parts_is_the_table(made, monkeypatch, tied):
    one, x = made("gemma3_text", "w8", tie_word_embeddings=tied), normed((1, 2))
    whole = head_alone(one, candidates=CANDIDATES).run([LOGITS], {NORMED: x})[0]
    monkeypatch.setattr(head, "HEAD_BYTES", 5000)
    graph = one.graph(candidates=CANDIDATES)
    products = [node for node in graph.graph if str(node.outputs[0].name).startswith("lm_head") and
                node.op_type == "MatMulNBits"]  # fmt: skip
    assert [node.attributes["N"].value for node in products] == [156, 156, 156, 44]
    assert {node.attributes["bits"].value for node in products} == {4}
    parts = head_alone(one, candidates=CANDIDATES).run([LOGITS], {NORMED: x})[0]
    np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-6 * np.abs(whole).max())


def test_the_codes_lie_in_the_file_once(made):
    one = made("gemma3_text", "w4")
    row = next(row for row in one.rows if row.name == "model.embed_tokens.weight")
    views = [value.const_value for value in one.graph(candidates=CANDIDATES).graph.initializers.values()
             if isinstance(value.const_value, ir.ExternalTensor)]  # fmt: skip
    assert {(view.offset, view.length) for view in views if view.offset == row.offset} == {(row.offset, row.nbytes)}
    ops = Counter(node.op_type for node in one.graph(candidates=CANDIDATES).graph)
    assert (ops["GatherBlockQuantized"], ops["ScatterElements"]) == (2, 1)


@pytest.mark.parametrize(("kind", "form"), [("gemma", "w4"), ("gemma2", "w4"), ("gemma3_text", "w8row")])
def test_exact_arithmetic_has_no_screen(made, logits_of, tokens, monkeypatch, kind, form):
    """Soft caps, a window that is passed, every position, a table in parts."""
    monkeypatch.setattr(head, "HEAD_BYTES", 5000)
    one = made(kind, form)
    graph = one.graph(candidates=CANDIDATES)
    every_position(graph)
    exact(graph)
    ops = Counter(node.op_type for node in graph.graph)
    assert not {"ScatterElements", "MatMulNBits", "BitShift", "GatherBlockQuantized"} & set(ops)
    assert ops["TopK"] == 1  # which orders tokens by their padding
    logits, _ = step(open_session(graph, one.folder, optimize=False), [tokens])
    assert off(logits[0], logits_of(kind, form, tokens)) < CLOSE


def test_greedy_tokens_are_those_of_the_whole_table(made, tokens):
    """After every prefix of a text: the screen loses none, however rough the rest."""
    one = made("gemma2", "w4")
    both = [one.session(candidates=count) for count in (0, CANDIDATES)]
    logits = [np.stack([step(session, [tokens[:end]])[0][0, 0] for end in range(1, 30)]) for session in both]
    leads = np.sort(logits[0], -1)[:, -1] - np.sort(logits[0], -1)[:, -2]
    clear = leads > 0.02 * np.abs(logits[0]).max()  # the whole head rounds activations to 8 bits as well
    assert clear.sum() > 15
    np.testing.assert_array_equal(logits[0].argmax(-1)[clear], logits[1].argmax(-1)[clear])


@pytest.mark.parametrize("prefill", ["fast", "lean"])
def test_a_screened_head_passes_a_gate_of_its_own_and_is_in_the_ledger(tmp_path, monkeypatch, prefill):
    """The largest logits are those of whole codes; what the others lose has a limit, and the graph without it none."""
    monkeypatch.setattr(head, "HEAD_BYTES", 4096)  # a table in parts, as large ones are
    compile_tiny(tmp_path, "gemma2", compile_keys={"head": "screened", "prefill": prefill})
    manifest = manifest_of(tmp_path)
    assert manifest["kernels"]["candidates"] == SHIPPED
    assert manifest["parity"]["passed"] is True
    (entry,) = (one for one in manifest["ledger"] if one["what"].startswith("logits of all but the 256 likeliest"))
    assert entry["where"] == "the LM head"
    assert entry["effect"]["case"] == "text"
    gates = [gate for flag in (False, True) for gate in dynamic_gates("w8a16", flag) if gate.measure == "kl_mean"]
    whole, screened = (gate.limit for gate in gates if gate.pair[1] == "shipped")
    assert screened == pytest.approx(whole + SCREEN_LIMIT)
