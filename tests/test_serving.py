"""A host that only serves: everything that runs, checks and shows artifacts does without what extras install."""

import ast
import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gemma_deploy import extras
from gemma_deploy.errors import UsageError

ROOT = Path(__file__).parent.parent
LEFT_OUT = sorted({module for modules in extras.MODULES.values() for module in modules} - {"huggingface_hub"})
# As where they are not installed: an import fails, and nobody finds them. huggingface_hub comes with tokenizers.
PROGRAM = f"""
import sys
for name in {LEFT_OUT}:
    sys.modules[name] = None
from gemma_deploy.cli import main
for line in sys.stdin.read().splitlines():
    print("::", main(line.split("|")), flush=True)
"""


def program(lines, cwd=ROOT, left_out=LEFT_OUT):
    """Command lines run one after the other -> (exit code, standard output) of each, and standard error of all."""
    code = PROGRAM.replace(repr(LEFT_OUT), repr(left_out))
    done = subprocess.run(
        [sys.executable, "-c", code], input="\n".join(lines), capture_output=True, text=True, cwd=cwd, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = re.findall(r"(.*?)^:: (\d+)\n", done.stdout, re.DOTALL | re.MULTILINE)
    assert len(found) == len(lines), done.stdout
    return [(int(code), text) for text, code in found], done.stderr


@pytest.fixture(scope="module", params=["static", "onnxruntime"])
def artifact(request, demo_artifact, genai_artifact):
    return demo_artifact if request.param == "static" else genai_artifact("gemma3_text", "int8")


def test_artifacts_are_run_checked_shown_and_evaluated(artifact, capfd):
    from gemma_deploy.cli import main

    words = ["run", str(artifact), "-p", "the list", "-n", "9", "--threads", "1"]
    assert main(words) == 0
    text = capfd.readouterr().out
    lines = [
        "|".join(words),
        f"inspect|{artifact}",
        f"verify|{artifact}",
        f"eval|{artifact}|--task|ppl|--windows|1|--seqlen|24|--against|none|--no-record",
    ]
    found, said = program(lines)
    assert [code for code, _ in found] == [0] * len(lines), said
    assert found[0][1] == text
    assert "| " in found[1][1].replace("│", "|")
    assert "params.safetensors, sha256 each" in found[2][1]
    assert "tokens scored" in found[3][1]
    told = "onnxruntime-genai is not installed: ONNX Runtime itself runs this artifact" in said
    assert told == (artifact.name == "tiny")


def test_chat_and_a_benchmark_need_nothing_else(artifact):
    job = f"process.BenchJob('cold', {str(artifact)!r}, 1, [64], 3)"
    code = PROGRAM.partition("for line in")[0] + (
        'assert main(["chat", sys.argv[1], "-n", "3", "--threads", "1"]) == 0\n'
        "from gemma_deploy.bench import memory, process\n"
        "exec(memory.BANDWIDTH.replace('1 << 28', '1 << 20').replace('sys.argv[1]', '1'))\n"
        f"print(sorted(process.run({job}, process.time.monotonic())))"
    )
    command = [sys.executable, "-c", code, str(artifact)]
    done = subprocess.run(command, input="a\nb\n", capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    *replies, speed, keys = done.stdout.splitlines()
    assert len(replies) >= 2
    assert float(speed) > 1e8
    assert keys == "['load_s', 'peak_rss_bytes', 'tokenizer_s', 'ttft_s']"


def test_running_imports_neither_torch_nor_transformers_where_they_are_installed(artifact):
    code = (
        "import sys; from gemma_deploy.cli import main\n"
        f"assert main(['run', {str(artifact)!r}, '-p', 'a', '-n', '2', '--threads', '1']) == 0\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'matplotlib', 'gguf', 'onnxscript'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n[]\n")


def test_compiling_and_proving_without_calibration_needs_build_alone(tmp_path):
    others = [module for module in LEFT_OUT if module not in extras.MODULES["build"]]
    line = f"compile|cpu-int8|-s|frontend.checkpoint=demo|--out|{tmp_path / 'x'}"
    ((code, text),), said = program([line], left_out=others)
    assert code == 0, said
    assert "parity  passed" in text


MISSING = {
    "compile|accelerator-int8": "build",
    "compile|accelerator-int8|--dry-run": "build",
    "compile|accelerator-best-int8-gemma3|-s|frontend.checkpoint=demo": "build,calibrate",
    "compile|accelerator-fp16": "build,calibrate",
    "parity|ARTIFACT": "build",
    "eval|ARTIFACT|--task|ppl|--no-record": "build",
    "eval|demo|--task|ppl": "build",
    "split|demo|parts": "build",
    "calibrate|--dataset|c4": "build,calibrate",
    "bench|ARTIFACT|--plot|x.png": "plots",
    "inspect|x.gguf": "gguf",
}


def test_what_an_extra_is_for_is_refused_in_a_sentence_before_any_work(demo_artifact, tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    lines = [line.replace("ARTIFACT", str(demo_artifact)) for line in MISSING]
    found, said = program(lines, tmp_path)
    assert [code for code, _ in found] == [2] * len(lines), said
    assert "Traceback" not in said
    told = re.findall(r'^error: .*needs .*not installed here\n  next: pip install "gemma-deploy\[(.+)\]"$', said, re.M)
    assert told == list(MISSING.values()), said
    assert [file.name for file in tmp_path.iterdir()] == ["x.gguf"]


def test_an_import_that_nobody_foresaw_is_a_sentence_too(monkeypatch, capsys):
    from gemma_deploy import cli

    def command(**_):
        import torch.nothing  # noqa: F401

    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(cli.cli, "main", command)
    assert cli.main(["run"]) == 2
    assert capsys.readouterr().err == (
        'error: this needs torch.nothing, not installed here\n  next: pip install "gemma-deploy[build]"\n'
    )
    monkeypatch.setattr(cli.cli, "main", lambda **_: __import__("no_such_module"))
    with pytest.raises(ModuleNotFoundError):  # a bug, and to be seen as one
        cli.main(["run"])


def test_all_that_is_missing_is_told_at_once(monkeypatch):
    for module in ("datasets", "gguf"):
        monkeypatch.setitem(sys.modules, module, None)
    extras.require("build", "genai", what="x")
    with pytest.raises(UsageError, match="x needs datasets, gguf, not installed here") as caught:
        extras.require("build", "calibrate", "gguf", what="x")
    assert caught.value.next_step == 'pip install "gemma-deploy[calibrate,gguf]"'
    assert not extras.installed("gguf")


DISTRIBUTIONS = {
    "yaml": "pyyaml",
    "onnxruntime_genai": "onnxruntime-genai",
    "openvino_tokenizers": "openvino-tokenizers",
    "tvm": "apache-tvm",
}


def requirements():
    """Section of setup.cfg -> names of distributions; `core` is what everybody gets."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    sections = {"core": config["options"]["install_requires"], **config["options.extras_require"]}
    return {
        name: {re.split(r"[\[>=<]", line.strip())[0] for line in text.splitlines() if line.strip()}
        for name, text in sections.items()
    }


def imported(folder):
    """Top names that modules of a folder import from elsewhere."""
    found = set()
    for file in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            found |= {name.partition(".")[0] for name in names}
    return found - set(sys.stdlib_module_names) - {"gemma_deploy"}


def test_every_import_is_declared_and_every_extra_is_what_it_says():
    declared = requirements()
    names = {DISTRIBUTIONS.get(name, name) for name in imported("gemma_deploy") | imported("source_code")}
    assert names == declared["core"].union(*(declared[extra] for extra in extras.MODULES))
    for extra, modules in extras.MODULES.items():
        assert {DISTRIBUTIONS.get(module, module) for module in modules} <= declared[extra]
        brought = {DISTRIBUTIONS.get(module, module) for module in modules}
        assert not brought & declared["core"]
    text = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    (every,) = re.findall(r"^    gemma-deploy\[(.+)\]$", text, re.MULTILINE)
    assert every.split(",") == sorted(extras.MODULES)


def test_what_is_installed_for_the_tests_is_pinned():
    pinned = {
        line.partition("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    }
    wanted = set().union(*requirements().values()) - {"gemma-deploy"}
    assert {name.lower().replace("_", "-") for name in wanted} <= pinned
