"""The documents: links resolve, commands parse, the quickstart runs, generated parts and references are right."""

import re
import runpy
import shlex
from pathlib import Path

import click
import pytest

from gemma_deploy.backends.base import Backend
from gemma_deploy.cli import cli, main
from gemma_deploy.recipe.catalogue import find_recipe, shipped_recipes
from tests.test_house import ORDER

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "findings" / "README.md", ROOT / "calib" / "README.md"]
)
README_LINES = 150
LINK = re.compile(r"(?<!!)\[[^\]\[]+\]\(([^()\s]+)\)")
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
RUN = re.compile(r"<!-- run -->\n```\w*\n(.*?)```", re.DOTALL)
SAID = "Return the value of the message.\n"


def name_of(page):
    return str(page.relative_to(ROOT))


def text_of(page):
    return page.read_text(encoding="utf-8")


def prose(text):
    """Without code."""
    return re.sub(r"`[^`\n]*`", "code", FENCE.sub("", text))


def anchors(text):
    """Of the headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower().replace("`", "")).replace(" ", "-") for title in titles}


def broken(page, text):
    """Relative links of a page that lead nowhere."""
    found = []
    for target in LINK.findall(prose(text)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page if not path else (page.parent / path).resolve()
        if not file.exists() or (anchor and anchor not in anchors(text_of(file))):
            found.append(target)
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    assert broken(page, text_of(page)) == []


def test_the_search_for_links_sees_what_it_should():
    text = "[a](docs/nothing.md) [b](README.md) [c](README.md#no-such) [d](#one) `[e](code)` [f](https://x)\n# Two"
    assert broken(ROOT / "X.md", text) == ["docs/nothing.md", "README.md#no-such", "#one"]


def test_every_page_is_linked_from_the_readme():
    linked = set(LINK.findall(text_of(ROOT / "README.md")))
    pages = {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")}
    assert pages - {target.partition("#")[0] for target in linked} == set()


def test_the_readme_is_short():
    assert len(text_of(ROOT / "README.md").splitlines()) <= README_LINES


def commands(text):
    """Words behind `gemma-deploy` of every such command in code blocks, those of other languages left out."""
    found = []
    for _, language, code in FENCE.findall(text):
        if language in ("python", "yaml", "csharp", "cpp", "json"):
            continue
        for line in re.sub(r"\\\n", " ", code).splitlines():
            words = shlex.split(line, comments=True)
            parts, current = [], []
            for word in [*words, "|"]:
                if word in ("|", "&&"):
                    parts.append(current)
                    current = []
                else:
                    current.append(word)
            for part in parts:
                while part and re.fullmatch(r"[A-Z_]+=.*", part[0]):
                    part = part[1:]
                if part[:1] == ["gemma-deploy"]:
                    found.append(part[1:])
    return found


def parse(words):
    """Parse a command as the program does, and run nothing.

    Raises:
        click.ClickException: it would be refused.
    """
    context = cli.make_context("gemma-deploy", list(words))
    name, command, rest = cli.resolve_command(context, [*context._protected_args, *context.args])
    command.make_context(name, rest, parent=context)


COMMANDS = [
    pytest.param(words, id=f"{name_of(page)}: {' '.join(words)}"[:80])
    for page in PAGES
    for words in commands(text_of(page))
]


@pytest.mark.parametrize("words", COMMANDS)
def test_commands_parse(words):
    parse(words)


def test_the_search_for_commands_sees_what_it_should():
    text = '```\nA=1 gemma-deploy run X \\\n    -p "a b"  # c\nprintf "x\\n" | gemma-deploy chat X\n```\n'
    text += "```python\ngemma-deploy no\n```"
    assert commands(text) == [["run", "X", "-p", "a b"], ["chat", "X"]]
    with pytest.raises(click.ClickException):
        parse(["run", "X", "--no-such"])
    with pytest.raises(click.ClickException):
        parse(["fly"])


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_recipes_that_are_named_exist(page):
    text = text_of(page)
    named = {words[1] for words in commands(text) if words[0] in ("compile", "recipes") and len(words) > 1} - {"RECIPE"}
    named |= set(re.findall(r"`((?:cpu|accelerator)-[\w-]*\w)[` ]", text))
    named |= set(re.findall(r"`compile ([a-z][\w./-]*)", text))
    for name in named - {"RECIPE", "NAME"}:
        assert find_recipe(name).is_file(), name


def test_every_recipe_is_in_the_table_of_the_readme():
    readme = text_of(ROOT / "README.md")
    assert [one.name for one in shipped_recipes() if f"`{one.name}`" not in readme] == []


def test_the_quickstart_runs(demo_artifact, tmp_path, monkeypatch, capsys):
    """Its commands one after the other, in a folder where the workspace is; the artifact is there already."""
    (block,) = RUN.findall(text_of(ROOT / "docs" / "quickstart.md"))
    (tmp_path / "workspace").symlink_to(demo_artifact.parent)
    monkeypatch.chdir(tmp_path)
    lines = [shlex.split(line, comments=True) for line in block.splitlines()]
    assert [words[0] for words in lines] == ["gemma-deploy"] * len(lines)
    for words in lines:
        assert main(words[1:]) == 0, (words, capsys.readouterr().err)
        shown = capsys.readouterr().out
        assert (SAID in shown) == (words[1] == "run")


def test_python_of_the_page_about_transformers_runs(tmp_path, monkeypatch):
    """Beside the staged checkpoint that the page makes."""
    monkeypatch.chdir(tmp_path)
    assert main(["stage", "demo", "staged/gemma-2b"]) == 0
    (block,) = re.findall(r"```python\n(.*?)```", text_of(ROOT / "docs" / "transformers.md"), re.DOTALL)
    names = {}
    exec(block, names)
    assert type(names["model"]).__module__.endswith("modeling_gemma_vacc")


def test_the_readme_and_the_quickstart_say_the_same(demo_artifact):
    (block,) = RUN.findall(text_of(ROOT / "docs" / "quickstart.md"))
    assert commands(f"```\n{block}```") == commands(text_of(ROOT / "README.md"))[:5]
    assert SAID.strip() in text_of(ROOT / "README.md")


@pytest.fixture(scope="module")
def made():
    return runpy.run_path(str(ROOT / "scripts" / "make_docs.py"))


def test_generated_parts_are_as_the_code_says(made, capsys):
    assert made["main"]("--check") == 0, capsys.readouterr().out + "run: python scripts/make_docs.py"


def test_a_stale_part_is_noticed(made):
    page = text_of(ROOT / "docs" / "recipes.md")
    assert made["rewritten"](page) == page
    stale = page.replace("| 1024 |", "| 1025 |")
    assert stale != page
    assert made["rewritten"](stale) == page


def test_a_key_without_a_sentence_is_noticed(made, monkeypatch):
    monkeypatch.delitem(made["MEANING"], "split.points")
    with pytest.raises(SystemExit, match=r"split\.points"):
        made["check_meanings"]()


def references(text):
    """(page, section or "") of every reference in code to a document."""
    return [(page, section) for page, section in re.findall(r"(?<![\w/])docs/([\w-]+\.md)(?: (\d(?:\.\d)?))?", text)]


CODE = [file for name in ("gemma_deploy", "source_code", "tests", "scripts", "benchmarks", "examples")
        for file in sorted((ROOT / name).rglob("*.py")) if file.name != "test_docs.py"]  # fmt: skip


def test_references_from_code_exist():
    missing = []
    for file in CODE:
        for page, section in references(text_of(file)):
            there = ROOT / "docs" / page
            if not there.exists() or (section and not re.search(rf"^#+ {section} ", text_of(there), re.MULTILINE)):
                missing.append(f"{name_of(file)}: docs/{page} {section}")
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_of_the_program_that_are_named_exist(page):
    """By path from the top, or by name or the last parts of the path where the page says in which folder."""
    named = set(re.findall(r"`([\w/-]+\.(?:py|jinja|yaml))(?: [^`\n]*)?`", text_of(page))) - {"mine.yaml"}
    known = [file.as_posix() for name in ("gemma_deploy", "source_code", "tests", "scripts", "benchmarks", "examples")
             for file in (ROOT / name).rglob("*") if file.is_file()]  # fmt: skip
    known.append("/chat_template.jinja")
    missing = [name for name in sorted(named) if not any(file.endswith(f"/{name}") for file in known)]
    if page.name != "CHANGELOG.md":  # which tells of what was
        assert [name for name in missing if "NAME" not in name] == []


def test_code_refers_to_documents_by_their_names():
    """Not to `design 4.3` or to notes that are not in the repository."""
    vague = re.compile(r"\bdesign (?:section )?\d|\bgemma_facts\b|\(design\b|[Dd]esign notes")
    found = [f"{name_of(file)}: {match[0]}" for file in CODE for match in vague.finditer(text_of(file))]
    assert found == []


def test_the_design_names_every_part_of_the_program():
    table = text_of(ROOT / "docs" / "design.md").partition("| part | what it is |")[2].partition("\n\n")[0]
    named = set(re.findall(r"`(\w+)/?`", "\n".join(row.split("|")[1] for row in table.splitlines() if "|" in row)))
    assert named == set(ORDER)


def test_the_page_about_back_ends_names_every_member():
    table = text_of(ROOT / "docs" / "adding-a-back-end.md").partition("| what | members")[2].partition("\n\n")[0]
    named = set(
        re.findall(r"`(\w+)`", "\n".join(row.split("|")[2] for row in table.splitlines() if row.count("|") > 3))
    )
    assert named == {name for name in vars(Backend) if not name.startswith("_")}


def test_messages_that_are_quoted_exist():
    rows = re.findall(r"^\| `([^`]+ [^`]+)`", text_of(ROOT / "docs" / "troubleshooting.md"), re.MULTILINE)
    source = "".join(text_of(file) for file in (ROOT / "gemma_deploy").rglob("*.py"))
    pieces = [piece.strip() for row in rows for piece in re.split(r"\b[NP]\b|\.\.\.", row)]
    assert len(pieces) > 5
    assert [piece for piece in pieces if piece not in source] == []
