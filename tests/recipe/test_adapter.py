"""`frontend.adapter`: one directory, or several, each with a weight."""

import pytest
import yaml

from gemma_deploy.checkpoint import AdapterRef
from gemma_deploy.errors import RecipeError
from gemma_deploy.recipe import Recipe, check_built

TEXT = """\
name: small
frontend:
  checkpoint: demo
  {adapter}
  shape: {{input_ids: [[128], [256]]}}
backend: {{dtype: fp16}}
"""


def load(adapter="", *overrides, **options):
    return Recipe.from_text(TEXT.format(adapter=adapter), overrides, options.pop("env", {}), **options)


@pytest.mark.parametrize(
    ("written", "refs"),
    [
        ("", ()),
        ("adapter: null", ()),
        ("adapter: runs/a", (AdapterRef("runs/a"),)),
        ("adapter: [runs/a]", (AdapterRef("runs/a"),)),
        ("adapter: [runs/a, {path: b, weight: -0.5}]", (AdapterRef("runs/a"), AdapterRef("b", -0.5))),
        ("adapter: [{path: b}, {path: c, weight: 2}]", (AdapterRef("b"), AdapterRef("c", 2))),
        ("adapter: ${WHERE}", (AdapterRef("123"),)),
    ],
)
def test_what_is_written(written, refs):
    recipe = load(written, env={"WHERE": "123"})
    assert recipe.merged_adapters == refs
    check_built(recipe)
    assert Recipe.from_text(yaml.safe_dump(recipe.resolved()), env={}) == recipe


@pytest.mark.parametrize(
    "written", ["3", "[]", "[3]", "''", "{path: a}", "[{path: a, scale: 2}]", "[{weight: 2}]", "[{path: a, weight: x}]"]
)
def test_what_is_refused(written):
    with pytest.raises(RecipeError, match=r"frontend\.adapter: got .*, expected") as caught:
        load(f"adapter: {written}")
    assert len(caught.value.problems) == 1


def test_the_command_line_replaces_it():
    assert load("adapter: a", "frontend.adapter=b").merged_adapters == (AdapterRef("b"),)
    assert load("adapter: a", "frontend.adapter=null").merged_adapters == ()
    refs = (AdapterRef("b", 0.5), AdapterRef("c"))
    recipe = load("adapter: a", adapters=refs)
    assert recipe.merged_adapters == refs
    assert recipe.resolved()["frontend"]["adapter"] == [{"path": "b", "weight": 0.5}, "c"]
    assert load("adapter: a", adapters=[AdapterRef("b")]).resolved()["frontend"]["adapter"] == "b"


@pytest.mark.parametrize(
    ("text", "ref"),
    [
        ("a/b", AdapterRef("a/b")),
        ("a/b:0.5", AdapterRef("a/b", 0.5)),
        ("a:-2", AdapterRef("a", -2.0)),
        ("a:b", AdapterRef("a:b")),
        ("a:1e5", AdapterRef("a:1e5")),
        ("a:nan", AdapterRef("a:nan")),
        (":2", AdapterRef(":2")),
    ],
)
def test_directory_and_weight(text, ref):
    assert AdapterRef.parse(text) == ref


def test_a_directory_that_is_called_like_a_weight(tmp_path):
    (tmp_path / "a:2").mkdir()
    assert AdapterRef.parse(str(tmp_path / "a:2")) == AdapterRef(str(tmp_path / "a:2"))
