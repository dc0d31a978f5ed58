"""`${VAR}` is put in after YAML has decided what is written: the schema says whether a value is text or a number."""

import time

import pytest

from gemma_deploy.errors import RecipeError
from gemma_deploy.recipe import Recipe

TEXT = """\
name: ${NAME:-plain}
frontend:
  checkpoint: ${GEMMA_CHECKPOINT:-demo}
  shape: {input_ids: [[64], [128]]}
backend: {dtype: fp32}
parity:
  text: %s
workspace:
  workers: %s
"""


def load(text="null", workers="2", overrides=(), **env):
    return Recipe.from_text(TEXT % (text, workers), overrides, env)


@pytest.mark.parametrize("value", ["123", "1e5", "0x10", "yes", "off", "null", "~", "1.5", "-7", "true"])
def test_a_path_that_looks_like_something_else_is_text(value):
    recipe = load(text="${TEXT}", GEMMA_CHECKPOINT=value, TEXT=value, NAME="1" + value)
    assert (recipe.frontend.checkpoint, recipe.parity.text, recipe.name) == (value, value, "1" + value)


def test_a_number_where_a_number_is_wanted():
    assert load(workers="${N}", N="3").workspace.workers == 3
    assert load(workers="${N:-4}").workspace.workers == 4
    with pytest.raises(RecipeError, match=r"workspace.workers: got 'many' \(text\), expected a whole number"):
        load(workers="${N}", N="many")


def test_part_of_a_value():
    assert load(text="${TEXT}0", TEXT="12").parity.text == "120"
    assert load(workers="1${N}", N="2").workspace.workers == 12


def test_the_recipes_own_words_mean_what_yaml_says():
    """null behind `:-` is the recipe's, not the environment's."""
    assert load(text="${TEXT:-null}").parity.text is None
    assert load(text="${TEXT:-~}").parity.text is None
    assert load(text="${TEXT:-}").parity.text is None
    assert load(text="${TEXT:-12}").parity.text == "12"
    assert load(text="${TEXT}", TEXT="").parity.text is None


def test_overrides_are_read_the_same_way():
    recipe = load(overrides=["parity.text=${TEXT}", "workspace.workers=${N}"], TEXT="77", N="5")
    assert (recipe.parity.text, recipe.workspace.workers) == ("77", 5)
    assert load(text="${TEXT}", overrides=["parity.text=null"], TEXT="77").parity.text is None


def test_a_written_number_stays_an_error_where_text_is_wanted():
    with pytest.raises(RecipeError, match=r"parity.text: got 12 \(a number\), expected text: put it in quotes"):
        load(text="12")


SIZE = 1 << 16
LARGE = {
    "unknown keys": "".join(f"key{i}: {i}\n" for i in range(SIZE // 14)),
    "variables that are not set": "".join(f"k{i}: ${{X{i}}}\n" for i in range(SIZE // 18)),
    "keys that are no words": "?\n" * (SIZE // 2),
    "the same key": "a: 1\n" * (SIZE // 5),
    "a flow of keys": "{" + "a," * (SIZE // 2 - 2) + "}",
}


@pytest.mark.parametrize("name", LARGE)
def test_what_is_wrong_with_the_largest_recipes_is_said_at_once_and_in_short(name):
    began = time.process_time()
    with pytest.raises(RecipeError) as caught:
        Recipe.from_text(LARGE[name], env={})
    assert time.process_time() - began < 3  # the slowest takes 0.6 s on the machine where this was written
    assert len(caught.value.problems) <= 51
    assert len(str(caught.value)) < 20_000
