"""Which format a model speaks: from its chat template, or else from its tokens; what an artifact records."""

import json

import pytest

from gemma_deploy.artifact.opened import manifest_of
from gemma_deploy.chat import FORMATS, FUNCTION_GEMMA, GEMMA3, GEMMA4, PLAIN, choose_format, format_named
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.engine import open_engine
from gemma_deploy.errors import ArtifactError
from gemma_deploy.job import Job
from gemma_deploy.recipe import Recipe
from gemma_deploy.testing import write_tiny_checkpoint
from gemma_deploy.text import Tokenizer, check_text
from tests.chat import reference
from tests.runtime.make import TEMPLATE, write_tokenizer
from tests.text import make

NO_SIGN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"


@pytest.mark.parametrize(
    ("template", "tokens", "form"),
    [
        *((reference.published(name), (), GEMMA4) for name in reference.REVISIONS),
        (make.FUNCTIONS, (), FUNCTION_GEMMA),
        (make.GEMMA_1, (), GEMMA3),
        (make.GEMMA_3, FUNCTION_GEMMA.markers, GEMMA3),  # the template decides
        (NO_SIGN, (), PLAIN),
        (NO_SIGN, GEMMA4.markers, GEMMA4),
        (NO_SIGN, FUNCTION_GEMMA.markers, FUNCTION_GEMMA),
        (NO_SIGN, GEMMA4.markers[1:], PLAIN),
    ],
)
def test_the_template_decides_or_else_the_tokens(template, tokens, form):
    assert choose_format([template], set(tokens).__contains__) is form


def test_several_templates_are_one_model():
    assert choose_format([NO_SIGN, make.FUNCTIONS], lambda _: False) is FUNCTION_GEMMA


def test_every_format_has_a_name_and_is_found_by_it():
    assert [format_named(one.name) for one in (*FORMATS, PLAIN)] == [*FORMATS, PLAIN]
    with pytest.raises(ValueError, match="'gemma9' is no chat format that this version knows: gemma4, "):
        format_named("gemma9")


def test_a_checkpoint_without_a_template_has_no_format(tmp_path):
    assert Tokenizer(write_tokenizer(tmp_path, template=None, more=GEMMA4.markers)).chat_format() is None


def test_what_the_model_says_behind_its_calls_is_a_stop_token(tmp_path):
    """https://ai.google.dev/gemma/docs/functiongemma/formatting-and-best-practices: an additional stop sequence."""
    make.copy_demo(
        tmp_path, weights=True, extra_special_tokens=["<start_function_response>"], additional_special_tokens=None
    )
    make.edit(tmp_path / "config.json", {"vocab_size": 4096})
    (tmp_path / "chat_template.jinja").write_text(make.FUNCTIONS)
    found = check_text(Checkpoint.open(tmp_path))
    assert found.chat_format == "functiongemma"
    assert 4096 not in found.stop_ids  # the table of the model has no row of it
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.tokens_of(("<start_function_response>", "no token")) == {4096: "<start_function_response>"}


def test_a_stop_token_that_no_file_declares_is_told(tmp_path):
    checkpoint = write_tiny_checkpoint(tmp_path, "gemma3_text")
    write_tokenizer(checkpoint, template=make.FUNCTIONS, more=FUNCTION_GEMMA.stops)
    found = check_text(Checkpoint.open(checkpoint))
    number = Tokenizer(checkpoint).id_of("<start_function_response>")
    assert number in found.stop_ids
    told = f"<start_function_response> (token {number}) ends a reply behind tool calls: taken as a stop token, though"
    assert [note for note in found.notes if note.startswith(told)]
    generation = {"eos_token_id": [1, 5, number]}
    (checkpoint / "generation_config.json").write_text(json.dumps(generation))
    again = check_text(Checkpoint.open(checkpoint))
    assert (set(again.stop_ids), again.notes) == (set(found.stop_ids), ())


def test_a_compile_takes_the_format_of_the_checkpoint(tmp_path):
    checkpoint = write_tiny_checkpoint(tmp_path / "c", "gemma3_text")
    write_tokenizer(checkpoint, template=reference.published("gemma4_v5"), more=GEMMA4.markers)
    recipe = {
        "name": "tiny",
        "frontend": {"checkpoint": str(checkpoint), "shape": {"input_ids": [[16], [32]]}},
        "backend": {"type": "onnxruntime", "dtype": "fp32"},
        "workspace": {"path": str(tmp_path)},
    }
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    assert Job.open(Recipe.load(tmp_path / "recipe.json")).chat_format == "gemma4"


def test_an_artifact_records_its_format_and_older_ones_are_read(genai_artifact, tmp_path):
    artifact = genai_artifact("gemma3_text")
    assert "<start_of_turn>" in TEMPLATE
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert manifest["chat_format"] == "gemma3"
    engine = open_engine(artifact)
    assert (engine.chat_format, engine.markers) == (GEMMA3, {})
    file = tmp_path / "manifest.json"
    file.write_text(json.dumps({key: value for key, value in manifest.items() if key != "chat_format"}))
    assert manifest_of(file).chat_format is None
    file.write_text(json.dumps(manifest | {"chat_format": "gemma9"}))
    with pytest.raises(ArtifactError, match=r"chat_format: .*'gemma9' is no chat format that this version knows"):
        manifest_of(file)


def test_an_older_artifact_has_the_format_of_its_template(genai_artifact, tmp_path):
    import shutil

    artifact = tmp_path / "a"
    shutil.copytree(genai_artifact("gemma3_text"), artifact)
    manifest = json.loads((artifact / "manifest.json").read_text())
    del manifest["chat_format"]
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    assert open_engine(artifact).chat_format is GEMMA3
