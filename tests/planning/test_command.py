"""`gemma-deploy plan` from outside: its table, its JSON, and recipes that compile."""

import json

import pytest

from gemma_deploy.backends.native import library
from gemma_deploy.cli import main
from gemma_deploy.planning import PRECISIONS
from gemma_deploy.planning.choices import MEASURED_KL
from gemma_deploy.planning.device import shipped_devices
from gemma_deploy.recipe import Recipe
from gemma_deploy.testing import write_tiny_checkpoint


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_recipe_that_is_written_compiles(here, capsys):
    words = ["plan", "demo", "--device", "laptop", "--backend", "onnxruntime", "--precision", "w8a16"]
    assert main([*words, "--prompt", "60", "--context", "100", "--write", "mine.yaml"]) == 0
    out = capsys.readouterr().out
    assert "start with  onnxruntime, w8a16, devices 1" in out
    recipe = Recipe.load("./mine.yaml")
    assert recipe.frontend.shape.input_ids == [[64], [112]]
    assert (recipe.backend.type, str(recipe.scheme)) == ("onnxruntime", "w8a16")
    assert main(["compile", "mine.yaml", "--no-parity"]) == 0
    assert (here / "workspace" / recipe.name / "manifest.json").is_file()


@pytest.mark.parametrize("backend", ["tvm_vacc", "onnxruntime", "native", "gguf", "vllm"])
def test_every_precision_that_is_not_left_out_is_a_recipe_that_plans(here, capsys, backend):
    """As `compile --dry-run` sees it, calibrated ones too; what is left out is what it refuses."""
    if backend == "native" and not (library.FOLDER / library.LIBRARY).is_file():
        pytest.skip("the library of backend.type native was not built")
    words = ["plan", "demo", "--device", "two-cores", "--backend", backend, "--json", "plan.json"]
    assert main(words) == 0
    rows = json.loads((here / "plan.json").read_text())["rows"]
    assert [row["choice"]["precision"] for row in rows] == list(PRECISIONS)
    built = [row["choice"]["precision"] for row in rows if not row["refused"]]
    assert built
    for precision in (built[0], built[-1]):
        assert main([*words[:-2], "--precision", precision, "--write", f"{precision}.yaml"]) == 0
        assert main(["compile", f"{precision}.yaml", "--dry-run", "--no-parity"]) == 0  # engines need not be here
        assert "nothing has been written" in capsys.readouterr().out


def test_the_json_has_every_row_and_the_recipe(here, capsys):
    checkpoint = write_tiny_checkpoint(here / "tiny", "gemma3_text")
    assert main(["plan", str(checkpoint), "--device", "gpu-80gb", "--json", "plan.json"]) == 0
    plan = json.loads((here / "plan.json").read_text())
    assert {row["choice"]["backend"] for row in plan["rows"]} == {"vllm", "onnxruntime"}
    row = next(row for row in plan["rows"] if row["choice"]["precision"] == "bf16")
    parts = {key: value for key, value in row["sizes"].items() if key not in ("total", "all_weights")}
    assert row["sizes"]["total"] == sum(parts.values())
    assert row["fits"] is True
    assert row["speed"]["is_bound"] is True
    assert Recipe.from_text(plan["recipe"], env={}).backend.type == plan["proposed"]["backend"]
    out = capsys.readouterr().out
    assert "<=: no share of the device's rates was measured" in out
    assert "left out: onnxruntime, w8a16" in out


@pytest.mark.parametrize("name", shipped_devices())
def test_shipped_devices_plan_the_bundled_model(name, capsys):
    assert main(["plan", "demo", "--device", name, "--precision", "fp32"]) == 0
    assert "start with" in capsys.readouterr().out


REFUSED = {
    "nothing named": ([], "name a CHECKPOINT"),
    "two devices": (["demo", "--device", "laptop", "--measure", "x.yaml"], "two devices"),
    "a recipe of nothing": (["--measure", "x.yaml", "--write", "r.yaml"], "name a CHECKPOINT"),
    "a prompt too long": (["demo", "--device", "laptop", "--prompt", "300", "--context", "200"], "is longer than"),
    "no place": (["demo", "--device", "laptop", "--write", "no/such/r.yaml"], "its directory does not exist"),
    "another's back end": (["demo", "--device", "gpu-80gb", "--backend", "native"], "is no back end of"),
}


@pytest.mark.parametrize(("words", "said"), REFUSED.values(), ids=REFUSED)
def test_what_makes_no_sense_is_refused_before_anything_is_measured(here, capsys, words, said):
    assert main(["plan", *words]) == 2
    assert said in capsys.readouterr().err
    assert not list(here.iterdir())


def test_a_model_that_fits_nowhere_ends_with_1(here, capsys):
    (here / "d.yaml").write_text(
        "name: thimble\nkind: cpu\nmemory_gb: 0.001\nbandwidth_gb_s: 1\nint8_tops: 1\nfp16_tflops: 1\nfp32_tflops: 1\n"
        "backends: [native]\n"
    )
    assert main(["plan", "demo", "--device", "d.yaml", "--write", "r.yaml"]) == 1
    out, err = capsys.readouterr()
    assert "nothing fits on thimble" in err
    assert "shorter --context" in out
    assert not (here / "r.yaml").exists()


def test_measured_losses_are_of_back_ends_and_precisions_that_there_are():
    from gemma_deploy.backends import ROWS

    assert {backend for backend, _ in MEASURED_KL} <= set(ROWS)
    assert {precision for _, precision in MEASURED_KL} <= set(PRECISIONS)
