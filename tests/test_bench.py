"""`gemma-deploy bench`: every figure on both runtimes, the formulas, and what is refused before measuring."""

import json
import shutil
from dataclasses import replace
from math import prod

import pytest

from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.backends.onnxruntime.genai import GenaiSession
from gemma_deploy.bench import figures, memory, picture, process
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.cli import main
from gemma_deploy.engine import open_engine
from gemma_deploy.errors import DeployError, UsageError
from gemma_deploy.params.table import ParamRow
from gemma_deploy.testing import TINY_EXPERTS, TINY_PER_LAYER, write_tiny_checkpoint
from tests.runtime.test_genai import without_genai

KEYS = {
    "load_s", "prefill_tok_s", "decode_tok_s", "ttft_s", "peak_rss_bytes", "artifact_bytes", "bytes_per_token",
    "bandwidth_bytes_s", "share_of_bandwidth",
}  # fmt: skip


@pytest.fixture(scope="module")
def artifact(genai_artifact):
    return genai_artifact("gemma2")


@pytest.fixture
def quick(monkeypatch):
    """Bandwidth as if it were measured, and jobs in this process; returns the jobs."""
    jobs, speeds = [], iter([7e9, 8e9] * 9)

    def here(job):
        jobs.append(job)
        return process.run(job, process.time.monotonic() - 5)

    monkeypatch.setattr(figures, "_apart", here)
    monkeypatch.setattr(figures, "bandwidth_bytes_s", lambda threads: next(speeds))
    return jobs


def test_the_command_measures_in_processes_of_their_own(artifact, capfd, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "bandwidth_bytes_s", lambda threads: 1e9)
    monkeypatch.setattr(figures.os, "getloadavg", lambda: (3.21, 0.0, 0.0))
    arguments = ["--prompt-tokens", "40", "--decode-tokens", "4", "--repeat", "1", "--threads", "1"]
    places = [tmp_path / "b.json", tmp_path / "b.png"]
    arguments += ["--contexts", "16,9999", "--json", str(places[0]), "--plot", str(places[1])]
    assert main(["bench", str(artifact), *arguments]) == 0
    out, err = capfd.readouterr()
    assert "prefill of 40 tokens" in out
    assert "the load average was 3.2 at the start" in out
    assert "contexts left out: 9999 (the artifact has 128 positions)" in out
    assert "measuring  context of 16 tokens" in err
    written = json.loads(places[0].read_text())
    assert written.keys() >= KEYS
    assert all(written[key] > 0 for key in KEYS)
    assert written["ttft_s"] > written["load_s"] + written["tokenizer_s"] + 0.05  # Python and its imports
    assert places[1].read_bytes().startswith(b"\x89PNG")


def test_every_figure_comes_from_its_own_measurement(artifact, quick):
    told = []
    measured = figures.measure(
        open_engine(artifact),
        prompt_tokens=40,
        decode_tokens=4,
        repeat=3,
        threads=1,
        contexts=(8, 126, 128, 129),
        say=told.append,
    )
    kinds = [(job.kind, job.lengths, job.decode_tokens, job.repeat) for job in quick]
    assert kinds == [
        *[("cold", [40], 4, 1)] * 3,
        ("warm", [40], 0, 3),
        ("warm", [123], 4, 3),
        ("warm", [8], 4, 3),
        ("warm", [126], 1, 3),
        ("warm", [127], 0, 3),
    ]
    assert measured["bandwidth_bytes_s"] == 8e9  # the better of before and after
    assert measured["ttft_s"] > 5
    assert len(measured["samples"]["prefill_tok_s"]) == len(measured["samples"]["decode_tok_s"]) == 3
    assert measured["prefill_tok_s"] == sorted(measured["samples"]["prefill_tok_s"])[1]
    share = measured["bytes_per_token"] * measured["decode_tok_s"] / 8e9
    assert measured["share_of_bandwidth"] == pytest.approx(share)
    assert [point["tokens"] for point in measured["contexts"]] == [8, 126, 127]
    assert (measured["contexts"][2]["decode_tok_s"], measured["left_out"]) == (None, [129])
    assert len(told) == 6


def test_all_cores_unless_told_otherwise(artifact, quick, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(figures, "bandwidth_bytes_s", lambda threads: seen.append(threads) or 1e9)
    monkeypatch.setattr(figures, "usable_cpus", lambda: 3)
    arguments = ["--prompt-tokens", "8", "--decode-tokens", "2", "--repeat", "1", "--contexts", "none"]
    assert main(["bench", str(artifact), *arguments]) == 0
    assert {job.threads for job in quick} == {0}  # as in `run`: the runtime counts the cores itself
    assert seen == [3, 3]
    assert "3 threads (all cores)" in capsys.readouterr().out
    assert main(["bench", str(artifact), *arguments, "--threads", "1"]) == 0
    assert {job.threads for job in quick} == {0, 1}
    said = capsys.readouterr().out
    assert "1 threads" in said
    assert "all cores" not in said


def test_stop_tokens_end_no_measurement(artifact, monkeypatch):
    subject = process.Subject(str(artifact), 1)
    first = subject.say([5] * 8, 31).tokens
    lengths = []
    original = GenaiSession.__init__
    monkeypatch.setattr(
        GenaiSession, "__init__", lambda self, *a, **k: lengths.append(k["min_length"]) or original(self, *a, **k)
    )
    assert len(subject.say([5] * 8, 31).tokens) == len(first) == 31
    assert lengths == [39]


def test_static_artifacts_are_measured_at_their_own_length(demo_artifact, quick):
    opened = Artifact.open(demo_artifact)
    measured = figures.measure(open_engine(opened), decode_tokens=3, repeat=1, threads=1, contexts=(64, 128))
    assert (measured["prompt_tokens"], measured["decode_after_tokens"], measured["runtime"]) == (128, 128, "static")
    assert (measured["contexts"], measured["left_out"]) == ([], [64, 128])
    assert all(measured[key] > 0 for key in KEYS)
    cache = open_engine(opened).limits.cache_bytes
    assert measured["bytes_per_token"] == memory.weight_bytes(opened) + cache
    assert cache == 2 * 256 * 4 * sum(shape_of(opened, "key"))


def shape_of(opened, kind):
    """Heads x channels of each cache of a kind."""
    ports = opened.manifest.contract.graphs["iter1"].inputs
    return [port.shape[1] * port.shape[3] for port in ports if port.name.endswith(f".{kind}")]


def test_a_token_reads_every_weight_but_rotary_tables_and_an_untied_table(artifact):
    opened = Artifact.open(artifact)
    rows = {row.name: row.nbytes for row in opened.manifest.params}
    rotary = sum(size for name, size in rows.items() if "rotary" in name)
    assert rotary > 0
    assert memory.weight_bytes(opened) == sum(rows.values()) - rotary
    model = opened.manifest.model.model_dump() | {"tie_word_embeddings": False}
    opened = replace(opened, manifest=opened.manifest.but(model=model))
    table = sum(size for name, size in rows.items() if name.startswith("model.embed_tokens."))
    assert memory.weight_bytes(opened) == sum(rows.values()) - rotary - table


@pytest.mark.parametrize(("rows", "chosen"), [(1, 3), (2, 6), (4, 8)])
def test_of_experts_a_token_reads_those_that_it_is_given(artifact, tmp_path, rows, chosen):
    """8 experts of which a token runs through 3; codes, a scale for each of their rows; every other tensor whole."""
    checkpoint = Checkpoint.open(write_tiny_checkpoint(tmp_path, "gemma4_text", num_hidden_layers=2, **TINY_EXPERTS))
    stored = [ParamRow("model.rotary_emb.full_attention.cos", "float32", (9,), 0, 36, "", "")]
    for name, info in checkpoint.tensors.items():
        stored.append(ParamRow(name, "int8", info.shape, 0, prod(info.shape), "", ""))
        if "experts" in name:
            stored.append(ParamRow(f"{name}.scale", "float32", info.shape[:1], 0, 4 * info.shape[0], "", ""))
    opened = Artifact.open(artifact)
    opened = Artifact(tmp_path, opened.manifest.but(params=stored))
    whole = sum(prod(info.shape) for info in checkpoint.tensors.values())
    of_one_expert = 2 * 96 * 64 + 64 * 96 + 4 * (2 * 96 + 64)
    experts = 2 * 8 * (2 * 96 * 64 + 64 * 96)
    assert memory.weight_bytes(opened, rows) == whole - experts + 2 * chosen * of_one_expert


def test_of_a_table_of_vectors_a_token_reads_a_row(artifact, tmp_path):
    checkpoint = Checkpoint.open(write_tiny_checkpoint(tmp_path, "gemma4_text", **TINY_PER_LAYER))
    sizes = {name: prod(info.shape) for name, info in checkpoint.tensors.items()}
    stored = [ParamRow(name, "int8", info.shape, 0, sizes[name], "", "") for name, info in checkpoint.tensors.items()]
    opened = Artifact(tmp_path, Artifact.open(artifact).manifest.but(params=stored))
    table = sizes["model.embed_tokens_per_layer.weight"]
    assert memory.weight_bytes(opened) == sum(sizes.values()) - table
    assert table == 512 * 7 * 32


def test_bandwidth_is_measured_and_its_failure_explained(monkeypatch):
    monkeypatch.setattr(memory, "BANDWIDTH", memory.BANDWIDTH.replace("1 << 28", "1 << 20"))
    assert 1e8 < memory.bandwidth_bytes_s(1) < 1e13
    monkeypatch.setattr(memory, "BANDWIDTH", "raise MemoryError('no room')")
    with pytest.raises(DeployError, match="MemoryError: no room"):
        memory.bandwidth_bytes_s(1)


def test_a_process_that_fails_is_explained(artifact, tmp_path):
    copy = shutil.copytree(artifact, tmp_path / "copy")
    (copy / "genai_config.json").unlink()
    with pytest.raises(DeployError, match=r"exit code 1\n  - error: .*genai_config.json: is missing"):
        figures._apart(process.BenchJob("cold", str(copy), 1, [8], 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt-tokens", "128"], "128 prompt tokens and 64 steps do not fit"),
        (["--prompt-tokens", "64", "--decode-tokens", "64"], "64 prompt tokens and 64 steps do not fit"),
        (["--contexts", "8,x"], "'8,x': expected numbers above 0"),
        (["--contexts", "0"], "expected numbers above 0"),
        (["--repeat", "0"], "Invalid value for '--repeat'"),
        (["--plot", "a.txt"], "expected a name that ends in .png"),
        (["--plot", "a.png", "--contexts", "none"], "--plot has nothing to draw"),
        (["--plot", "a.png", "--contexts", "129,512"], "--plot has nothing to draw"),
        (["--json", "no/such/b.json"], "its directory does not exist"),
    ],
)
def test_refused_before_anything_is_measured(artifact, capfd, monkeypatch, arguments, message):
    monkeypatch.setattr(figures, "_apart", lambda job: pytest.fail("measured"))
    monkeypatch.setattr(figures, "bandwidth_bytes_s", lambda threads: pytest.fail("measured"))
    assert main(["bench", str(artifact), *arguments]) == 2
    assert message in capfd.readouterr().err.replace("\n", " ").replace("  ", " ")


def test_without_the_package_onnx_runtime_itself_is_measured(artifact, monkeypatch, quick):
    without_genai(monkeypatch)
    monkeypatch.setattr(GenaiSession, "__init__", lambda *_, **__: pytest.fail("genai was opened"))
    measured = figures.measure(open_engine(artifact), prompt_tokens=8, decode_tokens=2, repeat=1)
    assert measured["runtime"] == "onnxruntime"
    assert all(measured[key] > 0 for key in KEYS)


def test_without_the_package_an_artifact_for_a_gpu_is_not_measured(artifact, monkeypatch, quick):
    without_genai(monkeypatch)
    opened = Artifact.open(artifact)
    recipe = opened.manifest.recipe.model_dump()
    recipe["backend"]["dtype"] = "bf16"
    engine = open_engine(replace(opened, manifest=opened.manifest.but(recipe=recipe)))
    with pytest.raises(UsageError, match="onnxruntime-genai is not installed here"):
        figures.measure(engine, prompt_tokens=8, decode_tokens=2)
    assert quick == []


def test_nothing_to_draw_is_said(tmp_path):
    with pytest.raises(DeployError, match="there is nothing to draw"):
        picture.draw({"contexts": []}, tmp_path / "x.png")
