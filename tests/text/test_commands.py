"""What commands do with text, templates and tokens that are not as they should be: a sentence, before the work."""

import hashlib
import io
import json
import shutil
import sys

import pytest

from gemma_deploy.cli import main
from gemma_deploy.testing import write_tiny_checkpoint
from tests.calibration.make import story
from tests.runtime.make import TEMPLATE, write_tokenizer
from tests.text import make

ENDLESS = TEMPLATE.replace("<end_of_turn>", "")
ASKED = ["--chat", "-p", "the list", "-n", "2"]


def run(capfd, *arguments):
    code = main([str(one) for one in arguments])
    out, err = capfd.readouterr()
    assert "Traceback" not in err
    return code, out, err


@pytest.fixture
def artifact(genai_artifact, tmp_path):
    """A copy to change."""
    return shutil.copytree(genai_artifact("gemma"), tmp_path / "artifact")


def change(artifact, name, content):
    """Another content of a file, as if the artifact had been compiled with it."""
    (artifact / name).write_bytes(content)
    manifest = json.loads((artifact / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (artifact / "manifest.json").write_text(json.dumps(manifest))


def compiled(root, template, **settings):
    """A checkpoint with this chat template, and a recipe for it."""
    checkpoint = write_tiny_checkpoint(root / "checkpoint", "gemma")
    write_tokenizer(checkpoint)
    data = template if isinstance(template, bytes) else template.encode()
    (checkpoint / "chat_template.jinja").write_bytes(data)
    make.edit(checkpoint / make.SETTINGS, settings)
    recipe = {
        "name": "tiny",
        "frontend": {"checkpoint": str(checkpoint), "shape": {"input_ids": [[64], [128]]}},
        "backend": {"type": "onnxruntime", "dtype": "int8"},
        "workspace": {"path": str(root / "workspace")},
    }
    (root / "recipe.json").write_text(json.dumps(recipe))  # JSON is YAML
    return root / "recipe.json"


# --- compile ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [["--dry-run"], ["--no-parity"]])
@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("chat_template.jinja", "{# größe #}".encode("latin-1"), "chat_template.jinja: is not UTF-8 text (byte 5)"),
        ("tokenizer.json", b"{}", "tokenizer.json: is not a tokenizer"),
        ("tokenizer_config.json", b'{"bos_token": 7}', "tokenizer_config.json: holds a token that is none: '7'"),
        ("added_tokens.json", b"[]", "added_tokens.json: holds a list"),
    ],
)
def test_compile_refuses_damaged_files_before_it_computes(tmp_path, capfd, monkeypatch, options, name, content, said):
    recipe = compiled(tmp_path, TEMPLATE)
    (tmp_path / "checkpoint" / name).write_bytes(content)
    monkeypatch.setattr("gemma_deploy.compile.write_parameters", lambda *_: pytest.fail("it was computed"))
    code, _, err = run(capfd, "compile", recipe, *options)
    assert code == 1
    assert said in err
    assert not (tmp_path / "workspace" / "tiny").exists()


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for", "chat will not work: the chat template refuses the messages: line 1"),
        ("{{ 1 / 0 }}", "chat will not work: the chat template refuses the messages: ZeroDivisionError"),
        (ENDLESS, "no stop token will end a reply"),
        (TEMPLATE, "<end_of_turn> (token 5) ends a reply in the chat template: taken as a stop token"),
    ],
)
def test_compile_tells_what_chat_will_be_like(tmp_path, capfd, caplog, template, said):
    code, _, err = run(capfd, "compile", compiled(tmp_path, template), "--dry-run")
    assert code == 0, err
    assert said in caplog.text


def test_artifacts_stop_at_every_token_that_is_declared(genai_artifact):
    """config.json says 1, the chat template <end_of_turn>."""
    path = genai_artifact("gemma")
    said = json.loads((path.parents[1] / "checkpoint" / "config.json").read_text()).get("eos_token_id", 1)
    assert said == 1
    manifest, generation, genai = (
        json.loads((path / f"{name}.json").read_text()) for name in ("manifest", "generation_config", "genai_config")
    )
    assert manifest["model"]["eos_token_ids"] == generation["eos_token_id"] == genai["model"]["eos_token_id"] == [1, 5]


def test_inspect_shows_the_stop_tokens_of_an_artifact_to_be(tmp_path, capfd):
    compiled(tmp_path, TEMPLATE, eos_token="<unk>")
    code, out, _ = run(capfd, "inspect", tmp_path / "checkpoint", "--json")
    assert code == 0
    assert json.loads(out)["checkpoint"]["stop tokens"] == "1, 3, 5"


# --- run and chat -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lines", [["-p", "the \udcff list"], ["-p", "-"], ["--chat", "-p", "the \udcff list"]])
def test_run_takes_bytes_that_are_no_text_for_what_they_are(artifact, capfd, monkeypatch, lines):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the \xff list"), "utf-8"))
    code, out, err = run(capfd, "run", artifact, "-n", "2", *lines)
    assert (code, out) == (2, "")
    assert "the text is not Unicode: character " in err
    assert "the byte 0xFF" in err


def test_chat_takes_bytes_that_are_no_text_for_what_they_are(artifact, capfd, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\nthe \xff list\n"), "utf-8"))
    code, out, err = run(capfd, "chat", artifact, "-n", "2")
    assert (code, out[-1:]) == (2, "\n")  # the first message has been answered
    assert "the byte 0xFF" in err


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ messages[0]['content'] + 1 }}", "refuses the messages: TypeError: can only concatenate str"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refuses the messages: it calls itself without end"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "refuses the messages: OverflowError: Range too big"),
        ("{{ 'x' * 10 ** 9 }}", "refuses the messages: it makes a value of more than"),
    ],
)
@pytest.mark.parametrize("command", ["run", "chat"])
def test_a_template_that_fails_is_a_sentence(artifact, capfd, monkeypatch, command, template, said):
    change(artifact, "chat_template.jinja", template.encode())
    monkeypatch.setattr(sys, "stdin", io.StringIO("the list\n"))
    code, out, err = run(capfd, command, artifact, *(ASKED if command == "run" else ["-n", "2"]))
    assert (code, out) == (2, "")
    assert f"the chat template {said}" in err
    assert "\n  next: " in err


@pytest.mark.parametrize("command", ["run", "chat"])
def test_replies_without_an_end_are_told(artifact, capfd, caplog, monkeypatch, command):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the list\n"))
    options = ASKED if command == "run" else ["-n", "2"]
    assert run(capfd, command, artifact, *options)[0] == 0
    assert "stop token" not in caplog.text
    change(artifact, "chat_template.jinja", ENDLESS.encode())
    monkeypatch.setattr(sys, "stdin", io.StringIO("the list\n"))
    assert run(capfd, command, artifact, *options)[0] == 0
    assert "no stop token will end a reply" in caplog.text
    change(artifact, "chat_template.jinja", TEMPLATE.replace("<end_of_turn>", "<pad>").encode())
    monkeypatch.setattr(sys, "stdin", io.StringIO("the list\n"))
    assert run(capfd, command, artifact, *options)[0] == 0
    assert "replies end with <pad> (token 0) in the chat template, which is none of the artifact's" in caplog.text


def test_words_count_as_in_transformers(artifact, capfd):
    """`--stats` says how many tokens a prompt has."""
    from transformers import AutoTokenizer

    template = TEMPLATE.replace("{{ bos_token }}", "{{ bos_token }}{% if tools is not none %}tools{% endif %}", 1)
    template = template.replace("message['content'] | trim", "message['content'] | tojson")
    change(artifact, "chat_template.jinja", template.encode())
    settings = json.loads((artifact / make.SETTINGS).read_text()) | {"bos_token": "<bos>"}
    change(artifact, make.SETTINGS, json.dumps(settings).encode())
    text = "Is <b> & 'é' text?"
    ids = AutoTokenizer.from_pretrained(artifact).apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
    )
    code, _, err = run(capfd, "run", artifact, "--chat", "-p", text, "-n", "1", "--stats")
    assert code == 0
    assert f" {len(ids)} prompt tokens" in err


# --- tokens outside the table -------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["artifact", "checkpoint"])
def test_a_text_that_spells_a_token_without_a_row_is_refused(artifact, tmp_path, capfd, monkeypatch, place):
    """By every command; <image_soft_token> is such a token in Gemma 3 270M and 1B."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(" ".join(story(n)) + " <image_soft_token>" for n in range(9)))
    size = json.loads((artifact / "config.json").read_text())["vocab_size"]
    settings = json.loads((artifact / make.SETTINGS).read_text())
    fill = [f"<fill{number}>" for number in range(size)]
    settings["extra_special_tokens"] = [*fill, "<image_soft_token>"]
    change(artifact, make.SETTINGS, json.dumps(settings).encode())
    checkpoint = write_tiny_checkpoint(tmp_path / "checkpoint", "gemma")
    write_tokenizer(checkpoint)
    make.edit(checkpoint / make.SETTINGS, settings)
    commands = {
        "artifact": [
            ["run", artifact, "-p", "the <image_soft_token> value", "-n", "2"],
            ["run", artifact, "--chat", "-p", "the <image_soft_token> value", "-n", "2"],
            ["chat", artifact, "-n", "2"],
            ["eval", artifact, "--task", "ppl", "--text", text, "--windows", "1", "--seqlen", "32", "--no-record"],
        ],
        "checkpoint": [
            ["eval", checkpoint, "--task", "ppl", "--text", text, "--windows", "1", "--seqlen", "32"],
            [
                *("calibrate", "--checkpoint", checkpoint, "--dataset", "c4", "--path", tmp_path / "c4.json"),
                *("--nsamples", "2", "--seqlen", "32", "--workspace", tmp_path / "workspace"),
            ],
        ],
    }
    (tmp_path / "c4.json").write_text("".join(json.dumps({"text": text.read_text()}) + "\n" for _ in range(3)))
    for command in commands[place]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("the <image_soft_token> value\n"))
        code, _, err = run(capfd, *command)
        assert code in (1, 2), command
        assert "the text spells '<image_soft_token>', which is token " in err
        assert f"but the model has {size} tokens" in err
