"""`inspect` on an artifact and on checkpoints: its figures are the manifest's and the config's own."""

import json
import re

import pytest

from gemma_deploy.cli import main
from gemma_deploy.testing import write_tiny_checkpoint


def shown(capsys, *arguments):
    code = main(["inspect", *map(str, arguments)])
    return code, capsys.readouterr()


def test_an_artifact_as_json_agrees_with_its_manifest(demo_artifact, capsys):
    code, output = shown(capsys, demo_artifact, "--json", "--params")
    facts, manifest = json.loads(output.out), json.loads((demo_artifact / "manifest.json").read_text())
    assert code == 0
    assert facts["params"] == manifest["params"]
    assert facts["artifact"]["parity"].startswith("passed")
    assert facts["artifact"]["batch, prefill, context"] == "1, 128, 256"
    stored = sum(row["nbytes"] for row in manifest["params"])
    assert sum(row["MiB"] for row in facts["parameters"]) == pytest.approx(stored / 2**20, abs=0.03)
    assert sum(row["iter0"] for row in facts["operators"]) == sum(manifest["op_census"]["iter0"].values())
    lowest = min((row["sqnr_db"], row["name"]) for row in manifest["params"] if row["sqnr_db"] is not None)
    assert facts["artifact"]["lowest SQNR"] == f"{lowest[0]:.2f} dB, {lowest[1]}"


def test_an_artifact_as_tables_shows_ports_ledger_and_stages(demo_artifact, capsys):
    code, output = shown(capsys, demo_artifact)
    assert code == 0
    for word in ("past_key_values.0.key ... (8 in all)", "[1, 257]", "QuantizedLinearPerChannel", "int8", "parameters"):
        assert word in output.out, word
    assert "model.layers.3.mlp.down_proj.weight" not in output.out
    assert "model.layers.3.mlp.down_proj.weight" in shown(capsys, demo_artifact, "--params")[1].out


def test_a_checkpoint_shows_its_config_and_its_bytes(tmp_path, capsys):
    folder = write_tiny_checkpoint(tmp_path / "tiny", "gemma3_text")
    code, output = shown(capsys, folder, "--json", "--params")
    facts = json.loads(output.out)
    assert code == 0
    assert facts["checkpoint"]["sliding window"] == "8 in 6 layers"
    assert facts["checkpoint"]["heads"] == "4, 2 for keys and values, of 32"
    assert facts["checkpoint"]["tokenizer"] == "none"
    assert facts["checkpoint"]["chat format"] == "no chat template"
    assert [row["dtype"] for row in facts["parameters"]] == ["bfloat16"]
    assert sum(tensor["nbytes"] for tensor in facts["params"]) < (folder / "model.safetensors").stat().st_size


def test_the_demo_is_a_checkpoint(capsys):
    code, output = shown(capsys, "demo")
    assert code == 0
    assert "gemma, 4 layers" in output.out
    assert re.search(r"chat format +│ gemma3 ", output.out)


def test_an_artifact_says_how_its_model_replies(demo_artifact, capsys):
    assert re.search(r"chat format +│ gemma3 ", shown(capsys, demo_artifact)[1].out)


def test_what_is_neither_is_refused_in_a_sentence(tmp_path, capsys):
    code, output = shown(capsys, tmp_path / "nothing")
    assert code == 1
    assert "there is no such file or directory" in output.err
    assert "next:" in output.err
    assert "Traceback" not in output.err


def test_what_a_graph_is_not_for_is_shown(genai_artifact, capsys):
    artifact = genai_artifact("gemma")
    capsys.readouterr()
    code, output = shown(capsys, artifact)
    assert code == 0
    said = json.loads((artifact / "manifest.json").read_text())["contract"]["not_for"]
    assert len(said) == 3
    words = " ".join(output.out.replace("│", " ").split())
    for sentence in said:
        assert sentence.split(" (")[0] in words
    assert "not for" in words


def test_a_checkpoint_and_a_workspace_are_told_apart_from_an_unfinished_artifact(demo_artifact, tmp_path, capsys):
    from gemma_deploy.paths import demo_checkpoint_dir

    assert main(["run", str(demo_checkpoint_dir()), "-p", "x"]) == 1
    said = capsys.readouterr().err
    assert "this is a checkpoint, not an artifact" in said
    assert f"gemma-deploy compile cpu-int8 --checkpoint {demo_checkpoint_dir()}" in said
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert main(["run", str(tmp_path / "model.gguf"), "-p", "x"]) == 1
    assert "this is a checkpoint" in capsys.readouterr().err
    assert main(["chat", str(demo_artifact.parent)]) == 1
    said = capsys.readouterr().err
    assert "this is a workspace, not an artifact" in said
    assert f"  - it holds {demo_artifact.name}" in said
    assert f"next: name one of them, such as {demo_artifact}" in said
    assert main(["run", str(tmp_path), "-p", "x"]) == 1
    assert "this is no finished artifact" in capsys.readouterr().err


def test_no_table_is_wider_than_the_terminal(demo_artifact, capsys, monkeypatch):
    for columns in (60, 80, 132):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert main(["inspect", str(demo_artifact), "--params"]) == 0
        shown = capsys.readouterr().out
        assert max(map(len, shown.splitlines())) <= columns
        assert "\u2026" not in shown  # nothing is cut off
    assert "model.layers.0.self_attn.q_proj.weight" in shown


def test_the_gate_is_a_table_of_its_lines(demo_artifact, capsys):
    assert main(["inspect", str(demo_artifact), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    manifest = json.loads((demo_artifact / "manifest.json").read_text())
    assert [row["compared"] for row in facts["gate"]] == [line["comparison"] for line in manifest["parity"]["lines"]]
    assert {row["verdict"] for row in facts["gate"]} == {"ok"}
    assert facts["artifact"]["parity"].startswith(f"passed, {len(facts['gate'])} gates; mean KL ")
    assert len(facts["artifact"]["parity"]) < 80
