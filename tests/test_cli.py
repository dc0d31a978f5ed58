"""The program from outside: help with examples, exit codes, messages; nothing heavy is imported to say so."""

import ast
import errno
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from gemma_deploy import cli, errors
from gemma_deploy.cli import COMMANDS, REFUSALS, main
from gemma_deploy.errors import ArtifactError, DeployError, GateError, NotBuiltError, RecipeError, UsageError

PACKAGE = Path(cli.__file__).parent


def fail_with(monkeypatch, error, *options):
    """Let `verify` raise it."""

    @click.command("verify")
    def command():
        raise error

    monkeypatch.setattr("gemma_deploy.commands.verify.command", command)
    return main([*options, "verify"])


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
        "heavy = {'torch', 'onnxruntime', 'onnx', 'transformers', 'numpy', 'matplotlib', 'yaml', 'pydantic'}\n"
        "heavy &= set(sys.modules)\n"
        "print(sorted(heavy), file=sys.stderr); sys.exit(code)"
    )
    run = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert run.returncode == 0
    assert run.stderr == "[]\n"


@pytest.mark.parametrize(("given", "seen"), [(None, "1"), ("0", "0")])
def test_onnxruntime_keeps_no_record_of_its_use_unless_asked(monkeypatch, capsys, given, seen):
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    if given is not None:
        monkeypatch.setenv("ORT_DISABLE_TELEMETRY", given)
    assert main(["recipes"]) == 0
    assert os.environ["ORT_DISABLE_TELEMETRY"] == seen
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "restored")  # monkeypatch knows what to put back


def test_version_is_the_packages(capsys):
    from importlib.metadata import version

    assert main(["--version"]) == 0
    assert version("gemma-deploy") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Usage: "),
        (["compil"], "No such command 'compil'"),
        (["--verbos", "verify", "x"], "--verbose"),
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


@pytest.mark.parametrize("number", REFUSALS)
def test_what_the_system_refuses_is_explained_whichever_command_meets_it(monkeypatch, capsys, number):
    assert fail_with(monkeypatch, OSError(number, "as the system says it", "/there/file")) == 1
    said = capsys.readouterr().err
    words = f"error: /there/file: {os.strerror(number)}\n  next: {REFUSALS[number]}; -v shows where it happened\n"
    assert said == words


def test_without_a_file_name_it_is_explained_too(monkeypatch, capsys):
    assert fail_with(monkeypatch, OSError(errno.ENOSPC, "No space left on device")) == 1
    assert capsys.readouterr().err.startswith("error: No space left on device\n  next: free space")


@pytest.mark.parametrize(("options", "shown"), [(["-v"], True), ([], False)])
def test_verbose_shows_where_a_refusal_happened(monkeypatch, caplog, options, shown):
    assert fail_with(monkeypatch, PermissionError(errno.EACCES, "Permission denied", "/there/file"), *options) == 1
    traces = [record for record in caplog.records if record.exc_info]
    assert [record.exc_info[0] for record in traces] == [PermissionError] * shown


def test_a_file_name_breaks_no_line_and_tells_the_terminal_nothing(tmp_path, capsys):
    assert main(["run", str(tmp_path / "a\nb\x1b[2J\x9b1mé"), "-p", "x"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/a\\nb\\x1b[2J\\x9b1mé: there is no such directory\n")


@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "none"), OSError("no number"), KeyError("k")])
def test_what_may_be_a_bug_keeps_its_traceback(monkeypatch, error):
    with pytest.raises(type(error)):
        fail_with(monkeypatch, error)


NO_MEMORY = [
    MemoryError(),
    MemoryError("Unable to allocate 2.00 GiB for an array with shape (536870912,) and data type float32"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Exception during initialization: std::bad_alloc"),
    RuntimeError("can't start new thread"),
    ImportError("libtorch_cpu.so: failed to map segment from shared object"),
    ImportError("libgomp.so.1: cannot allocate memory in static TLS block"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]


@pytest.mark.parametrize("error", NO_MEMORY, ids=lambda error: f"{type(error).__name__} {str(error)[:20]}")
def test_too_little_memory_is_the_machines_refusal(monkeypatch, capsys, error):
    assert fail_with(monkeypatch, error) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: the system gives no more memory")
    assert "next: close other programs or raise the limit" in said


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ImportError("No module named 'torch'")])
def test_other_errors_of_those_kinds_are_none_of_memory(monkeypatch, error):
    with pytest.raises(type(error)):
        fail_with(monkeypatch, error)


def test_a_current_directory_that_is_gone_is_said(monkeypatch, capsys, tmp_path):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert fail_with(monkeypatch, FileNotFoundError(errno.ENOENT, "No such file or directory")) == 1
    assert capsys.readouterr().err.startswith("error: the current directory was deleted\n  next: go to one")


def test_no_place_for_temporary_files_is_said(monkeypatch, capsys):
    error = FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")
    assert fail_with(monkeypatch, error) == 1
    assert "next: set TMPDIR" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["run", "x", "-p", "a"], ["bench", "x"], ["chat", "x"]])
def test_threads_without_measure_are_refused(arguments, capsys):
    assert main([*arguments, "--threads", "100000"]) == 2
    assert "<=1024" in capsys.readouterr().err


def shell(line, **environment):
    """A line in sh in which $G runs the program."""
    program = f"{sys.executable} -m gemma_deploy.cli"
    return subprocess.run(
        ["sh", "-c", line.replace("$G", program)], capture_output=True, env={**os.environ, **environment}, timeout=120
    )


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_change_nothing(closed):
    done = shell(f"$G --version {closed}; echo code $? >&2")
    assert done.stderr.decode() == "code 0\n"
    assert bool(done.stdout) == (">&-" not in closed.split())


def test_no_file_is_opened_in_the_place_of_a_closed_stream():
    """Or what libraries print would be written into it."""
    program = (
        "import os, sys; [os.close(fd) for fd in (0, 1, 2)]; sys.stdin = sys.stdout = sys.stderr = None\n"
        "from gemma_deploy.cli import main; code = main(['--help'])\n"
        "sys.exit(code or os.open(os.devnull, os.O_RDONLY))"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode >= 3


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_a_full_disk_under_stdout_is_said_once():
    done = shell("$G --help > /dev/full")
    said = done.stderr.decode()
    assert done.returncode == 1
    assert said.startswith("error: No space left on device")
    assert "Exception ignored" not in said
    assert "Traceback" not in said


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
@pytest.mark.parametrize("name", [b"gr\xf6\xdfe", "größe".encode()])
def test_letters_that_the_terminal_lacks_are_shown_some_other_way(tmp_path, monkeypatch, name, encoding):
    """Bytes of a path that are no UTF-8, or letters that the encoding has not."""
    path = os.fsdecode(os.fsencode(tmp_path) + b"/" + name)
    shown = {}
    for stream in ("stdout", "stderr"):
        shown[stream] = io.BytesIO()
        monkeypatch.setattr(sys, stream, io.TextIOWrapper(shown[stream], encoding=encoding, write_through=True))
    assert main(["inspect", path]) == 1
    os.symlink(PACKAGE / "demo", path)
    assert [main(["inspect", path, *options]) for options in ([], ["--params"], ["--json"])] == [0, 0, 0]
    assert shown["stderr"].getvalue().startswith(f"error: {tmp_path}/gr".encode())
    assert shown["stdout"].getvalue().count(f"{tmp_path}/gr".encode()) == 3


def errors_without(tree, argument):
    """Lines that make a DeployError of any kind without the argument, or with an empty one."""
    kinds = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, DeployError)}
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in kinds:
            given = {keyword.arg: keyword.value for keyword in node.keywords}.get(argument)
            if given is None or (isinstance(given, ast.Constant) and not given.value):
                lines.append(node.lineno)
    return lines


# What these have left to do.
ELSEWHERE = ("runtime/chat.py", "runtime/sequence.py")


@pytest.mark.parametrize(
    "file", [file for file in sorted(PACKAGE.rglob("*.py")) if str(file.relative_to(PACKAGE)) not in ELSEWHERE],
    ids=lambda file: str(file.relative_to(PACKAGE)),
)  # fmt: skip
def test_every_error_says_what_to_do_next(file):
    assert not errors_without(ast.parse(file.read_text(encoding="utf-8")), "next_step")


@pytest.mark.parametrize(
    ("call", "wrong"),
    [
        ("ArtifactError('w', where='f')", 1),
        ("RecipeError('w', next_step='')", 1),
        ("DeployError('w', next_step=step)", 0),
        ("ValueError('w')", 0),
    ],
)
def test_the_check_of_next_steps_sees_what_it_should(call, wrong):
    assert len(errors_without(ast.parse(f"def f():\n    raise {call}"), "next_step")) == wrong


def test_a_closed_pipe_is_no_error():
    program = f"{sys.executable} -m gemma_deploy.cli inspect demo --params | head -1"
    run = subprocess.run(program, shell=True, capture_output=True, text=True)
    assert "Traceback" not in run.stderr
    assert "BrokenPipe" not in run.stderr
    assert run.stdout.strip()


@pytest.mark.parametrize("command", ["parity", "eval", "bench"])
def test_a_place_that_may_not_be_written_to_is_told_before_the_work(command, tmp_path, monkeypatch, capsys):
    """Tests may run as a user who may do everything, so the system is asked in its name."""
    asked = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and asked(path, mode))
    words = ["--task", "ppl"] if command == "eval" else []
    assert main([command, "nowhere", *words, "--json", str(tmp_path / "figures.json")]) == 2
    assert "figures.json: cannot be written: Permission denied\n" in capsys.readouterr().err


def unread(*arguments, streams=("stdout",)):
    """Exit code and standard error of the program when nobody reads some of its streams."""
    reader, writer = os.pipe()
    os.close(reader)
    program = [sys.executable, "-m", "gemma_deploy.cli", *map(str, arguments)]
    run = subprocess.run(program, text=True, **({"stderr": subprocess.PIPE} | dict.fromkeys(streams, writer)))
    os.close(writer)
    return run.returncode, run.stderr or ""


@pytest.mark.parametrize("streams", [("stdout",), ("stdout", "stderr")])
def test_work_goes_on_when_nobody_reads_what_it_says(tmp_path, streams):
    """`compile | head -1`, with a command that has less to do."""
    code, said = unread("stage", "demo", tmp_path / "staged", streams=streams)
    assert (code, said.count("Error")) == (0, 0)
    assert (tmp_path / "staged" / "config.json").is_file()


def test_a_verdict_is_the_exit_code_when_nobody_reads_it(demo_artifact, tmp_path):
    shutil.copytree(demo_artifact, tmp_path / "damaged")
    with open(tmp_path / "damaged" / "config.json", "a") as config:
        config.write(" ")
    assert unread("verify", demo_artifact, "--quick", streams=("stdout", "stderr"))[0] == 0
    assert unread("verify", tmp_path / "damaged", "--quick", streams=("stdout", "stderr"))[0] == 1


def test_text_that_nobody_reads_is_not_gone_on_with(demo_artifact):
    assert unread("run", demo_artifact, "-p", "Return the") == (0, "")


@pytest.mark.parametrize("columns", ["0", "5", "-3", "many", ""])
def test_no_width_is_the_width_of_a_log(columns, monkeypatch, capsys):
    """With COLUMNS=0 rich prints nothing at all."""
    monkeypatch.setenv("COLUMNS", columns)
    assert main(["inspect", "demo"]) == 0
    assert "bfloat16" in capsys.readouterr().out


def test_the_table_of_commands_is_what_is_there():
    files = {file.stem for file in (PACKAGE / "commands").glob("*.py")} - {"__init__"}
    assert files == {name.replace("-", "_") for name in COMMANDS}


FREE_TEXT = {
    *("prompt", "texts", "system", "overrides", "pairs", "subjects", "contexts", "points", "field", "targets"),
    *("input_lens", "output_lens", "concurrencies", "goodput"),
}


def named_arguments():
    """(command, words) that give "" for each argument and option of a command that is a path or a name."""
    for name in COMMANDS:
        command = cli.cli.get_command(None, name)
        named = [one for one in command.params if isinstance(one, click.Argument)]
        for one in command.params:
            if one.name not in FREE_TEXT and isinstance(one.type, click.Path | click.types.StringParamType):
                words = ["" if other is one else "x" for other in named if other is one or other.required]
                yield pytest.param(
                    [name, *words, *([] if one in named else [one.opts[0], ""])], id=f"{name} {one.name}"
                )


@pytest.mark.parametrize("words", list(named_arguments()))
def test_an_empty_name_is_no_name(words, tmp_path, monkeypatch, capsys):
    """It is neither the current directory nor the default."""
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "it is empty; " in said or "no built-in recipe of that name" in said
    assert not list(tmp_path.iterdir())
