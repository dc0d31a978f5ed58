"""Built-in recipes are found by their names, in any folder and in a wheel; unknown names get the nearest ones."""

import re
import resource

import pytest
import yaml

from gemma_deploy.cli import main
from gemma_deploy.errors import RecipeError
from gemma_deploy.paths import build_in_dir
from gemma_deploy.recipe import Recipe
from gemma_deploy.recipe.catalogue import FORMER_NAMES, GOAL, find_recipe, shipped_recipes

KINDS = {"cpu", "accelerator", "native", "vllm", "gguf", "openvino", "tvm"}
ALL = {recipe.name: recipe for recipe in shipped_recipes()}


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A current directory without recipes."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("recipe", ALL.values(), ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("form", ["{}", "{}.yaml", "build_in/{}.yaml", "build_in/{}"])
def test_a_name_is_enough_in_any_folder(recipe, form, elsewhere):
    for name in (recipe.name, recipe.name.upper(), *filter(None, [recipe.former])):
        assert find_recipe(form.format(name)) == recipe.file


@pytest.mark.parametrize(("former", "name"), FORMER_NAMES.items())
def test_former_names_and_their_paths_mean_the_same_file(former, name, monkeypatch):
    file = build_in_dir() / f"{name}.yaml"
    assert find_recipe(former) == find_recipe(build_in_dir() / f"{former}.yaml") == file
    monkeypatch.chdir(build_in_dir() / "vendor")
    assert find_recipe(f"../{former}.yaml") == file


def test_a_file_wins_where_a_path_or_a_suffix_is_given_and_a_bare_word_is_the_built_in_one(elsewhere):
    (elsewhere / "cpu-int8.yaml").write_text("mine")
    (elsewhere / "cpu-int8").write_text("mine")
    (elsewhere / "build_in").mkdir()
    (elsewhere / "build_in" / "cpu-int8.yaml").write_text("mine")
    assert find_recipe("cpu-int8") == ALL["cpu-int8"].file
    for own in ("cpu-int8.yaml", "./cpu-int8", "build_in/cpu-int8.yaml", str(elsewhere / "cpu-int8.yaml")):
        assert find_recipe(own).read_text() == "mine", own


def test_a_file_without_suffix_that_is_named_like_no_recipe_is_still_a_recipe(elsewhere):
    (elsewhere / "mine").write_text("name: x")
    assert find_recipe("mine").read_text() == "name: x"


@pytest.mark.parametrize(
    ("asked", "near"),
    [
        ("cpu-int", "cpu-int8"),
        ("ort_gemma_int9", "cpu-int8"),
        ("int4.yaml", "cpu-small-int4"),
        ("workspace/accelerator-fp32-gema3.yml", "accelerator-fp32-gemma3"),
    ],
)
def test_unknown_names_get_the_nearest_ones(asked, near, elsewhere):
    with pytest.raises(RecipeError) as refused:
        find_recipe(asked)
    assert near in refused.value.next_step
    assert "gemma-deploy recipes" in refused.value.expected


@pytest.mark.parametrize(
    "asked", ["", ".", "..", "/", "nothing-like-it-at-all", "../../etc/passwd.yaml", "a\0b", "x" * 5000]
)
def test_what_names_nothing_is_refused_in_a_sentence(asked, elsewhere, capsys):
    assert main(["compile", asked]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_every_recipe_has_a_goal_of_its_own_and_a_name_that_begins_with_it():
    goals = [recipe.file.read_text().partition("\n")[0] for recipe in ALL.values()]
    assert all(goal.startswith(GOAL) and goal.endswith(".") for goal in goals)
    assert len(set(goals)) == len(goals)
    assert {name.split("-")[0] for name in ALL if "/" not in name} == KINDS
    assert set(FORMER_NAMES.values()) <= set(ALL)


def test_the_list_says_goal_back_end_weights_needs_and_size(capsys):
    assert main(["recipes"]) == 0
    said = re.sub(r"\s+", " ", capsys.readouterr().out)
    for name, shipped in ALL.items():
        keys = yaml.safe_load(shipped.file.read_text())
        entry = said[said.index(f"{name} {shipped.goal}") :]
        assert (
            f"back end {keys['backend']['type']}, weights {Recipe.load(name, env={'GEMMA_CHECKPOINT': 'x'}).scheme},"
            in entry
        )
    entry = said[said.index("cpu-small-int4 ") : said.index("vendor/")]
    assert "about 0.6 to 1.1 GB for a billion of them; a context of 2048 tokens" in " ".join(entry.split())
    assert "needs a checkpoint, calibration text" in entry
    assert "before: ort_gemma3_int4" in entry
    entry = said[said.index("accelerator-fp32 ") : said.index("accelerator-int8-gemma2 ")]
    assert "about 4.0 GB" in entry
    assert "needs nothing (the bundled demo model)" in entry


def test_its_text_is_printed_as_it_is(capsys):
    assert main(["recipes", "cpu-int8"]) == 0
    assert capsys.readouterr().out == ALL["cpu-int8"].file.read_text()


def test_what_never_ends_is_not_read(capsys):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert main(["recipes", "/dev/zero"]) == 2
    assert "/dev/zero" in capsys.readouterr().err
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB


def test_a_large_file_is_no_recipe(tmp_path, capsys):
    with open(tmp_path / "model.yaml", "wb") as file:
        file.truncate(1 << 40)
    assert main(["recipes", str(tmp_path / "model.yaml")]) == 2
    assert "model.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_no_line_is_wider_than_the_terminal(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    assert main(["recipes"]) == 0
    listed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("    ")]
    assert max(map(len, listed)) <= min(int(columns), 120)
