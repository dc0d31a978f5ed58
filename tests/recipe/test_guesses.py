"""Words of other tools are answered with the key to set and the recipe to take; what is advised works."""

import re

import pytest

from gemma_deploy.errors import RecipeError
from gemma_deploy.recipe import Recipe
from gemma_deploy.recipe.catalogue import find_recipe
from gemma_deploy.recipe.guesses import GUESSES, advice


def refused(*overrides):
    with pytest.raises(RecipeError) as caught:
        Recipe.load("cpu-int8", overrides, env={})
    return "\n".join(caught.value.problems)


@pytest.mark.parametrize("key", ["backend.dtype", "frontend.quantize.type"])
@pytest.mark.parametrize("value", ["int4", "q4", "Q4_0", "q4_k_m", "4bit", "4", "uint4", "nf4", "w4", "awq", "INT4"])
def test_four_bits_have_a_key_and_a_recipe(key, value):
    said = refused(f"{key}={value}")
    assert "frontend.quantize.type: w4a16_gptq" in said
    assert "cpu-small-int4" in said
    assert "did you mean" not in said


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("backend.dtype=q8_0", "write backend.dtype: int8"),
        ("backend.dtype=8", "write backend.dtype: int8"),
        ("backend.dtype=w8a8", "frontend.quantize.type: w8a8"),
        ("backend.dtype=w8a16_gptq", "frontend.quantize.type: w8a16_gptq"),
        ("backend.dtype=int8_gptq", "frontend.quantize.type: w8a16_gptq"),
        ("backend.dtype=float16", "write backend.dtype: fp16"),
        ("backend.dtype=bfloat16", "write backend.dtype: bf16"),
        ("backend.dtype=gguf", "frontend.checkpoint: FILE.gguf"),
        ("frontend.quantize.type=int8", "8 bits are w8a16 (looks at no data), w8a16_gptq"),
        ("frontend.quantize.type=q8", "8 bits are w8a16"),
        ("frontend.quantize.type=gptq", "w8a16_gptq for 8 bits"),
        ("frontend.quantize.type=gguf", "frontend.checkpoint: FILE.gguf"),
        ("frontend.quantize.type=kv8", "w8a16_gptq+kv8"),
        ("frontend.quantize.type=fp16", "write backend.dtype: fp16, and no frontend.quantize"),
        ("frontend.quantize=int8", "frontend.quantize: {type: w8a16}"),
        ("backend.type=ort", "write backend.type: onnxruntime"),
        ("backend.type=genai", "write backend.type: onnxruntime"),
        ("backend.type=vacc", "write backend.type: tvm_vacc"),
        ("frontend.type=hf", "write frontend.type: huggingface"),
        ("frontend.shape.input_ids=1024", "such as [[1024], [2048]]"),
        ("frontend.shape.input_ids=[1024,2048]", "such as [[1024], [2048]]"),
    ],
)
def test_other_guesses(override, words):
    assert words in refused(override)


@pytest.mark.parametrize("override", ["backend.dtype=int9x", "frontend.quantize.type=w8a61", "backend.type=cuda"])
def test_what_nobody_can_know_is_answered_with_what_there_is(override):
    said = refused(override)
    assert "expected one of" in said
    assert "write " not in said


def test_every_key_that_is_advised_is_taken_and_every_recipe_exists():
    """Whatever stands in an answer as KEY: VALUE is set in a recipe; names of recipes are looked up."""
    answers = {words for rows in GUESSES.values() for _, words in rows} | {
        advice(("frontend", "shape", "input_ids"), 1)
    }
    settings, names = set(), set()
    for answer in answers:
        settings |= set(re.findall(r"((?:backend|frontend)\.[a-z_.]+): (\{[^}]*\}|[\w.+]+)", answer))
        names |= set(re.findall(r"\b(?:cpu|accelerator|native)-[\w-]+", answer))
    assert len(settings) >= 10
    for key, value in settings - {("frontend.checkpoint", "FILE.gguf")}:
        others = [] if key.startswith("backend.dtype") else ["backend.dtype=int8"]
        assert Recipe.load("cpu-int8", [*others, "backend.compile={}", f"{key}={value}"], env={}), (key, value)
    cpu = {"cpu-int8", "cpu-best-int8", "cpu-small-int4", "cpu-long-prompts-w8a8"}
    assert cpu | {"accelerator-int8", "native-int8"} == names
    assert all(find_recipe(name) for name in names)
