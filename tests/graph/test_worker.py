"""The export in a process of its own: the same bytes, errors whole, a dead child explained."""

import logging
import pickle
import re
import sys
from dataclasses import replace

import onnx
import pytest

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.errors import ExportError, NotBuiltError
from gemma_deploy.graph.worker import Task, export_here
from gemma_deploy.params import build_plan, write_params
from gemma_deploy.partition import ArtifactPart, whole
from gemma_deploy.testing import write_tiny_checkpoint
from tests.exporting import contract_of


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("worker")
    checkpoint = Checkpoint.open(write_tiny_checkpoint(folder / "checkpoint", "gemma", num_hidden_layers=2))
    contract = contract_of(checkpoint.config, "w8a16")
    plan = build_plan(checkpoint.config, "w8a16", contract.context)
    table = write_params(checkpoint, plan, folder / "params.safetensors", journal=folder / "journal")
    rows = [(ArtifactPart(whole(2)), table.rows)]
    return Task(checkpoint.config, "w8a16", contract, "exact", rows, "params.safetensors")


def test_the_child_gives_the_same_bytes(task, monkeypatch, real_export_apart):
    monkeypatch.setenv("PYTHONPATH", "")
    graphs, peak = real_export_apart(task).result()
    assert graphs == export_here(task)
    assert peak > 100 << 20  # it did import torch


def test_what_the_passes_did_is_logged_in_the_parent(task, caplog, real_export_apart):
    """A child has no console of its own."""

    def said():
        lines = [(one.name, one.getMessage()) for one in caplog.records if one.name.startswith("gemma_deploy.")]
        caplog.clear()
        return [re.sub(r"[\d.]+ s$", "", text) for _, text in lines]  # but for how long it took

    with caplog.at_level(logging.DEBUG, "gemma_deploy"):
        graphs = export_here(task)
        here = said()
        real_export_apart(task).result()
    assert said() == here
    counts = re.fullmatch(
        r"(\d+) nodes traced: (\d+) weights hidden, (\d+) nodes folded, (\d+) module outputs named, (\d+) operators "
        r"widened, (\d+) nodes simplified away; (\d+) left, ",
        here[0],
    )
    traced, hidden, folded, named, widened, simplified, left = map(int, counts.groups())
    assert traced - folded - simplified == left > 100
    assert hidden == 21  # of the one kind of layer there is, embedding and norm, in both graphs
    assert named > 20
    assert widened == 0  # of float16 alone
    nodes = {name.removesuffix(".onnx"): len(onnx.load_from_string(graph).graph.node) for name, graph in graphs.items()}
    none = "0 int8 caches, 0 inputs of linears rounded"
    assert here[1:] == [f"{name} stamped: {count} nodes, {none}" for name, count in nodes.items()]


def test_an_error_comes_back_whole(task, real_export_apart):
    whole = ExportError("what", where="there", problems=["one", "two"], expected="else", next_step="do")
    again = pickle.loads(pickle.dumps(whole))
    assert (str(again), vars(again)) == (str(whole), vars(whole))
    unknown = replace(task.config, model_type="gemma9")
    with pytest.raises(NotBuiltError, match="gemma9") as caught:
        real_export_apart(replace(task, config=unknown)).result()
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(("script", "cause"), [("kill -9 $$", "signal 9"), ("exit 3", "exit code 3")])
def test_a_child_that_dies_is_explained(task, tmp_path, monkeypatch, script, cause, real_export_apart):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(ExportError, match=cause) as caught:
        real_export_apart(task).result()
    assert "memory" in caught.value.next_step
