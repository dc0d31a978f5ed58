"""One key for each stage: everything a result depends on changes it, nothing else does."""

import subprocess
import sys

import pytest

from gemma_deploy import paths, provenance
from gemma_deploy.provenance import code_of, stage_key
from gemma_deploy.stages import keys

STAGES = {
    name: getattr(keys, name) for name in ("RANGES", "QUANTIZE", "CACHE", "PARAMETERS", "FILES", "SENSITIVITY", "GATE")
}


def roots_of(stage):
    from gemma_deploy.backends import backend

    return tuple(STAGES[stage]) if stage in STAGES else tuple(backend(stage).code)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A small program in the place of ours, and source_code/ beside it."""
    inside = "def f():\n    from gemma_deploy.parts.two import (\n        g,\n    )\n    import torch\n"
    files = {
        "package/__init__.py": "",
        "package/work.py": "from gemma_deploy.parts import one\nimport numpy as np\n",
        "package/parts/__init__.py": '"""Parts."""\n',
        "package/parts/one.py": inside,
        "package/parts/two.py": "from gemma_deploy import errors\ng = 1\n",
        "package/parts/other.py": "x = 1\n",
        "package/errors.py": "",
        "package/commands.py": "from gemma_deploy import work\nimport click\n",
        "package/patched.py": "",
        "source_code/modeling.py": "from .layers import x\nimport transformers\n",
        "source_code/layers.py": "x = 1\n",
        "source_code/config.json": "{}",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(paths, "PACKAGE", tmp_path / "package")
    monkeypatch.setattr(paths, "source_code_dir", lambda: tmp_path / "source_code")

    def fresh():
        provenance.code_of.cache_clear()
        provenance._bytes_of.cache_clear()
        return code_of(("gemma_deploy.work",))

    yield tmp_path, fresh
    provenance.code_of.cache_clear()
    provenance._bytes_of.cache_clear()


def test_code_is_what_is_imported_from_the_root_on(package):
    _, fresh = package
    found = fresh()
    assert found.modules == (
        "gemma_deploy", "gemma_deploy.parts", "gemma_deploy.parts.one", "gemma_deploy.parts.two", "gemma_deploy.work",
    )  # fmt: skip
    assert found.libraries == ("numpy", "torch")


@pytest.mark.parametrize(
    ("file", "text", "changes"),
    [
        ("package/work.py", "from gemma_deploy.parts import one\nimport numpy as np\nx = 1\n", True),
        ("package/parts/two.py", "g = 2\n", True),
        ("package/parts/__init__.py", "y = 1\n", True),
        ("package/parts/other.py", "x = 2\n", False),
        ("package/commands.py", "# a comment\n", False),
        ("package/errors.py", "# another sentence\n", False),
        ("source_code/layers.py", "x = 2\n", False),
    ],
)
def test_a_change_counts_where_it_is_imported(package, file, text, changes):
    root, fresh = package
    before = fresh().sha256
    (root / file).write_text(text)
    assert (fresh().sha256 != before) == changes


def test_the_patched_model_brings_source_code_with_it(package):
    root, fresh = package
    before = fresh().sha256
    (root / "package/work.py").write_text("from gemma_deploy.patched import model\n")
    found = fresh()
    assert found.modules == (
        "gemma_deploy.patched", "gemma_deploy.work", "source_code.layers", "source_code.modeling",
    )  # fmt: skip
    assert found.libraries == ("transformers",)
    for name in ("source_code/layers.py", "source_code/config.json"):
        known = fresh().sha256
        assert known != before
        (root / name).write_text('{"a": 1}')
        assert fresh().sha256 != known


def test_what_is_imported_for_types_alone_is_not_code(package):
    root, fresh = package
    (root / "package/work.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from gemma_deploy.parts import one\n\n"
        "    import numpy\nx = 1\n"
    )
    assert fresh().modules == ("gemma_deploy.work",)
    assert fresh().libraries == ()


def test_what_a_package_offers_is_code_where_it_is_asked_for(package):
    root, fresh = package
    (root / "package/parts/__init__.py").write_text(
        "from typing import TYPE_CHECKING\nfrom gemma_deploy.errors import offering\nif TYPE_CHECKING:\n"
        "    from gemma_deploy.parts.other import x\n    from gemma_deploy.parts.two import g\n\n"
        '__getattr__ = offering(\n    __name__,\n    {\n        "g": "gemma_deploy.parts.two",\n'
        '        "x": "gemma_deploy.parts.other",\n    },\n)\n'
    )
    (root / "package/work.py").write_text("from gemma_deploy.parts import g\n")
    before = fresh().sha256
    assert fresh().modules == ("gemma_deploy", "gemma_deploy.parts", "gemma_deploy.parts.two", "gemma_deploy.work")
    (root / "package/parts/other.py").write_text("x = 2\n")
    assert fresh().sha256 == before
    (root / "package/parts/two.py").write_text("g = 2\n")
    assert fresh().sha256 != before


def test_a_key_changes_with_inputs_reads_code_and_libraries(monkeypatch):
    def key(name="one", inputs=1, reads=None):
        return stage_key(name, code=("gemma_deploy.schemes",), inputs=inputs, reads=reads)

    known = key()
    assert key() == known
    others = [key("two"), key(inputs=2), key(reads={"before": "x"}), key(reads={"before": "y"})]
    monkeypatch.setattr(provenance.Code, "versions", {"numpy": "0"})
    others.append(key())
    assert len({known, *others}) == 6


def test_a_root_that_is_no_module_is_an_error():
    with pytest.raises(LookupError):
        code_of(("gemma_deploy.nowhere",))


@pytest.mark.parametrize("stage", [*STAGES, "tvm_vacc", "onnxruntime"])
def test_no_stage_depends_on_commands_or_on_other_stages_of_the_program(stage):
    """A comment in a command, in the report or in a benchmark throws no work away."""
    parts = {name.split(".")[1] for name in code_of(roots_of(stage)).modules if name.count(".")}
    assert not parts & {"commands", "cli", "compile", "bench", "evaluation", "preflight", "testing"}
    if stage not in ("GATE", "FILES"):
        assert not parts & {"recipe", "job", "proving", "verifying"}
    if stage in ("PARAMETERS", "tvm_vacc", "onnxruntime"):
        assert not parts & {"parity", "runtime", "artifact"}


@pytest.mark.parametrize("stage", [*STAGES, "tvm_vacc", "onnxruntime"])
def test_every_module_that_a_stage_really_imports_counts(stage):
    """Against Python itself: what importing the roots loads is a part of what the text of the modules says."""
    roots = roots_of(stage)
    code = f"import sys, {', '.join(roots)}; print(*[name for name in sys.modules if name.startswith('gemma_deploy.')])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    found = set(code_of(roots).modules) | provenance.NEUTRAL
    assert sorted(set(loaded) - found) == []
