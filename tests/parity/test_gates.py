"""Limits decide, and nothing passes that was not compared or is no number."""

import json
import math
from dataclasses import FrozenInstanceError, fields, replace

import numpy as np
import pytest

from gemma_deploy.params.table import ParamRow
from gemma_deploy.parity.compare import ParityResult, judged
from gemma_deploy.parity.gates import GATES, SAME_WEIGHTS, Gate, headroom_line, judge, sqnr_line
from gemma_deploy.parity.metrics import Comparison, compare_logits
from gemma_deploy.quantization.rescaling import Rescaling

PAIR = ("hf", "strict")
RNG = np.random.default_rng(0)
LOGITS = RNG.standard_normal((30, 16)) * 5
GOOD = compare_logits(LOGITS, LOGITS + RNG.standard_normal(LOGITS.shape) * 0.05, LOGITS.argmax(axis=1))
EMPTY = Comparison().result()
KEYS = [(case, phase) for case in ("text", "random") for phase in ("prefill", "decode")]


def line(gate, **measures):
    """A gate on a good comparison in which the given measures, of decode on text, are others."""
    changed = replace(GOOD, **measures)
    measured = dict.fromkeys(KEYS, GOOD) | {("text", "decode"): changed}
    return judge(gate, measured, {"text": changed, "random": GOOD})


@pytest.mark.parametrize("measure", ["relative", "kl_mean", "bad_test", "ppl_delta", "overturned"])
@pytest.mark.parametrize("pooled", [False, True])
def test_at_the_limit_passes_and_above_fails(measure, pooled):
    gate = Gate(PAIR, measure, 1.0, pooled=pooled)
    changes = {"ppl_error": 0.0}
    at, above = (line(gate, **changes, **{measure: value}) for value in (1.0, np.nextafter(1.0, 2)))
    if measure == "bad_test":  # one bad logit is one too many, whatever a limit says
        assert (at.passed, above.passed) == (False, False)
    else:
        assert (at.passed, above.passed, at.value) == (True, False, 1.0)


@pytest.mark.parametrize("scheme", GATES)
@pytest.mark.parametrize("changes", [{"bad_test": 1}, {"bad_reference": 1}])
def test_one_bad_logit_fails_every_gate(scheme, changes):
    for gate in GATES[scheme]:
        loose = replace(gate, limit=1e9)
        assert line(loose).passed, gate
        assert not line(loose, **changes).passed, gate


@pytest.mark.parametrize("scheme", GATES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_fails_every_gate(scheme, value):
    for gate in GATES[scheme]:
        if gate.measure != "bad_test":
            failed = line(gate, **{gate.measure: value})
            assert not failed.passed, gate
            assert json.loads(json.dumps(failed.to_json(), allow_nan=False))["value"] is None


@pytest.mark.parametrize("scheme", GATES)
def test_nothing_compared_is_nothing_proven(scheme):
    for gate in GATES[scheme]:
        assert not judge(gate, {}, {}).passed
        empty = judge(gate, dict.fromkeys(KEYS, EMPTY), dict.fromkeys(("text", "random"), EMPTY))
        assert empty.passed is (gate.measure == "bad_test"), gate  # a count; the gates beside it refuse
        other = judge(gate, {("third", "decode"): GOOD}, {"third": GOOD})
        assert not other.passed, gate
    assert not ParityResult().passed


def test_every_scheme_has_a_gate_on_the_artifact_that_an_empty_comparison_fails():
    for scheme, gates in GATES.items():
        assert any(gate.pair[1] == "strict" and gate.measure != "bad_test" for gate in gates), scheme
    assert GATES.keys() == SAME_WEIGHTS.keys()


def test_perplexity_is_judged_less_two_standard_errors():
    gate = Gate(PAIR, "ppl_delta", 0.005)
    assert line(gate, ppl_delta=0.015, ppl_error=0.0051).passed
    judged_ = line(gate, ppl_delta=0.015, ppl_error=0.0049)
    assert (judged_.passed, judged_.value) == (False, pytest.approx(0.0052))
    assert line(gate, ppl_delta=-0.5, ppl_error=0.0).passed  # better than the reference is no failure
    assert not line(gate, ppl_delta=0.001, ppl_error=math.nan).passed  # one position has no error to take off


def test_the_worst_case_and_phase_decides():
    gate = Gate(PAIR, "relative", 0.5)
    for key in KEYS:
        measured = dict.fromkeys(KEYS, GOOD) | {key: replace(GOOD, relative=0.75)}
        assert judge(gate, measured, {}).value == 0.75, key
    text_only = replace(gate, cases=("text",))
    measured = dict.fromkeys(KEYS, GOOD) | {("random", "decode"): replace(GOOD, relative=0.75)}
    assert judge(text_only, measured, {}).passed


def test_without_text_a_gate_on_text_is_put_on_random_tokens():
    class Random:
        parts = (("random", "decode"),)

        def measured(self):
            return {("random", "decode"): GOOD}

        def pooled(self):
            return {"random": replace(GOOD, kl_mean=3.0)}

    lines = judged([Gate(PAIR, "kl_mean", 0.01, ("text",), pooled=True)], {PAIR: Random()})
    assert [(line.value, line.passed) for line in lines] == [(3.0, False)]


@pytest.mark.parametrize(
    ("largest", "passed"), [(16376.0, True), (16377.0, False), (65504.0, False), (math.inf, False), (math.nan, False)]
)
def test_headroom_is_four_fold(largest, passed):
    got = headroom_line({"model.layers.0.out": 3.0, "model.layers.1.mlp.up_proj.out": largest}, Rescaling())
    assert got.passed is passed
    assert passed or math.isnan(largest) or "model.layers.1.mlp" in str(got)


def test_headroom_of_nothing_is_no_headroom():
    assert not headroom_line({}, Rescaling()).passed
    assert not headroom_line({"a": math.nan, "b": 1.0}, Rescaling()).passed
    assert not headroom_line({"a": 1.0, "b": math.nan}, Rescaling()).passed


def quantized(name, decibels, energy=1.0):
    return ParamRow(name, "int8", (1,), 0, 1, "", "int8_per_channel", decibels, energy)


@pytest.mark.parametrize(("decibels", "passed"), [(38.01, True), (37.9, False), (math.nan, False)])
def test_the_worst_layer_must_keep_its_signal(decibels, passed):
    rows = [
        quantized("model.layers.0.mlp.up_proj.weight", 44.0),
        quantized("model.layers.11.mlp.up_proj.weight", decibels),
        quantized("model.embed_tokens.weight", 10.0),  # judged by KL
        quantized("model.norm.weight", None, None),
    ]
    got = sqnr_line(rows)
    assert got.passed is passed
    assert math.isnan(decibels) or "layer 11" in str(got)
    assert not sqnr_line(rows[2:]).passed


def test_matrices_of_a_layer_are_judged_together_by_their_energies():
    # noise 3 * 10^-3 + 1 * 10^-5 over a signal of 4: 31.24 dB
    rows = [quantized("model.layers.0.a.weight", 30.0, 3.0), quantized("model.layers.0.b.weight", 50.0)]
    assert sqnr_line(rows).value == pytest.approx(10 * math.log10(4 / (3e-3 + 1e-5)))


def test_weights_that_int8_holds_exactly_have_no_noise():
    assert sqnr_line([quantized("model.layers.0.a.weight", None, 0.0)]).value == math.inf


def test_a_line_says_what_was_measured_and_what_was_allowed():
    got = line(Gate(PAIR, "relative", 1e-5), relative=0.25)
    assert str(got) == "hf = strict: relative error 0.25, must be <= 1e-05"
    assert ">= 4" in str(headroom_line({"a": 1.0}, Rescaling()))
    result = ParityResult(lines=[got], divergence={"text": "differs in model.layers.3"})
    assert result.failures() == [str(got), "differs in model.layers.3"]
    assert result.summary.startswith("FAILED  hf = strict")
    assert ParityResult(lines=[line(Gate(PAIR, "relative", 9))]).summary.startswith("passed  hf = strict relative")


SAME = {"fp32": "patched", "bf16": "patched bf16", "fp16": "patched"}
# Scheme -> (largest mean KL, largest change of the perplexity), as docs/proof-and-ledger.md promises them.
LOSS = {
    "w8a16": (0.01, 0.005), "w8a16_gptq": (0.005, 0.005), "w8a8": (0.016, 0.016), "w4a16": (0.5, 0.5),
    "w4a16_gptq": (0.3, 0.3), "w4a16_rtn": (0.7, 0.5),
}  # fmt: skip


def rows_of(gates):
    return [(gate.pair, gate.measure, gate.limit, gate.cases, gate.pooled) for gate in gates]


def test_limits_are_those_that_the_documents_promise():
    """A change of a limit is a decision, with a measurement beside it."""
    every, text, hf = ("text", "random"), ("text",), ("hf", "strict")
    exact = [("hf", "patched"), ("patched", "strict"), hf]
    assert rows_of(GATES["fp32"]) == [(pair, "relative", 1e-5, every, False) for pair in exact]
    exact = [("hf bf16", "patched bf16"), ("patched bf16", "strict"), ("hf bf16", "strict")]
    assert rows_of(GATES["bf16"]) == [(pair, "relative", 1e-3, every, False) for pair in exact]
    assert rows_of(GATES["fp16"]) == [
        (("hf", "patched"), "relative", 1e-5, every, False),
        (hf, "bad_test", 0, every, False),
        (hf, "kl_mean", 1e-5, text, True),
    ]
    for scheme, (kl, perplexity) in LOSS.items():
        assert rows_of(GATES[scheme]) == [
            (("hf", "patched"), "relative", 1e-5, every, False),
            ((f"patched {scheme}", "strict"), "relative", 1e-5, every, False),
            (hf, "bad_test", 0, every, False),
            (hf, "kl_mean", kl, text, True),
            (hf, "ppl_delta", perplexity, text, True),
        ]
    assert not set(GATES) ^ {*SAME, *LOSS}
    assert SAME | {scheme: f"patched {scheme}" for scheme in LOSS} == SAME_WEIGHTS


@pytest.mark.parametrize(("exponent", "said"), [(0, "reaches 1.638e+04)"), (3, "reaches 1.31e+05, divided by 2**3)")])
def test_headroom_is_that_of_what_is_stored(exponent, said):
    point = "model.layers.1.mlp.up_proj.out"
    rescaling = Rescaling({point: exponent})
    largest = 16376.0 * 2**exponent  # a fourth of float16's largest, 65504, as it is stored
    at, above = (
        headroom_line({"model.layers.0.out": 3.0, point: value}, rescaling)
        for value in (largest, np.nextafter(largest, np.inf))
    )
    assert (at.passed, above.passed, at.value, at.limit) == (True, False, 4.0, 4.0)
    assert f"{point} {said}" in at.name


def test_headroom_is_not_asked_of_what_is_float32():
    rescaling = Rescaling(wide=("mlp",))
    inside = {"model.layers.1.mlp.up_proj.out": 1e30, "model.norm.out": 1e30}
    assert headroom_line({"model.layers.0.out": 16.0, **inside}, rescaling).value == 65504 / 16
    assert headroom_line({"model.layers.0.out": 0.0}, rescaling).value == math.inf
    far = headroom_line({"model.layers.0.out": 3.0}, rescaling)
    assert (far.value, far.passed) == (65504 / 3, True)


@pytest.mark.parametrize("places", [(0, 1), (1, 0)])
def test_the_worst_is_found_wherever_it_stands(places):
    names = [f"model.layers.{i}.a.weight" for i in places]
    assert sqnr_line([quantized(names[0], 30.0), quantized(names[1], 50.0)]).value == pytest.approx(30.0)
    assert f"layer {places[0]})" in sqnr_line([quantized(names[0], 30.0), quantized(names[1], 50.0)]).name
    assert math.isnan(sqnr_line([quantized(names[0], math.nan), quantized(names[1], 50.0)]).value)
    assert sqnr_line([quantized(names[0], None), quantized(names[1], 50.0)]).value == pytest.approx(50.0)
    largest = headroom_line({f"{places[0]}.out": 8.0, f"{places[1]}.out": 2.0}, Rescaling())
    assert largest.value == 65504 / 8


def test_a_ratio_of_nothing_to_noise_is_no_pass():
    got = sqnr_line([quantized("model.layers.0.a.weight", math.nan, 0.0)])
    assert (got.value, got.passed) == (-math.inf, False)


def test_the_limit_of_the_signal_is_38_decibels():
    at = [quantized("model.layers.0.a.weight", 38.0)]
    got = sqnr_line(at)
    assert (got.limit, got.comparison, got.value, got.passed) == (38.0, "weights", 38.0, True)
    assert sqnr_line([quantized("model.layers.0.a.weight", 37.999)]).passed is False


def test_an_infinite_value_is_null_and_a_number_itself():
    assert line(Gate(PAIR, "relative", 1.0), relative=0.25).to_json() == {
        "comparison": "hf = strict", "name": "relative error", "value": 0.25, "limit": 1.0, "passed": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    "made", [Gate(PAIR, "relative", 1.0), line(Gate(PAIR, "relative", 1.0))], ids=lambda made: type(made).__name__
)
def test_it_cannot_be_changed(made):
    with pytest.raises(FrozenInstanceError):
        setattr(made, fields(made)[0].name, None)
