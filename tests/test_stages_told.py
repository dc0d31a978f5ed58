"""Every stage of a compile is named when it begins, and those that take long on a real model say what they count."""

import numpy as np
import pytest

from gemma_deploy.compile import compile_recipe
from gemma_deploy.parity.cases import Case
from gemma_deploy.parity.compare import compare_sources
from gemma_deploy.progress import Report, Silent
from gemma_deploy.recipe import Recipe
from tests.exporting import export_in_this_process


class Kept(Silent):
    """A watcher that keeps what it is told, in order."""

    def __init__(self):
        self.told = []

    def started(self, stage):
        self.told.append(("started", stage))

    def advanced(self, stage, done, total, unit):
        assert 0 <= done <= total
        self.told.append((stage, done, total, unit))

    def said(self, stage, what):
        self.told.append(("said", stage, what))

    def ended(self, stage):
        self.told.append(("ended", stage))

    def counts(self, stage):
        return [(done, total, unit) for name, done, total, unit in (one for one in self.told if len(one) == 4)
                if name == stage]  # fmt: skip


LENGTHS = ["frontend.shape.input_ids=[[32],[48]]", "parity.prompt_tokens=16", "parity.decode_tokens=4"]


@pytest.mark.parametrize(
    ("recipe", "overrides", "stages"),
    [
        ("accelerator-fp16", [], ["ranges", "parameters", "graphs", "files", "parity"]),
        (
            "cpu-int8",
            ["frontend.quantize={type: w8a16_gptq}", "dataset.name=c4:2", "dataset.seqlen=64"],
            ["quantize", "parameters", "graphs", "files", "sensitivity", "parity"],
        ),
        (
            "accelerator-int8",
            ["frontend.quantize.type=w8a16+kv8", "dataset.name=c4:2", "dataset.seqlen=64"],
            ["cache", "parameters", "graphs", "files", "parity"],
        ),
    ],
)
def test_stages_are_named_and_long_ones_counted(recipe, overrides, stages, tmp_path, monkeypatch):
    from gemma_deploy.graph import worker

    monkeypatch.setattr(worker, "export_apart", export_in_this_process)
    kept = Kept()
    asked = Recipe.load(recipe, [*LENGTHS, *overrides, f"workspace.path={tmp_path}"], checkpoint="demo")
    compile_recipe(asked, watcher=kept)
    assert [one[1] for one in kept.told if one[0] == "started"] == ["check", *stages]
    for stage in {"ranges", "quantize", "cache", "sensitivity"} & set(stages):
        counts = kept.counts(stage)
        assert counts[-1][0] == pytest.approx(counts[-1][1])  # to the end
        assert [done for done, *_ in counts] == sorted(done for done, *_ in counts)
        assert {(total, unit) for _, total, unit in counts} == {(4, "layers")}
    assert kept.counts("parameters")[-1][2] == "MiB"
    running = {what for kind, stage, what in (one for one in kept.told if len(one) == 3) if stage == "parity"}
    units = {unit for *_, unit in kept.counts("parity")}
    assert {"comparing logits", "comparing weights"} <= running
    assert {"layers, running hf", "layers, running patched"} <= units
    assert {"positions, comparing logits", "tensors, comparing weights"} <= units
    named = {what.removeprefix("running ") for what in running if what.startswith("running ")}
    counted = {unit.partition(", running ")[2] for unit in units}
    assert named <= counted  # every model that runs says how far it is


def test_a_source_that_cannot_count_is_named_alone():
    class Zeros:
        def run(self, cases):
            return [[np.zeros((len(case.sequence(0)), 3))] for case in cases]

        def head(self, features, prompt_end=False):
            return np.zeros((len(features), 8), np.float32)

    kept = Kept()
    case = Case("text", ((1, 2),), ((3,),))
    compare_sources(
        {"hf": Zeros(), "strict": Zeros()}, [("hf", "strict")], [case], vocab_size=8, report=Report(kept, "parity")
    )
    assert [one[2] for one in kept.told if one[0] == "said"] == ["running hf", "running strict", "comparing logits"]
