"""Each input of a compile changes the keys of the stages that read it, and of no other."""

import json
import os
import shutil

import pytest
import yaml

from gemma_deploy import paths, provenance
from gemma_deploy.calibration.pipeline import Request, dataset_record, describe_inputs, fingerprint_of
from gemma_deploy.calibration.sources import SOURCES
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.job import Job
from gemma_deploy.provenance import version_of
from gemma_deploy.recipe import Recipe
from gemma_deploy.stages.calibration import calibration_request
from gemma_deploy.stages.keys import stage_keys
from gemma_deploy.testing import write_tiny_checkpoint
from tests.calibration.make import write_tokenizer
from tests.text.make import write_gguf

PLAIN = {"backend": {"type": "tvm_vacc", "dtype": "fp32"}}
HALF = {"backend": {"type": "tvm_vacc", "dtype": "fp16"}, "dataset": {"name": "c4:4", "seqlen": 32}}
CALIBRATED = {
    "backend": {"type": "tvm_vacc", "dtype": "int8"},
    "quantize": {"type": "w8a16_gptq"},
    "dataset": {"name": "c4:4", "seqlen": 32},
}
CACHED = {**CALIBRATED, "quantize": {"type": "w8a16+kv8"}}
DYNAMIC = {"backend": {"type": "onnxruntime", "dtype": "int8"}}
ALL = {"ranges", "quantize", "cache", "parameters", "graphs", "files", "sensitivity", "gate"}


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A folder with a checkpoint, a GGUF file, a text, and source_code/ of its own."""
    path = write_tiny_checkpoint(tmp_path / "ck", "gemma", num_hidden_layers=2)
    write_tokenizer(path)
    write_gguf(tmp_path / "model.gguf", "gemma")
    (path / "generation_config.json").write_text('{"eos_token_id": [1]}')
    (tmp_path / "prompts.txt").write_text("a text " * 99)
    for name in ("source_code_dir", "calib_dir"):
        shutil.copytree(getattr(paths, name)(), tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        monkeypatch.setattr(paths, name, lambda copy=tmp_path / name: copy)
    forget()
    yield tmp_path
    forget()


def forget():
    """What is kept of files while a program runs."""
    provenance.code_of.cache_clear()
    provenance._bytes_of.cache_clear()


def keys_of(world, case, checkpoint="ck"):
    quantize = {"quantize": case["quantize"]} if "quantize" in case else {}
    content = {
        "name": "x",
        "frontend": {"checkpoint": str(world / checkpoint), "shape": {"input_ids": [[16], [32]]}} | quantize,
        "backend": case["backend"],
        "dataset": case.get("dataset", {}),
        "parity": {"prompt_tokens": 16, "decode_tokens": 4} | case.get("parity", {}),
        "workspace": {"path": str(world)},
    }
    (world / "recipe.yaml").write_text(yaml.safe_dump(content))
    job = Job.open(Recipe.load(world / "recipe.yaml"))
    request = calibration_request(job)
    dataset = None if request is None else dataset_record(job.checkpoint, request)
    found = stage_keys(job, dataset)
    return {stage: getattr(found, stage) for stage in ALL if getattr(found, stage) is not None}


def edit(file, **changes):
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | changes))


def other_version(library):
    def change(world, patch):
        patch.setattr(provenance, "version_of", lambda name: "0" if name == library else version_of(name))

    return change


def append(name, text):
    def change(world, patch):
        with (world / name).open("a") as file:
            file.write(text)

    return change


CHANGES = {
    "generation config": lambda world, _: edit(world / "ck/generation_config.json", eos_token_id=[1, 7]),
    "another key of it": lambda world, _: edit(world / "ck/generation_config.json", temperature=0.5),
    "tokenizer": lambda world, _: edit(world / "ck/tokenizer.json", truncation=None),
    "template": lambda world, _: (world / "ck/chat_template.jinja").write_text("{{ messages[0].content }}<eos>"),
    "weights": lambda world, _: os.utime(world / "ck/model.safetensors", ns=(1, 1)),
    "gguf weights": lambda world, _: os.utime(world / "model.gguf", ns=(1, 1)),
    "modeling": append("source_code_dir/layers_vacc.py", "# a comment\n"),
    "its table": append("source_code_dir/config.json", "\n"),
    "bundled text": lambda world, _: shutil.copy(world / "prompts.txt", world / "calib_dir" / SOURCES["c4"].bundled),
    "text of the gate": append("prompts.txt", "more"),
    **{name: other_version(name) for name in ("datasets", "tokenizers", "numpy", "gguf")},
}
OWN_TEXT = {**PLAIN, "parity": {"text": "prompts.txt"}}
CALIBRATION = {"quantize", "parameters", "graphs", "sensitivity", "gate"}
# (what is compiled, of which checkpoint, what changes): the stages whose keys change
EXPECTED = [
    (PLAIN, "ck", "generation config", {"files"}),
    (CALIBRATED, "ck", "generation config", {"files"}),
    (PLAIN, "ck", "another key of it", {"files"}),
    (PLAIN, "ck", "tokenizer", {"files", "gate"}),
    (CALIBRATED, "ck", "tokenizer", {"files", *CALIBRATION}),
    (PLAIN, "ck", "template", {"files", "gate"}),
    (PLAIN, "ck", "weights", {"parameters", "gate"}),
    (CALIBRATED, "ck", "weights", CALIBRATION),
    (HALF, "ck", "weights", {"ranges", "parameters", "graphs", "gate"}),
    (CACHED, "ck", "weights", {"cache", "parameters", "graphs", "gate"}),
    (PLAIN, "ck", "modeling", {"graphs", "gate"}),
    (PLAIN, "ck", "its table", {"graphs", "gate"}),
    (DYNAMIC, "ck", "its table", {"gate"}),
    (CALIBRATED, "ck", "its table", CALIBRATION),
    (OWN_TEXT, "ck", "text of the gate", {"gate"}),
    (PLAIN, "ck", "text of the gate", set()),
    (OWN_TEXT, "ck", "bundled text", set()),
    (PLAIN, "ck", "datasets", {"gate"}),
    (CALIBRATED, "ck", "datasets", CALIBRATION),
    (HALF, "ck", "datasets", {"ranges", "parameters", "graphs", "gate"}),
    (CACHED, "ck", "datasets", {"cache", "parameters", "graphs", "gate"}),
    (PLAIN, "ck", "tokenizers", {"files", "gate"}),
    (CALIBRATED, "ck", "tokenizers", {"files", *CALIBRATION}),
    (DYNAMIC, "ck", "numpy", {"parameters", "graphs", "files", "gate"}),
    (PLAIN, "ck", "gguf", set()),
    (CALIBRATED, "ck", "gguf", set()),
    (PLAIN, "model.gguf", "gguf", {"parameters", "gate"}),
    (PLAIN, "model.gguf", "gguf weights", {"parameters", "gate"}),
]


def id_of(value):
    return value if isinstance(value, str) else None


@pytest.mark.parametrize(("case", "checkpoint", "change", "expected"), EXPECTED, ids=id_of)
def test_the_stages_that_read_an_input(world, monkeypatch, case, checkpoint, change, expected):
    monkeypatch.chdir(world)
    before = keys_of(world, case, checkpoint)
    forget()
    assert keys_of(world, case, checkpoint) == before
    CHANGES[change](world, monkeypatch)
    forget()
    after = keys_of(world, case, checkpoint)
    assert after.keys() == before.keys()
    assert {stage for stage in after if after[stage] != before[stage]} == expected


def test_the_bundled_text_is_an_input_of_the_gate(world):
    """Read by the gate alone: a calibration names its own text."""
    before = keys_of(world, PLAIN)
    CHANGES["bundled text"](world, None)
    after = keys_of(world, PLAIN)
    assert {stage for stage in after if after[stage] != before[stage]} == {"gate"}


def test_a_text_of_the_gate_that_is_no_file_is_not_waited_for(world, monkeypatch):
    """Preflight names it; see there."""
    monkeypatch.chdir(world)
    os.mkfifo(world / "pipe")
    known = keys_of(world, OWN_TEXT)
    found = keys_of(world, {**PLAIN, "parity": {"text": "pipe"}})
    assert found["gate"] != known["gate"]


@pytest.mark.parametrize("case", [PLAIN, DYNAMIC])
@pytest.mark.parametrize("spelled", ["ck/", "../{name}/ck", "link"])
def test_the_spelling_of_a_path_is_no_input(world, case, spelled):
    (world / "link").symlink_to("ck")
    assert keys_of(world, case, spelled.format(name=world.name)) == keys_of(world, case)


@pytest.mark.parametrize("change", ["datasets", "tokenizers", "numpy", "tokenizer", "weights", "modeling", "its table"])
def test_a_calibration_of_other_inputs_is_another(world, monkeypatch, change):
    def fingerprint():
        forget()
        checkpoint, request = Checkpoint.open(world / "ck"), Request("c4", None, 4, 32)
        from gemma_deploy.calibration.datasets import locate

        return fingerprint_of(describe_inputs(checkpoint, request, locate(request.mix.parts, request.nsamples)))

    before = fingerprint()
    assert fingerprint() == before
    CHANGES[change](world, monkeypatch)
    assert fingerprint() != before


@pytest.mark.parametrize("change", ["generation config", "gguf"])
def test_what_a_calibration_does_not_read_is_no_input_of_it(world, monkeypatch, change):
    request = Request("c4", None, 4, 32)
    before = describe_inputs(Checkpoint.open(world / "ck"), request, [])
    CHANGES[change](world, monkeypatch)
    forget()
    assert describe_inputs(Checkpoint.open(world / "ck"), request, []) == before


def test_a_calibration_of_a_gguf_file_knows_what_reads_it(world, monkeypatch):
    request = Request("c4", None, 4, 32)
    before = describe_inputs(Checkpoint.open(world / "model.gguf"), request, [])
    CHANGES["gguf"](world, monkeypatch)
    assert describe_inputs(Checkpoint.open(world / "model.gguf"), request, []) != before
