"""A few dozen mutated inputs of each surface, always the same ones; thousands of them where there is time (`slow`)."""

import io

import pytest

from tests.fuzz.harness import judge, run_many
from tests.fuzz.inputs import Inputs, in_folder
from tests.fuzz.surfaces import NAMES, SURFACES

FEW, MANY = 8, 2000
# Those that take longer get fewer in the default tests.
FEWER = {
    **{"tokenizer_json": 4, "tokenizer_config": 4, "manifest": 2, "calibration_record": 4, "evaluation": 4},
    **{"c4": 6},
}


@pytest.mark.parametrize("name", NAMES)
def test_a_few_mutated_inputs_end_as_they_should(once, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO())  # `chat` reads it
    surface = SURFACES[name]
    state = surface.prepare(Inputs(once), tmp_path)
    findings = [judge(surface, state, number)[0] for number in range(FEWER.get(name, FEW))]
    assert [finding for finding in findings if finding] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_many_mutated_inputs_end_as_they_should(tmp_path, name):
    outcome = run_many(SURFACES[name], in_folder(tmp_path / "inputs"), tmp_path, MANY, first=FEW)
    assert outcome.cases == MANY
    assert outcome.findings == []
