"""The gate of a merge: passes where the merged weights are right, and names the module where one is not."""

from dataclasses import replace

import numpy as np
import pytest

from gemma_deploy import extras
from gemma_deploy.checkpoint import AdapterRef, Checkpoint
from gemma_deploy.checkpoint.adapters import sums, updates
from gemma_deploy.cli import main
from gemma_deploy.parity.cases import make_cases
from gemma_deploy.parity.compare import ParityResult
from gemma_deploy.parity.merged import prove_merge
from gemma_deploy.recipe import Recipe
from gemma_deploy.schemes import Scheme
from gemma_deploy.stages.check import check
from gemma_deploy.stages.gate import advice
from gemma_deploy.testing import write_tiny_checkpoint
from tests.adapters import write_adapter
from tests.parity.conftest import write_recipe
from tests.parity.test_adapted import FORMS


def gate(checkpoint, *refs):
    """The result of the gate on a checkpoint that was opened with adapters."""
    merged = Checkpoint.open(checkpoint, list(refs)) if refs else checkpoint
    rng = np.random.default_rng(11)
    text = rng.integers(3, 500, 200).tolist()
    cases = make_cases(merged.config, batch=2, length=26, steps=6, text=text)  # more than three windows of 8
    result = ParityResult()
    prove_merge(merged, cases, result=result)
    return result


MERGED = [form for form in FORMS if form != "biases"]  # there is no bias in a Gemma to merge one into


@pytest.mark.parametrize("form", [*MERGED, "dora-table"])
def test_a_merge_passes(checkpoint_dir, form, tmp_path):
    more = {"dora-table": {"use_dora": True, "target_modules": ["embed_tokens", "v_proj"]}}
    write_adapter(checkpoint_dir, tmp_path / "adapter", **(FORMS | more)[form])
    result = gate(checkpoint_dir, AdapterRef(tmp_path / "adapter"))
    (line,) = result.lines
    assert line.comparison == "peft = merged"
    assert line.passed, str(line)
    assert 0 < line.value <= line.limit == 1e-5
    assert result.divergence is None


def test_weighted_adapters_pass(checkpoint_dir, tmp_path):
    write_adapter(checkpoint_dir, tmp_path / "one")
    write_adapter(checkpoint_dir, tmp_path / "other", seed=1, r=2, target_modules=["v_proj", "down_proj"])
    result = gate(checkpoint_dir, AdapterRef(tmp_path / "one", 0.5), AdapterRef(tmp_path / "other", -2.0))
    assert result.passed, result.summary


def failed(result):
    (line,) = result.lines
    assert not line.passed
    assert not result.passed
    return result.divergence["module"]


@pytest.mark.parametrize("module", ["model.layers.1.self_attn.v_proj", "model.layers.2.mlp.up_proj"])
def test_a_wrong_scaling_is_named(checkpoint_dir, module, tmp_path):
    """alpha / sqrt(r) in the place of alpha / r, of one module."""
    write_adapter(checkpoint_dir, tmp_path / "adapter")
    merged = Checkpoint.open(checkpoint_dir, tmp_path / "adapter")
    name = f"{module}.weight"
    own = merged._merged[name]
    (step,) = own.steps
    wrong = replace(own, steps=(replace(step, scaling=step.scaling * 2),))
    result = gate(replace(merged, _merged={**merged._merged, name: wrong}))
    assert failed(result) == module
    assert module in result.summary


def test_a_transposed_factor_is_named(checkpoint_dir, tmp_path, monkeypatch):
    """B read as if it lay the other way round in the file, in the layers behind the first."""
    right = updates.LowRank.b_rows

    def transposed(self, start, stop):
        if ".layers.0." in self.second.name:
            return right(self, start, stop)
        whole = self.second.whole()
        return np.ascontiguousarray(whole.reshape(whole.shape[::-1]).T[start:stop])

    monkeypatch.setattr(updates.LowRank, "b_rows", transposed)
    write_adapter(checkpoint_dir, tmp_path / "adapter", target_modules=["o_proj", "down_proj"])
    assert failed(gate(checkpoint_dir, AdapterRef(tmp_path / "adapter"))) == "model.layers.1.self_attn.o_proj"


def test_a_row_of_the_table_that_was_left_out_is_named(checkpoint_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(sums.WithRows, "rows", lambda self, start, stop: self.base.rows(start, stop))
    trained = {"embed_tokens": list(range(3, 400))}
    write_adapter(checkpoint_dir, tmp_path / "adapter", trainable_token_indices=trained)
    assert failed(gate(checkpoint_dir, AdapterRef(tmp_path / "adapter"))) == "model.embed_tokens"


def test_a_head_without_its_update_is_named(checkpoint_dir, tmp_path):
    write_adapter(checkpoint_dir, tmp_path / "adapter", target_modules=["lm_head", "q_proj"])
    merged = Checkpoint.open(checkpoint_dir, tmp_path / "adapter")
    head = merged.config.head_weight
    wrong = {**merged._merged, head: replace(merged._merged[head], steps=())}
    result = gate(replace(merged, _merged=wrong))
    assert failed(result) == "lm_head"
    assert advice(Scheme("fp32"), result).startswith("the adapter was merged wrongly")


@pytest.fixture
def adapted_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = write_tiny_checkpoint(tmp_path / "base", "gemma2", num_hidden_layers=2)
    write_adapter(checkpoint, tmp_path / "adapter")
    write_recipe(tmp_path / "x.yaml", checkpoint)
    return Recipe.load("x.yaml", overrides=[f"frontend.adapter={tmp_path / 'adapter'}"])


def test_without_peft_it_is_said_before_any_work(adapted_recipe, tmp_path, monkeypatch):
    monkeypatch.setitem(extras.MODULES, "adapters", ("peft_of_nobody",))
    with pytest.raises(Exception, match="the proof of a merged adapter needs peft_of_nobody, not installed here"):
        check(adapted_recipe, None, parity=True, force=False)
    check(adapted_recipe, None, parity=False, force=False)
    assert not (tmp_path / "workspace").exists()


@pytest.mark.slow
def test_compile_and_parity_prove_the_merge(adapted_recipe, tmp_path, capsys):
    options = ["-s", f"frontend.adapter={tmp_path / 'adapter'}"]
    assert main(["compile", "x.yaml", *options]) == 0, capsys.readouterr().err
    capsys.readouterr()
    assert main(["parity", "workspace/x"]) == 0, capsys.readouterr().err
    assert "peft = merged" in capsys.readouterr().out
