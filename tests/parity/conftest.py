"""Finished artifacts around the graphs that the runtime's tests export, and copies of them to break."""

import json
import shutil

import pytest
import yaml

from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.proving import run_parity
from gemma_deploy.recipe import Recipe
from tests import making

PREFILL, CONTEXT, BATCH = 32, 80, 2  # of the runtime's artifacts
PROMPT, STEPS = 24, 4  # three windows of 8
DTYPES = {"w8a16": "int8"}


def write_recipe(file, checkpoint, scheme="fp32", *, batch=BATCH, lengths=(PREFILL, CONTEXT), **parity):
    """Write a recipe and load it."""
    content = {
        "name": file.stem,
        "frontend": {
            "checkpoint": str(checkpoint),
            "shape": {"input_ids": [[lengths[0]], [lengths[1]]], "batch": batch},
        },
        "parity": {"prompt_tokens": PROMPT, "decode_tokens": STEPS, **parity},
        "backend": {"dtype": DTYPES.get(scheme, scheme)},
        "workspace": {"path": str(file.parent / "workspace")},
    }
    file.write_text(yaml.safe_dump(content))
    return Recipe.load(file)


def finish(graphs, checkpoint_dir, scheme, out):
    return making.finish(write_recipe(out.with_suffix(".yaml"), checkpoint_dir, scheme), graphs, out)


@pytest.fixture(scope="session")
def finished(artifacts, once):
    """(model type, scheme) -> a finished artifact, read only; its recipe names its checkpoint."""

    def get(model_type, scheme="fp32"):
        graphs = artifacts(model_type, scheme)
        return once(f"{model_type}-{scheme}", lambda out: finish(graphs, graphs.parent / "checkpoint", scheme, out))

    return get


@pytest.fixture
def copy_of(finished, tmp_path):
    """(model type, scheme) -> a copy to break."""
    return lambda *which: shutil.copytree(finished(*which), tmp_path / "copy")


def checkpoint_of(artifact):
    manifest = json.loads((artifact / "manifest.json").read_text())
    return manifest["recipe"]["frontend"]["checkpoint"]


def gate(artifact, checkpoint=None, **options):
    """The gate on an artifact, with prompts of three windows and a few steps."""
    manifest = Artifact.open(artifact).manifest
    options = {"prompt_tokens": PROMPT, "decode_tokens": STEPS, **options}
    return run_parity(artifact, checkpoint or checkpoint_of(artifact), manifest=manifest, **options)
