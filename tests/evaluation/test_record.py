"""Results in an artifact: eval.json and the report, whole and known to `verify`, whatever happens in between."""

import copy
import json
import os
import re

import pytest

from gemma_deploy.artifact import report
from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.artifact.plots import range_plot, sqnr_plot
from gemma_deploy.errors import ArtifactError
from gemma_deploy.evaluation import record as records
from gemma_deploy.params.table import ParamRow
from gemma_deploy.verifying import verify
from gemma_deploy.workdir import Lock
from tests.evaluation.conftest import run
from tests.evaluation.make import questions, write_exam

PPL = ["--task", "ppl", "--windows", 2, "--seqlen", 24]


@pytest.fixture
def artifact(copy_of):
    return copy_of("int8")


def results(artifact):
    return json.loads((artifact / "eval.json").read_text())["results"]


def test_results_are_kept_in_the_artifact_which_stays_whole(artifact, text_file, tmp_path, capfd):
    verify(artifact)
    code, out, err = run(capfd, "eval", artifact, "--text", text_file, *PPL, "--json", tmp_path / "ppl.json")
    assert code == 0, out + err
    assert f"recorded  {artifact / 'eval.json'}" in out
    verify(artifact)
    exam = write_exam(tmp_path / "exam.zip", questions(2))
    code, out, err = run(capfd, "eval", artifact, "--task", "ceval", "--path", exam, "--shots", 0)
    assert code == 0, out + err
    verify(artifact)
    text, test = results(artifact)
    assert text == json.loads((tmp_path / "ppl.json").read_text())
    assert (test["task"], test["questions"], "answers" in test) == ("ceval", 4, False)
    page = (artifact / "report.html").read_text()
    assert f"{text['perplexity']:.3f} \u00b1 {text['perplexity_error']:.3g}" in page
    assert f'<td data-label="mean KL, nats" class="n"><span>{text["kl_mean"]:.3g}</span>' in page
    assert text["settings"]["windowing"] in page
    assert "C-Eval, val, 0-shot, 4 questions of 2 subjects" in page
    law = test["subjects"]["law"]["accuracy"]
    cell = '<td data-label="{}" class="n"><span>{}</span></td>'
    assert f"<span>law</span></td>{cell.format('questions', 2)}{cell.format('accuracy', f'{law:.3g}')}" in page
    assert [name in page for name in ("SQNR by layer", "largest magnitude by layer")] == [True, True]
    assert not re.search(r"<(script|link|img)\b|@import|url\(http", page)
    assert {file.name for file in artifact.parent.iterdir()} == {"artifact", "ppl.json", "exam.zip"}, "no lock is left"


def test_the_ranges_are_those_of_the_reference(artifact, checkpoint, text_file, capfd, tmp_path):
    import torch

    from tests.evaluation.conftest import stock_model
    from tests.evaluation.test_perplexity import windows_of

    assert run(capfd, "eval", artifact, "--text", text_file, *PPL)[0] == 0
    (found,) = (one["activation_absmax"] for one in results(artifact))
    kinds = ("self_attn.q_proj.in", "self_attn.o_proj.in", "mlp.gate_proj.in", "mlp.down_proj.in", "out")
    assert set(found) == {f"model.layers.{layer}.{kind}" for layer in range(7) for kind in kinds}
    seen = {}
    model = stock_model(checkpoint)
    layer = model.model.layers[3]
    layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.setdefault("in", []).append(args[0].abs().max()))
    layer.register_forward_hook(
        lambda _, args, made: seen.setdefault("out", []).append(
            (made if torch.is_tensor(made) else made[0]).abs().max()
        )
    )
    with torch.no_grad():
        model(torch.tensor(windows_of(checkpoint, text_file, count=2)))
    assert found["model.layers.3.mlp.down_proj.in"] == pytest.approx(float(max(seen["in"])), rel=1e-5)
    assert found["model.layers.3.out"] == pytest.approx(float(max(seen["out"])), rel=1e-5)


def test_the_same_question_replaces_its_older_answer(artifact, text_file, capfd):
    for extra in ([], [], ["--windows", 1], ["--against", "none"]):
        code, out, err = run(capfd, "eval", artifact, "--text", text_file, *PPL, *extra)
        assert code == 0, out + err
    found = results(artifact)
    assert [(one["settings"]["windows"], one["against"] is None) for one in found] == [
        (2, False),
        (1, False),
        (2, True),
    ]
    verify(artifact)


def test_nothing_is_written_with_no_record(artifact, text_file, capfd):
    before = {file.name: file.read_bytes() for file in artifact.iterdir()}
    assert run(capfd, "eval", artifact, "--text", text_file, *PPL, "--no-record")[0] == 0
    assert {file.name: file.read_bytes() for file in artifact.iterdir()} == before


@pytest.mark.parametrize("renamed", [0, 1])
def test_killed_between_manifest_and_files_the_next_evaluation_finishes_it(
    artifact, text_file, capfd, monkeypatch, renamed
):
    from pathlib import Path

    right, done = Path.replace, []

    def replace(self, target):
        if self.name in ("eval.json.partial", "report.html.partial"):
            if len(done) == renamed:
                raise KeyboardInterrupt
            done.append(self)
        return right(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        assert run(capfd, "eval", artifact, "--text", text_file, *PPL)[0] == 130
    with pytest.raises(ArtifactError):
        verify(artifact)
    assert run(capfd, "eval", artifact, "--text", text_file, *PPL, "--windows", 1)[0] == 0
    verify(artifact)
    assert [one["settings"]["windows"] for one in results(artifact)] == [2, 1]


def test_killed_before_the_manifest_nothing_is_left(artifact):
    (artifact / "eval.json.partial").write_text("half")
    records.finish_interrupted(artifact)
    verify(artifact)


def test_another_process_at_work_on_it_is_waited_for_by_the_user(artifact, text_file, capfd):
    lock = Lock(artifact)
    try:
        code, out, err = run(capfd, "eval", artifact, "--text", text_file, *PPL)
    finally:
        lock.release()
    assert code == 1
    assert "perplexity" in out, "the figures are not lost"
    assert "is running" in err
    verify(artifact)


def test_an_artifact_that_may_not_be_written_to_is_refused_before_any_work(artifact, text_file, capfd, monkeypatch):
    monkeypatch.setattr(os, "access", lambda place, mode: mode != os.W_OK)  # the tests may run as root
    code, out, err = run(capfd, "eval", artifact, "--text", text_file, *PPL)
    assert (code, out) == (2, "")
    assert "use --no-record" in err
    assert run(capfd, "eval", artifact, "--text", text_file, *PPL, "--no-record")[0] == 0


def test_a_damaged_artifact_is_not_evaluated(artifact, text_file, capfd):
    params = artifact / "params.safetensors"
    data = bytearray(params.read_bytes())
    data[-100] ^= 1
    params.write_bytes(data)
    code, out, err = run(capfd, "eval", artifact, "--text", text_file, *PPL)
    assert (code, out) == (1, "")
    assert "damaged: 1 problem(s)" in err


def test_a_result_that_is_not_finite_and_names_from_outside_are_shown_as_such(artifact, text_file, capfd):
    assert run(capfd, "eval", artifact, "--text", text_file, *PPL)[0] == 0
    (found,) = results(artifact)
    evil = copy.deepcopy(found)
    evil["settings"]["text"] = "<script>alert(1)</script>"
    evil |= {"perplexity": None, "perplexity_error": None, "kl_mean": None}
    page = report.report_page(Artifact.open(artifact).manifest, [evil])
    assert "<script>" not in page
    assert '<td data-label="perplexity" class="n"><span>-</span>' in page


def test_the_picture_of_ranges():
    absmax = {f"model.layers.{n}.mlp.down_proj.in": 10.0**n for n in range(3)} | {"model.norm.out": 5.0}
    chart = range_plot(absmax)
    assert [line.name for line in chart.series] == ["down_proj input"]
    lows = [mark.y for mark in chart.series[0].marks]
    assert lows[0] - lows[1] == pytest.approx(lows[1] - lows[2], abs=0.2)  # tens are equally far apart
    assert [mark.text for mark in chart.series[0].marks][2] == "down_proj input, layer 2: 100"
    assert chart.rule.at < min(lows)  # far below the largest float16
    assert range_plot(absmax) == chart, "same numbers, same picture"
    assert range_plot({"model.norm.out": 5.0}) is None


def test_of_ranks_the_lowest_sqnr_is_drawn():
    def rows(*values):
        return [
            ParamRow("model.layers.0.mlp.up_proj.weight", "int8", (1,), 0, 1, "", "int8_per_channel", value)
            for value in values
        ]

    assert sqnr_plot(rows(41.0, 39.0)) == sqnr_plot(rows(39.0)) != sqnr_plot(rows(41.0))
    assert sqnr_plot(rows(None)) is None
