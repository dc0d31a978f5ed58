"""The second checkpoint of a shape exports nothing, and what lies in the cache is never taken on trust."""

import os
import zipfile

import pytest
import yaml

from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.cli import main
from gemma_deploy.graph import worker
from gemma_deploy.job import Job
from gemma_deploy.recipe import Recipe
from gemma_deploy.stages import graph_cache
from gemma_deploy.stages.graph_cache import GraphCache, folder_of_user
from gemma_deploy.stages.keys import graph_cache_key, stage_keys
from gemma_deploy.testing import TINY_EXPERTS, write_tiny_checkpoint
from tests.exporting import export_in_this_process

GRAPHS = {"iter0.onnx": b"zero" * 50, "iter1.onnx": b"one"}


@pytest.fixture
def exported(tmp_path, monkeypatch):
    """The tasks that were exported; graphs are kept in tmp_path/cache."""
    monkeypatch.setenv(graph_cache.VARIABLE, str(tmp_path / "cache"))
    tasks = []

    def export(task):
        tasks.append(task)
        return export_in_this_process(task)

    monkeypatch.setattr(worker, "export_apart", export)
    return tasks


def compiled(folder, *, seed=0, shape=([32], [64]), dtype="int8"):
    checkpoint = write_tiny_checkpoint(folder / "checkpoint", "gemma3_text", seed=seed, num_hidden_layers=2)
    content = {
        "name": "x",
        "frontend": {"checkpoint": str(checkpoint), "shape": {"input_ids": [*shape]}},
        "backend": {"dtype": dtype},
        "parity": {"prompt_tokens": 16, "decode_tokens": 2},
        "workspace": {"path": str(folder / "workspace")},
    }
    (folder / "x.yaml").write_text(yaml.safe_dump(content))
    assert main(["compile", str(folder / "x.yaml"), "--no-parity"]) == 0
    return Artifact.open(folder / "workspace/x")


def test_another_checkpoint_of_the_shape_exports_nothing_and_gets_its_own_weights(tmp_path, exported):
    first, second = (compiled(tmp_path / name, seed=seed) for seed, name in enumerate(("first", "second")))
    assert len(exported) == 1
    assert first.manifest.table.digest != second.manifest.table.digest
    for graph in ("iter0.onnx", "iter1.onnx"):
        assert (first.path / graph).read_bytes() == (second.path / graph).read_bytes()
    assert main(["parity", str(second.path)]) == 0


@pytest.mark.parametrize("changes", [{"shape": ([16], [48])}, {"dtype": "fp32"}])
def test_another_graph_is_exported(tmp_path, exported, changes):
    compiled(tmp_path / "first")
    compiled(tmp_path / "second", **changes)
    assert len(exported) == 2


@pytest.mark.parametrize(
    ("backend", "kind", "own", "changes", "same"),
    [
        ("onnxruntime", "gemma4_text", TINY_EXPERTS, {"top_k_experts": 2}, False),
        ("tvm_vacc", "gemma3n_text", {}, {"activation_sparsity_pattern": [0.5] * 7}, False),
        ("tvm_vacc", "gemma3_text", {}, {"transformers_version": "5.0.0", "torch_dtype": "float32"}, True),
    ],
)
def test_what_no_shape_tells_has_graphs_of_its_own(tmp_path, backend, kind, own, changes, same):
    found = []
    for name, more in (("one", {}), ("other", changes)):
        checkpoint = write_tiny_checkpoint(tmp_path / name, kind, **{**own, **more})
        content = {
            "name": "x",
            "frontend": {"checkpoint": str(checkpoint), "shape": {"input_ids": [[32], [64]]}},
            "backend": {"type": backend, "dtype": "int8"},
            "workspace": {"path": str(tmp_path)},
        }
        (tmp_path / "x.yaml").write_text(yaml.safe_dump(content))
        job = Job.open(Recipe.load(tmp_path / "x.yaml"))
        found.append((graph_cache_key(job, {}, None, unrounded=None), stage_keys(job, None).graphs))
    assert [one == other for one, other in zip(*found, strict=True)] == [same, same]


def test_what_was_kept_comes_back(tmp_path):
    cache = GraphCache(tmp_path)
    cache.put("key", GRAPHS)
    assert cache.get("key", list(GRAPHS)) == GRAPHS
    assert cache.get("other", list(GRAPHS)) is None
    assert cache.get("key", ["iter0.onnx"]) is None
    assert [file.name for file in (tmp_path / "graphs").iterdir()] == ["key.graphs"]


def damage_the_middle(file):
    data = bytearray(file.read_bytes())
    data[45] ^= 0xFF  # inside the first graph
    file.write_bytes(data)


def claim_to_be_large(file):
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("iter0.onnx", bytes(4096))
        packed.writestr("iter1.onnx", b"")


@pytest.mark.parametrize(
    "damage",
    [
        damage_the_middle,
        claim_to_be_large,
        lambda file: file.write_bytes(file.read_bytes()[:-30]),
        lambda file: file.write_bytes(b""),
        lambda file: (file.unlink(), file.mkdir()),
    ],
)
def test_what_is_damaged_is_not_used(tmp_path, monkeypatch, damage):
    monkeypatch.setattr(graph_cache, "MOST_GRAPH_BYTES", 2048)
    cache = GraphCache(tmp_path)
    cache.put("key", GRAPHS)
    damage(tmp_path / "graphs/key.graphs")
    assert cache.get("key", list(GRAPHS)) is None


def test_what_was_not_used_for_longest_goes_first(tmp_path, monkeypatch):
    monkeypatch.setattr(graph_cache, "MOST_BYTES", 3500)
    cache = GraphCache(tmp_path)
    for number, name in enumerate("abc"):
        cache.put(name, {"graph": os.urandom(1000)})
        os.utime(tmp_path / f"graphs/{name}.graphs", (number, number))
    assert cache.get("a", ["graph"])  # used again, so that b is the oldest
    cache.put("d", {"graph": os.urandom(1000)})
    assert [cache.get(name, ["graph"]) is not None for name in "abcd"] == [True, False, True, True]


def test_a_folder_that_is_none_is_told_once_with_what_to_do(tmp_path, caplog):
    (tmp_path / "file").write_text("mine")
    kept = GraphCache(tmp_path / "file" / "below")
    with caplog.at_level("INFO"):
        assert kept.get("key", ["a.onnx"]) is None
        kept.put("key", {"a.onnx": b"1"})
    (said,) = caplog.messages
    assert said.endswith("Not a directory; set GEMMA_DEPLOY_CACHE to a folder that you may write to, or to off")


def test_a_folder_that_cannot_be_written_to_is_no_reason_to_fail(tmp_path):
    (tmp_path / "graphs").write_text("a file")
    cache = GraphCache(tmp_path)
    cache.put("key", GRAPHS)
    assert cache.get("key", list(GRAPHS)) is None


def test_where_it_lies(monkeypatch, tmp_path):
    monkeypatch.delenv(graph_cache.VARIABLE)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert folder_of_user() == tmp_path / ".cache/gemma-deploy"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert folder_of_user() == tmp_path / ".cache/gemma-deploy"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert folder_of_user() == tmp_path / "xdg/gemma-deploy"
    monkeypatch.setenv(graph_cache.VARIABLE, str(tmp_path / "given"))
    assert folder_of_user() == tmp_path / "given"
    monkeypatch.setenv(graph_cache.VARIABLE, "~/kept")  # as a file of settings has it, which no shell expands
    assert folder_of_user() == tmp_path / "kept"
    monkeypatch.setenv(graph_cache.VARIABLE, "off")
    assert folder_of_user() is None
    GraphCache(None).put("key", GRAPHS)
    assert GraphCache(None).get("key", list(GRAPHS)) is None
