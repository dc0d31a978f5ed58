"""What a job says of recipe and model that do not go together, without refusing them."""

import logging

import pytest

from gemma_deploy.cli import main
from gemma_deploy.job import Job
from gemma_deploy.recipe import Recipe


@pytest.mark.parametrize(
    ("name", "told"),
    [("gemma2-int8-4224-8192", True), ("my_Gemma3", True), ("gemma-demo", False), ("gemma22b", False), ("x", False)],
)
def test_a_name_of_another_generation_is_told(name, told, caplog):
    with caplog.at_level(logging.WARNING):
        Job.open(Recipe.load("accelerator-int8", [f"name={name}"], checkpoint="demo"))
    assert (f"the artifact is called {name}, but the model is a gemma" in caplog.text) == told


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("gemma-2b-it-int8-tp4", "1.64 million parameters"),
        ("demo-1.5m", None),
        ("demo-1m", "1.64 million parameters"),
        ("demo-2m", None),
        ("demo-3m", "1.64 million parameters"),
        ("gemma-a2b", None),
        ("gemma-0b", "1.64 million parameters"),
    ],
)
def test_a_name_of_another_size_is_told(name, told, caplog):
    """The demo's tensors hold 1.64 million numbers."""
    with caplog.at_level(logging.WARNING):
        Job.open(Recipe.load("accelerator-int8", [f"name={name}"], checkpoint="demo"))
    expected = [] if told is None else [f"the artifact is called {name}, but the model has {told}"]
    assert [line.partition(":")[0] for line in caplog.messages if "is called" in line] == expected


@pytest.mark.parametrize("options", [[], ["-v"]])
def test_what_is_carried_for_the_vendor_is_said_to_those_who_ask(options, capsys, caplog, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # whose workspace holds no artifact of an earlier version
    assert main([*options, "compile", "accelerator-int8", "--checkpoint", "demo", "--dry-run"]) == 0
    said = capsys.readouterr().out + caplog.text
    assert ("carried for the vendor" in said) == bool(options)
