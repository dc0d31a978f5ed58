"""House rules (T0): what may import what, what stays free of torch, how long a module is, what the help shows."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner

from gemma_deploy import dtypes, names
from gemma_deploy.architectures import ROWS, by_gguf_name
from gemma_deploy.cli import COMMANDS, cli
from gemma_deploy.recipe import Recipe
from gemma_deploy.recipe.catalogue import find_recipe
from tests.imports import modules_after

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "gemma_deploy"
MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCE_CODE = sorted((ROOT / "source_code").glob("*.py"))
RECIPES = sorted((ROOT / "build_in").rglob("*.yaml"))
LONGEST_MODULE_LINES = 400
# A part imports only parts to its left.
ORDER = (
    "offering",
    *("names", "dtypes", "errors", "extras", "bounds", "reading", "paths", "writing", "workdir", "child"),
    "provenance",
    *("machine", "tables", "progress", "estimates", "client", "cluster"),
    *("architectures", "schemes", "checkpoint", "chat", "text", "staging", "partition", "patched"),
    *(
        "calibration",
        "quantization",
        "graph",
        "params",
        "split",
        "merging",
        "artifact",
        "parity",
        "runtime",
        "backends",
    ),
    "engine",
    *("proving", "verifying", "evaluation", "bench", "finetune", "serve", "api"),
    *("recipe", "job", "preflight", "planning", "stages", "compile", "generation"),
    *("options", "commands", "cli", "testing"),
)
TORCH_FREE = (
    *("child", "chat", "text"),
    *(
        "errors",
        "reading",
        "recipe",
        "checkpoint",
        "partition",
        "params",
        "artifact",
        "runtime",
        "preflight",
        "serve",
        "cluster",
        "cli",
    ),
)


def imported_modules(tree: ast.Module) -> list[tuple[str, int]]:
    """(dotted name, line) of every import, those inside functions included."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "gemma_deploy":
            found += [(f"gemma_deploy.{alias.name}", node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(("." * node.level + (node.module or ""), node.lineno))
    return found


def backward_imports(part: str, source: str) -> list[str]:
    """Imports of gemma_deploy in `source`, a module of `part`, that are relative or do not point left."""
    wrong = []
    for name, line in imported_modules(ast.parse(source)):
        target = name.split(".")[1] if name.startswith("gemma_deploy.") else part
        if name.startswith(".") or ORDER.index(target) > ORDER.index(part):
            wrong.append(f"line {line}: {part} imports {name}")
    return wrong


def part_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_imports_go_left_to_right():
    wrong = [
        f"{file.relative_to(ROOT)} {problem}"
        for file in MODULES
        if part_of(file) != "__init__"
        for problem in backward_imports(part_of(file), file.read_text(encoding="utf-8"))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("part", "source", "wrong"),
    [
        ("graph", "from gemma_deploy.checkpoint import Checkpoint", 0),
        ("checkpoint", "from gemma_deploy.graph import trace", 1),
        ("checkpoint", "from gemma_deploy import graph, errors", 1),
        ("params", "def f():\n    import gemma_deploy.compile", 1),
        ("params", "from . import plan", 1),
    ],
)
def test_the_import_check_sees_what_it_should(part, source, wrong):
    assert len(backward_imports(part, source)) == wrong


def circles(imports: dict[str, set[str]]) -> list[tuple[str, ...]]:
    """Modules that import each other, be it by way of others: the strongly connected parts of a graph.

    Args:
        imports: what each module imports, by name.
    """

    def reached(module: str) -> set[str]:
        found: set[str] = set()
        waiting = [module]
        while waiting:
            new = imports[waiting.pop()] - found
            found |= new
            waiting += new
        return found

    reach = {module: reached(module) for module in imports}
    in_circle = [module for module in imports if module in reach[module]]
    return sorted({tuple(sorted(m for m in in_circle if m in reach[n] and n in reach[m])) for n in in_circle})


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def modules_imported(file: Path, known: set[str]) -> set[str]:
    """Modules of ours that a file imports, inside functions and for type checkers too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & known or {node.module or ""}
    return (found & known) - {module_name(file)}


def test_no_modules_import_each_other():
    known = {module_name(file) for file in MODULES}
    assert not circles({module_name(file): modules_imported(file, known) for file in MODULES})


def test_the_search_for_circles_sees_what_it_should():
    imports = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set(), "f": {"g"}, "g": {"f", "e"}}
    assert circles(imports) == [("a", "b", "c"), ("f", "g")]
    assert not circles({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def test_every_folder_with_modules_is_a_package_and_has_a_place_in_the_order():
    assert [str(f.parent) for f in MODULES if not (f.parent / "__init__.py").exists()] == []
    assert {part_of(file) for file in MODULES} - {"__init__"} <= set(ORDER)


NAMES_OF_GENERATIONS = {name for row in ROWS for name in (row.model_type, *row.multimodal)} | set(by_gguf_name())


def literals(source: str) -> list[tuple[str, int]]:
    """(text, line) of every string constant, docstrings and the pieces of f-strings left out."""
    tree = ast.parse(source)
    said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    constants = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in said)
    return [(node.value, node.lineno) for node in constants if isinstance(node.value, str)]


def test_generations_are_named_in_their_rows_alone():
    wrong = [
        f"{file.relative_to(ROOT)} line {line}: {text!r}"
        for file in MODULES
        if part_of(file) not in ("architectures", "chat", "testing")  # a form of replies is named like who speaks it
        for text, line in literals(file.read_text(encoding="utf-8"))
        if text in NAMES_OF_GENERATIONS
        and (file.name, text) != ("gguf.py", "gemma4")  # llama.cpp's name of a kind of tokenizer
    ]
    assert not wrong, "\n".join(wrong)


def test_the_search_for_names_of_generations_sees_what_it_should():
    source = '"""gemma2 in a docstring"""\nif kind == "gemma2":\n    x = {"gemma3": f"a gemma2 {kind}"}'
    assert [one for one in literals(source) if one[0] in NAMES_OF_GENERATIONS] == [("gemma2", 2), ("gemma3", 3)]


FACTS = {name: value for name, value in vars(names).items() if name.isupper()}


def facts_again(source: str) -> list[tuple[int, str]]:
    """(line, what) of every fact of names.py that a module spells or names itself; pieces of f-strings are let be."""
    tree = ast.parse(source)
    left_out = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    left_out |= {id(piece) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for piece in node.values}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and id(node) not in left_out:
            spelled = isinstance(node.value, str | float) and node.value in FACTS.values()
            found += [(node.lineno, repr(node.value))] if spelled else []
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in FACTS:
            found.append((node.lineno, node.id))
    return sorted(found)


def test_facts_of_names_stand_nowhere_else():
    wrong = [
        f"{file.relative_to(ROOT)} line {line}: {what}"
        for file in MODULES
        if part_of(file) != "names"
        for line, what in facts_again(file.read_text(encoding="utf-8"))
    ]
    assert not wrong, "\n".join(wrong)


def test_the_search_for_facts_sees_what_it_should():
    source = '"""config.json"""\nx = open("config.json")\nMIB = 1 << 20\ny = f"{z}config.json"\nlimit = 65504.0\n'
    assert facts_again(source) == [(2, "'config.json'"), (3, "MIB"), (5, "65504.0")]


def dtype_tables(source: str) -> list[int]:
    """Lines of dicts that say what ONNX or safetensors calls dtypes."""
    known = {row.safetensors for row in dtypes.ROWS}
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Dict):
            words = [one for one in (*node.keys, *node.values) if isinstance(one, ast.Constant) and one.value in known]
            types = [one for one in node.values if re.search(r"\b(DataType|TensorProto)\.[A-Z0-9]+$", ast.unparse(one))]
            found += [node.lineno] if max(len(words), len(types)) > 1 else []
    return sorted(found)


def test_dtypes_have_one_table():
    wrong = [
        f"{file.relative_to(ROOT)} line {line}"
        for file in MODULES
        for line in dtype_tables(file.read_text(encoding="utf-8"))
    ]
    assert not wrong, "\n".join(wrong)


def test_the_search_for_tables_of_dtypes_sees_what_it_should():
    source = 'A = {"F32": 4, "F16": 2}\nB = {1: ir.DataType.FLOAT, 2: ir.DataType.INT8}\nC = {"F32": 1, "x": 2}'
    assert dtype_tables(source) == [1, 2]


MOST_POSITIONAL = 3
# Called by others, who give their arguments in an order.
SIGNATURES_OF_OTHERS = {
    "gemma_deploy/finetune/codes.py: _Product.forward",  # torch.autograd
    "gemma_deploy/finetune/head.py: SummedCrossEntropy.forward",  # torch.autograd
    "gemma_deploy/finetune/trainer.py: Trainer.compute_loss",  # TRL
    "gemma_deploy/graph/disconnected.py: DisconnectedParts.forward",  # torch.export
    "gemma_deploy/split/chain.py: SplitChain.forward",  # as transformers' models
    "gemma_deploy/split/factory.py: ModelFactory.create_split_models",  # the vendor's own interface
    "gemma_deploy/split/passing.py: PartBeside.last_positions",  # source_code/, which calls it
    "gemma_deploy/text/sandbox.py: ChatEnvironment.call_binop",  # jinja2
    "gemma_deploy/text/sandbox.py: to_json",  # a filter of templates, as in transformers
}


def long_signatures(source: str) -> list[str]:
    """Public functions, methods and constructors that take more than three arguments by position; commands aside."""
    found = []

    def look(node: ast.AST, owner: str) -> None:
        for one in ast.iter_child_nodes(node):
            if isinstance(one, ast.ClassDef):
                look(one, f"{one.name}.")
            elif isinstance(one, ast.FunctionDef):
                taken = [*one.args.posonlyargs, *one.args.args]
                decorators = {ast.unparse(decorator).partition("(")[0] for decorator in one.decorator_list}
                count = len(taken) - (bool(owner) and "staticmethod" not in decorators)
                public = one.name == "__init__" or not one.name.startswith("_")
                command = any(name.startswith("click.") for name in decorators)
                found.extend([f"{owner}{one.name}"] if count > MOST_POSITIONAL and public and not command else [])

    look(ast.parse(source), "")
    return found


def test_calls_name_what_comes_behind_the_third_argument():
    files = {file.relative_to(ROOT): file.read_text(encoding="utf-8") for file in MODULES}
    wrong = {f"{file}: {name}" for file, source in files.items() for name in long_signatures(source)}
    assert wrong == SIGNATURES_OF_OTHERS


def test_the_search_for_long_signatures_sees_what_it_should():
    source = "def f(a, b, c, d): ...\ndef g(a, b, c, *, d): ...\nclass C:\n    def h(self, a, b, c, d): ...\n"
    source += "    def i(self, a, b, c): ...\n    @staticmethod\n    def j(a, b, c, d): ...\n"
    source += "@click.option('x')\ndef k(a, b, c, d): ...\ndef _l(a, b, c, d): ...\n"
    assert long_signatures(source) == ["f", "C.h", "C.j"]


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def modules_of():
    found = modules_after(f"import gemma_deploy.{part}" for part in TORCH_FREE)
    return dict(zip(TORCH_FREE, found.values(), strict=True))


@pytest.mark.parametrize("part", TORCH_FREE)
def test_importing_it_imports_no_torch(part, modules_of):
    assert f"gemma_deploy.{part}" in modules_of[part]
    assert not modules_of[part] & {"torch", "transformers"}


def test_help_needs_neither_torch_nor_onnx():
    code = (
        "import sys; from click.testing import CliRunner; from gemma_deploy.cli import COMMANDS, cli\n"
        "codes = [CliRunner().invoke(cli, [name, '--help']).exit_code for name in COMMANDS]\n"
        "print(codes, sorted({'torch', 'transformers', 'onnx', 'onnxruntime', 'datasets'} & set(sys.modules)))"
    )
    assert run_python(code) == f"{[0] * len(COMMANDS)} []"


@pytest.mark.parametrize("file", [*MODULES, *SOURCE_CODE], ids=lambda file: str(file.relative_to(ROOT)))
def test_a_module_fits_in_one_sitting(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= LONGEST_MODULE_LINES


@pytest.mark.parametrize("file", SOURCE_CODE, ids=lambda file: file.name)
def test_source_code_stands_alone(file):
    beside = {f".{other.stem}" for other in SOURCE_CODE}
    allowed = {"torch", "transformers", "huggingface_hub", *sys.stdlib_module_names}
    for name, line in imported_modules(ast.parse(file.read_text(encoding="utf-8"))):
        assert name in beside or name.split(".")[0] in allowed, f"{file.name} line {line} imports {name}"


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.name)
def test_every_shipped_recipe_loads(file):
    recipe = Recipe.load(file, env={"GEMMA_CHECKPOINT": "demo"})
    assert recipe.name == yaml.safe_load(file.read_text(encoding="utf-8"))["name"]
    assert recipe.prefill_length < recipe.context_length


def test_recipes_named_in_the_texts_exist():
    texts = [ROOT / "README.md", ROOT / "Makefile", *RECIPES, *MODULES]
    named = {match for text in texts for match in re.findall(r"build_in/[\w./-]+\.yaml", text.read_text("utf-8"))}
    assert "build_in/vendor/hf_gemma_int8.yaml" in named
    assert sorted(name for name in named if not find_recipe(ROOT / name).exists()) == []


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_shows_examples_that_parse(name):
    result = CliRunner().invoke(cli, [*([name] if name else []), "--help"])
    assert result.exit_code == 0, result.output
    examples = re.findall(r"^\s+gemma-deploy (.+)$", result.output.partition("Examples:")[2], re.MULTILINE)
    assert examples, result.output
    for example in examples:
        check_options(example.split(" #")[0].split())


def check_options(words: list[str]) -> None:
    """Every command and option of an example exists."""
    command = cli.get_command(click.Context(cli), words[0])
    assert command is not None, words
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    options = {word.split("=")[0] for word in words[1:] if re.fullmatch(r"--?[a-z][\w-]*(=.*)?", word)}
    assert options <= known | {"--help", "-h"}, f"{words}: {options - known}"
