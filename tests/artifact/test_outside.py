"""Nothing outside an artifact is reached through what its manifest, its links or genai_config.json say."""

import json
import shutil

import pytest

from gemma_deploy.artifact.check import open_whole
from gemma_deploy.artifact.commit import ArtifactDir
from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.backends.genai_config import genai_config, read_genai_config
from gemma_deploy.bounds import inside
from gemma_deploy.checkpoint.config import ModelConfig
from gemma_deploy.cli import main
from gemma_deploy.errors import ArtifactError
from gemma_deploy.testing import TINY_CONFIGS
from tests.manifests import plain_manifest

OUTSIDE = ["../x", "../../x", "/etc/passwd", "a/../../x", "a/..", "..", ".", "", "/", "a//x", "./x", "x/", "a\0b"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_paths_that_lead_out_are_no_paths(name):
    with pytest.raises(ValueError, match="not the path of a file in the artifact"):
        inside(name)


@pytest.mark.parametrize("name", ["x", "a/x.onnx", "..x", "x..", "a b", ".hidden", "bottom/rank0/params.safetensors"])
def test_paths_that_do_not(name):
    assert inside(name) == name


def change(artifact, edit):
    manifest = json.loads((artifact / "manifest.json").read_text())
    edit(manifest)
    (artifact / "manifest.json").write_text(json.dumps(manifest))


EDITS = {
    "files": lambda name: lambda m: m["files"].update({name: {"bytes": 1, "sha256": "0"}}),
    "params.0.file": lambda name: lambda m: m["params"][0].update(file=name),
    "parts.0.folder": lambda name: (
        lambda m: m["parts"].append(
            {"folder": name, "stage": "top", "layers": [0, 1], "rank": 0, "ranks": 1, "contract": m["contract"]}
        )
    ),
    "contract.graphs": lambda name: lambda m: m["contract"]["graphs"].update({name: {"inputs": [], "outputs": []}}),
}


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "bottom/../../x"])
@pytest.mark.parametrize("where", EDITS)
def test_a_manifest_that_names_something_outside_is_refused(demo_copy, where, name):
    open_whole(demo_copy)
    change(demo_copy, EDITS[where](name))
    with pytest.raises(ArtifactError, match="is damaged") as caught:
        Artifact.open(demo_copy)
    assert any(problem.startswith(where) for problem in caught.value.problems), caught.value.problems


def test_nothing_is_looked_at_outside(demo_copy, capsys):
    """Whether a file is there, and how large it is, is not told."""
    (demo_copy.parent / "secret").write_text("four")
    change(demo_copy, EDITS["files"]("../secret"))
    for command in (["inspect"], ["verify"], ["run", "-p", "x"], ["parity", "--no-fast"]):
        assert main([*command[:1], str(demo_copy), *command[1:]]) == 1
        said = capsys.readouterr().err
        assert "not the path of a file in the artifact" in said
        assert "4 bytes" not in said


@pytest.mark.parametrize("name", ["manifest.json", "tokenizer.json", "params.safetensors", "model.onnx"])
def test_links_that_lead_out_are_refused(demo_copy, name):
    elsewhere = demo_copy.parent / "elsewhere"
    elsewhere.mkdir()
    file = demo_copy / name
    if file.exists():
        file.rename(elsewhere / name)
    file.symlink_to(elsewhere / name)
    with pytest.raises(ArtifactError, match="links lead out of it") as caught:
        Artifact.open(demo_copy)
    assert caught.value.problems == (f"{name} leads to {elsewhere / name}",)


def test_so_are_folders_and_links_that_lead_nowhere(demo_copy):
    (demo_copy / "deep").mkdir()
    (demo_copy / "deep" / "bottom").symlink_to("/usr")
    (demo_copy / "gone").symlink_to("../nowhere")
    (demo_copy / "round").symlink_to("round")
    with pytest.raises(ArtifactError) as caught:
        Artifact.open(demo_copy)
    assert [problem.split(" leads")[0] for problem in caught.value.problems] == ["deep/bottom", "gone"]


def test_links_inside_and_to_the_artifact_are_no_matter(demo_copy):
    (demo_copy / "inner").symlink_to("manifest.json")
    (demo_copy.parent / "link").symlink_to(demo_copy)
    assert Artifact.open(demo_copy.parent / "link").manifest.name


@pytest.mark.parametrize("files", [[], "x", 3, {"a": 3}, {"a": {"bytes": "1", "sha256": ""}}, {"../a": {}}, None])
def test_a_list_of_files_that_is_none_is_a_damaged_artifact_for_compile(tmp_path, files):
    out = tmp_path / "a"
    out.mkdir()
    (out / "manifest.json").write_text(json.dumps(plain_manifest(key="k") | {"files": files}))
    with pytest.raises(ArtifactError, match="is damaged"), ArtifactDir(out, key="k"):
        pytest.fail("begun")
    shutil.move(out, tmp_path / "a.partial")
    with pytest.raises(Exception, match="will not be touched"), ArtifactDir(out, key="k"):
        pytest.fail("begun")


CONFIG = ModelConfig.from_dict(TINY_CONFIGS["gemma2"], "config.json")


def written(**options):
    return json.loads(json.dumps(genai_config(CONFIG, 64, **options)))


@pytest.mark.parametrize("options", [{}, {"chunk_size": 8, "windowed": (0, 1)}, {"gpu": True}])
def test_what_compile_writes_is_read(tmp_path, options):
    (tmp_path / "genai_config.json").write_text(json.dumps(written(**options)))
    found = read_genai_config(tmp_path / "genai_config.json")
    assert found.model.context_length == 64
    assert found.model.decoder.filename == "model.onnx"


def at(config, path):
    *folders, last = path
    for name in folders:
        config = config.setdefault(name, {})
    return config, last


# Each of them makes genai open a file or load a library; the first ran code of it in onnxruntime-genai 0.18.
TAKES = {
    ("model", "decoder", "session_options", "custom_ops_library"): "/tmp/evil.so",
    ("model", "decoder", "session_options", "provider_options"): [{"qnn": {"backend_path": "/tmp/evil.so"}}],
    ("model", "decoder", "session_options", "optimized_model_filepath"): "/tmp/x",
    ("model", "decoder", "session_options", "enable_profiling"): "/tmp/x",
    ("model", "decoder", "filename"): "../model.onnx",
    ("model", "decoder", "pipeline"): [{"a": {"filename": "/tmp/x.onnx"}}],
    ("model", "decoder", "run_options"): {"a": "b"},
    ("model", "encoder", "filename"): "/tmp/x.onnx",
    ("model", "vision", "filename"): "/tmp/x.onnx",
    ("model", "embedding", "filename"): "/tmp/x.onnx",
    ("engine", "x"): 1,
}


@pytest.mark.parametrize("path", TAKES, ids=".".join)
def test_what_compile_does_not_write_is_refused_before_genai_sees_it(tmp_path, path):
    config = written()
    section, last = at(config, path)
    section[last] = TAKES[path]
    (tmp_path / "genai_config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="is damaged") as caught:
        read_genai_config(tmp_path / "genai_config.json")
    assert all(problem.startswith(".".join(path[:1])) for problem in caught.value.problems)


def test_of_two_keys_it_is_not_known_which_one_genai_reads(tmp_path):
    text = json.dumps(written()).replace('"filename"', '"filename": "/tmp/x.onnx", "filename"')
    (tmp_path / "genai_config.json").write_text(text)
    with pytest.raises(ArtifactError, match="occurs twice"):
        read_genai_config(tmp_path / "genai_config.json")
