"""`verify` names every damaged file and tensor, whatever was damaged, and passes what is whole."""

import json
import shutil
from dataclasses import replace

import onnx
import pytest

from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.backends.onnxruntime import head
from gemma_deploy.cli import main
from gemma_deploy.errors import ArtifactError
from gemma_deploy.testing import write_tiny_checkpoint
from gemma_deploy.verifying import _shows_whole_rows, verify

FILES = {
    "manifest.json",
    "iter0.onnx",
    "iter1.onnx",
    "params.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "report.html",
}


def problems(path, **options):
    with pytest.raises(ArtifactError) as caught:
        verify(path, **options)
    assert caught.value.where == str(path)
    assert "compile the recipe again" in caught.value.next_step
    return caught.value.problems


def flip(file, at, bit=0):
    data = bytearray(file.read_bytes())
    data[at] ^= 1 << bit
    file.write_bytes(data)


def change_manifest(path, change):
    file = path / "manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))


def change_graph(path, change, name="iter1.onnx"):
    """Change a graph and let the manifest agree with the new bytes, as a faulty compiler would have written it."""
    file = path / name
    model = onnx.load(str(file), load_external_data=False)
    change(model)
    file.write_bytes(model.SerializeToString())
    from gemma_deploy.artifact.commit import _sha256

    facts = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
    change_manifest(path, lambda manifest: manifest["files"].update({name: facts}))


def test_a_whole_artifact_passes_and_has_exactly_the_files_of_the_contract(demo_artifact):
    assert {file.name for file in demo_artifact.iterdir()} == FILES
    checked = verify(demo_artifact)
    rows = len(Artifact.open(demo_artifact).manifest.params)
    assert any(f"{rows} tensors" in line for line in checked)
    assert sum("full check" in line for line in checked) == 2


def test_progress_reaches_the_end(demo_artifact):
    seen = []
    verify(demo_artifact, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == sum(row.nbytes for row in Artifact.open(demo_artifact).manifest.params)


@pytest.mark.parametrize("name", sorted(FILES - {"manifest.json", "params.safetensors"}))
def test_one_flipped_bit_in_any_file_is_named(demo_copy, name):
    file = demo_copy / name
    flip(file, file.stat().st_size // 2)
    assert f"{name}: sha256 differs from the manifest" in problems(demo_copy, deep=False)


@pytest.mark.parametrize("which", [0, 7, -1])
def test_one_flipped_bit_in_a_tensor_names_the_tensor(demo_copy, which):
    row = Artifact.open(demo_copy).manifest.params[which]
    flip(demo_copy / "params.safetensors", row.offset + row.nbytes - 1, bit=6)
    (problem,) = problems(demo_copy)
    assert problem.startswith(f"{row.name}: sha256 is")


def test_a_flipped_bit_in_the_header_of_the_parameters(demo_copy):
    flip(demo_copy / "params.safetensors", 40)
    assert problems(demo_copy) == ("params.safetensors: the header differs from the parameter table",)


def test_quick_looks_at_the_size_of_the_parameters_only(demo_copy):
    params = demo_copy / "params.safetensors"
    flip(params, params.stat().st_size - 1)
    verify(demo_copy, deep=False)
    with params.open("ab") as file:
        file.write(b"x")
    assert any(problem.startswith("params.safetensors has") for problem in problems(demo_copy, deep=False))


def test_changed_rows_in_the_manifest(demo_copy):
    change_manifest(demo_copy, lambda manifest: manifest["params"][3].update(sha256="0" * 64))
    found = problems(demo_copy)
    assert "params.safetensors: the rows in manifest.json are not the ones it was written with" in found


def test_everything_wrong_is_told_at_once(demo_copy):
    (demo_copy / "tokenizer.json").unlink()
    (demo_copy / "notes.txt").write_text("mine")
    flip(demo_copy / "config.json", 3)
    row = Artifact.open(demo_copy).manifest.params[0]
    flip(demo_copy / "params.safetensors", row.offset)
    found = "\n".join(problems(demo_copy))
    parts = ("tokenizer.json is missing", "notes.txt does not belong", "config.json: sha256", f"{row.name}: sha256")
    for part in parts:
        assert part in found, part


@pytest.mark.parametrize("name", ["params.safetensors", "iter0.onnx"])
def test_a_missing_file_is_no_crash(demo_copy, name):
    (demo_copy / name).unlink()
    assert f"{name} is missing" in problems(demo_copy)


def test_another_format_version(demo_copy):
    change_manifest(demo_copy, lambda manifest: manifest.update(format_version=99))
    with pytest.raises(ArtifactError, match="format_version is 99") as caught:
        verify(demo_copy)
    assert caught.value.expected == "2"


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "is not JSON"), ("[]", "holds a list, expected an object"), ('"a"', "holds text, expected an object")],
)
def test_a_manifest_that_is_none(demo_copy, text, words):
    (demo_copy / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match=words):
        verify(demo_copy)


def test_keys_missing_from_the_manifest_are_listed(demo_copy):
    change_manifest(demo_copy, lambda manifest: [manifest.pop(key) for key in ("contract", "params")])
    with pytest.raises(ArtifactError) as caught:
        verify(demo_copy)
    assert caught.value.problems == ("contract: field required", "params: field required")


def test_an_unfinished_directory_and_none_at_all(demo_copy, tmp_path):
    (demo_copy / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match="no finished artifact"):
        verify(demo_copy)
    with pytest.raises(ArtifactError, match="no such directory"):
        verify(tmp_path / "nowhere")


def external(model, name):
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def test_a_graph_that_points_elsewhere_in_the_parameters(demo_copy):
    """Every hash is right and the graph is valid, but it would compute with another matrix."""
    first, second = "model.layers.0.mlp.gate_proj.weight", "model.layers.1.mlp.gate_proj.weight"

    def swap(model):
        one, two = (external(model, name).external_data for name in (first, second))
        for entry, other in zip(one, two, strict=True):
            entry.value, other.value = other.value, entry.value

    change_graph(demo_copy, swap)
    found = problems(demo_copy)
    assert len(found) == 2
    assert {problem.split(" points to")[0] for problem in found} == {f"iter1.onnx: {name}" for name in (first, second)}


def test_a_graph_that_points_to_another_file(demo_copy):
    shutil.copy(demo_copy / "params.safetensors", demo_copy / "tokenizer_config.json")

    def elsewhere(model):
        entries = {entry.key: entry for entry in external(model, "model.norm.weight").external_data}
        entries["location"].value = "tokenizer_config.json"

    change_graph(demo_copy, elsewhere)
    assert any("model.norm.weight points to ('tokenizer_config.json'" in problem for problem in problems(demo_copy))


def test_weights_inside_a_graph(demo_copy):
    def inline(model):
        tensor = external(model, "model.layers.0.mlp.down_proj.weight")
        size = tensor.dims[0] * tensor.dims[1]
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]
        tensor.raw_data = bytes(size)

    change_graph(demo_copy, inline)
    assert any("down_proj.weight lies inside the graph" in problem for problem in problems(demo_copy))


def test_an_invalid_graph(demo_copy):
    change_graph(demo_copy, lambda model: model.graph.node[5].input.__setitem__(0, "nowhere"))
    assert any(problem.startswith("iter1.onnx: ") and "nowhere" in problem for problem in problems(demo_copy))


def test_a_weight_without_a_row(demo_copy):
    def rename(model):
        external(model, "model.norm.weight").name = "stranger"
        for node in model.graph.node:
            node.input[:] = ["stranger" if name == "model.norm.weight" else name for name in node.input]

    change_graph(demo_copy, rename)
    assert "iter1.onnx: stranger has no row in the manifest" in problems(demo_copy)


def test_the_tied_table_twice(demo_copy):
    def double(manifest):
        table = next(row for row in manifest["params"] if row["name"] == "model.embed_tokens.weight")
        manifest["params"].append(table | {"name": "lm_head.weight"})

    change_manifest(demo_copy, double)
    expected = "params.safetensors: token tables stored: model.embed_tokens.weight, lm_head.weight; expected 1"
    assert expected in problems(demo_copy, deep=False)


# Views: graphs for ONNX Runtime show several tensors as one, or some rows of one.


@pytest.fixture(scope="module")
def viewed(once):
    """An artifact whose graph has views, codes of 8 bits and tables with a scale for groups; read only."""

    def make(folder):
        checkpoint = write_tiny_checkpoint(folder / "checkpoint", "gemma2", num_hidden_layers=2)
        recipe = folder / "recipe.yaml"
        recipe.write_text(
            f"name: x\nfrontend: {{checkpoint: '{checkpoint}', shape: {{input_ids: [[32], [64]]}}}}\n"
            "backend: {type: onnxruntime, dtype: int8, compile: {prefill: lean}}\n"
            f"workspace: {{path: '{folder}'}}\n"
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(head, "HEAD_BYTES", 10000)
            assert main(["compile", str(recipe), "--no-parity"]) == 0

    return once("verify-onnxruntime", make) / "x"


@pytest.fixture
def viewed_copy(viewed, tmp_path):
    return shutil.copytree(viewed, tmp_path / "x")


def shown_as(path, name, start, length):
    """Let a view show other bytes of the parameter file."""

    def change(model):
        values = {"offset": str(start), "length": str(length)}
        for entry in external(model, name).external_data:
            entry.value = values.get(entry.key, entry.value)

    change_graph(path, change, "model.onnx")


def row_of(path, name):
    return Artifact.open(path).manifest.table[name]


QKV = "model.layers.0.self_attn.qkv_proj.blocks"


def test_views_of_several_tensors_and_of_some_rows_pass(viewed):
    verify(viewed)
    model = onnx.load(str(viewed / "model.onnx"), load_external_data=False)
    assert {QKV, "lm_head.0.blocks", "lm_head.3.blocks"} <= {tensor.name for tensor in model.graph.initializer}


@pytest.mark.parametrize(
    ("start", "length"),
    [
        (32, 64),  # from the middle of a row on
        (0, 96),  # to the middle of one
        (64, 64 * 64 + 32),  # from a row of one matrix to the middle of a row of the next
        (-32, 64),  # over the border of two tensors
    ],
)
def test_a_view_that_cuts_a_row(viewed_copy, start, length):
    row = row_of(viewed_copy, "model.layers.0.self_attn.k_proj.weight")
    shown_as(viewed_copy, QKV, row.offset + start, length)
    assert problems(viewed_copy) == (f"model.onnx: {QKV} has no row in the manifest",)


def test_a_view_behind_the_file_or_of_nothing(viewed_copy):
    last = max(Artifact.open(viewed_copy).manifest.params, key=lambda row: row.offset)
    shown_as(viewed_copy, QKV, last.offset, last.nbytes + 64)
    assert any(problem.startswith("model.onnx: ") for problem in problems(viewed_copy))
    shown_as(viewed_copy, QKV, last.offset, 0)
    assert any(problem.startswith("model.onnx: ") for problem in problems(viewed_copy))


def test_a_view_of_another_size_than_its_shape(viewed_copy):
    """Whole rows, but a row less than the kernel will read."""
    row = row_of(viewed_copy, "model.layers.0.self_attn.k_proj.weight")
    q, v = (row_of(viewed_copy, f"model.layers.0.self_attn.{name}_proj.weight") for name in "qv")
    whole = q.nbytes + row.nbytes + v.nbytes
    shown_as(viewed_copy, QKV, q.offset, q.nbytes + row.nbytes)
    expected = f"model.onnx: {QKV} shows {q.nbytes + row.nbytes} bytes, its shape and dtype say {whole}"
    assert expected in problems(viewed_copy)


def test_a_view_over_a_gap(viewed_copy):
    """Rows that do not lie behind one another, as another writer might leave them."""
    one, two = (row_of(viewed_copy, f"model.layers.0.self_attn.{name}_proj.weight") for name in "qk")
    rows = (one, replace(two, offset=two.offset + 64))
    whole = "params.safetensors", one.offset, one.nbytes + two.nbytes
    assert _shows_whole_rows((one, two), whole)
    assert not _shows_whole_rows(rows, whole)
    assert not _shows_whole_rows(rows, ("params.safetensors", one.offset, whole[2] + 64))
    assert not _shows_whole_rows((one, two), ("config.json", *whole[1:]))
