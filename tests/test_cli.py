"""The program from outside: help with examples, exit codes, messages; nothing heavy is imported to say so."""

import re
import subprocess
import sys

import click
import pytest

from gemma_deploy import cli
from gemma_deploy.cli import COMMANDS, main
from gemma_deploy.errors import ArtifactError, GateError, NotBuiltError, RecipeError, UsageError


def fail_with(monkeypatch, error):
    """Let `verify` raise it."""

    @click.command("verify")
    def command():
        raise error

    monkeypatch.setattr("gemma_deploy.commands.verify.command", command)
    return main(["verify"])


def test_help_lists_every_command_with_examples(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "Examples:" in shown
    for name, line in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(line)}$", shown, re.M), name


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_examples_that_name_it(name, capsys):
    assert main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    examples = shown[shown.index("Examples:") :]
    assert f"gemma-deploy {name} " in examples
    options = {word for line in examples.splitlines() for word in re.findall(r"(?<= )--?[a-z][a-z-]*", line)}
    described = shown[: shown.index("Examples:")]
    missing = {option for option in options if option not in described and option not in ("-c",)}
    assert not missing  # an example never shows an option that is gone


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)])
def test_help_imports_neither_torch_nor_onnxruntime(arguments):
    program = (
        "import sys; from gemma_deploy.cli import main; code = main(sys.argv[1:])\n"
        "heavy = {'torch', 'onnxruntime', 'onnx', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "print(sorted(heavy), file=sys.stderr); sys.exit(code)"
    )
    run = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert run.returncode == 0
    assert run.stderr == "[]\n"


def test_version_is_the_packages(capsys):
    from importlib.metadata import version

    assert main(["--version"]) == 0
    assert version("gemma-deploy") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compil"], "No such command 'compil'"),
        (["compile"], "Missing argument 'RECIPE'"),
        (["compile", "x.yaml", "--frce"], "--force"),
        (["run", "x"], "Missing option '-p'"),
        (["calibrate"], "--dataset"),
        (["calibrate", "--dataset", "wiki"], "'wiki' is not one of 'c4', 'ceval', 'alpaca'"),
        (["parity", "--backend", "tensorrt"], "onnxruntime"),
    ],
)
def test_wrong_usage_ends_with_2_and_says_what_is_right(arguments, words, capsys):
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ArtifactError("w"), 1),
        (GateError("w"), 1),
        (UsageError("w"), 2),
        (RecipeError("w"), 2),
        (NotBuiltError("w"), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_every_kind_of_end_has_its_exit_code_and_no_traceback(monkeypatch, capsys, error, code):
    assert fail_with(monkeypatch, error) == code
    said = capsys.readouterr().err
    assert said.strip()
    assert "Traceback" not in said


def test_a_message_has_what_where_expected_next_and_all_offenders(monkeypatch, capsys):
    error = ArtifactError("is wrong", where="file.onnx", expected="right", next_step="mend it", problems=["a", "b"])
    fail_with(monkeypatch, error)
    said = capsys.readouterr().err
    assert said == "error: file.onnx: is wrong\n  - a\n  - b\n  expected: right\n  next: mend it\n"


def test_a_bug_is_not_dressed_up_as_a_mistake_of_the_user(monkeypatch):
    with pytest.raises(ZeroDivisionError):
        fail_with(monkeypatch, ZeroDivisionError())


def test_a_closed_pipe_is_no_error():
    program = f"{sys.executable} -m gemma_deploy.cli inspect demo --params | head -1"
    run = subprocess.run(program, shell=True, capture_output=True, text=True)
    assert "Traceback" not in run.stderr
    assert "BrokenPipe" not in run.stderr
    assert run.stdout.strip()


def test_the_table_of_commands_is_what_is_there():
    from pathlib import Path

    files = {file.stem for file in (Path(cli.__file__).parent / "commands").glob("*.py")} - {"__init__"}
    assert files == set(COMMANDS)
