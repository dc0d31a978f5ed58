"""The page's files without a browser: nothing from elsewhere, nothing that makes text into HTML, all texts there."""

import html.parser
import json
import re

import pytest

from gemma_deploy.serve.webui import FOLDER

FILES = sorted(FOLDER.iterdir())
SCRIPTS = [file for file in FILES if file.suffix == ".js"]
LONGEST_LINES = 400
# Names that are no requests: SVG's, and where a protocol is described.
NAMES = {"http://www.w3.org/2000/svg", "https://html.spec.whatwg.org/multipage/server-sent-events.html"}
# What would make a script, or HTML, of a text.
SINKS = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|createContextualFragment|DOMParser|document\.write|srcdoc|\beval\b|"
    r"new Function|setTimeout\(\s*[\"'`]|import\(|Worker\("
)


def text_of(file):
    return file.read_text(encoding="utf-8")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_file_is_short_and_asks_nothing_of_elsewhere(file):
    text = text_of(file)
    assert len(text.splitlines()) <= LONGEST_LINES
    addresses = {
        one.rstrip(".,)") for one in re.findall(r"(?:https?:|(?<=[\"'(]))//[\w.-]+\.[a-z]{2,}[^\s\"'`<>]*", text)
    }
    assert addresses <= NAMES
    assert "@import" not in text
    assert "url(" not in text


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.name)
def test_no_script_makes_html_of_a_text(file):
    assert not SINKS.search(text_of(file))
    imported = re.findall(r"^(?:import|export)\b[^;]*?from\s+\"([^\"]+)\"", text_of(file), re.MULTILINE)
    assert [name for name in imported if not (name.startswith("./") and (FOLDER / name).is_file())] == []


@pytest.mark.parametrize("code", ["a.innerHTML = b", "eval(x)", "setTimeout('x', 1)", "new DOMParser()"])
def test_the_search_for_sinks_sees_what_it_should(code):
    assert SINKS.search(code)


class Tags(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def test_the_page_has_no_script_style_or_listener_of_its_own():
    tags = Tags(text_of(FOLDER / "index.html")).tags
    for tag, given in tags:
        assert not [name for name in given if name.startswith("on") or name == "style"], (tag, given)
        assert tag != "style"
        if tag == "script":
            assert (FOLDER / given["src"]).is_file()
        if tag == "link":
            assert (FOLDER / given["href"]).is_file()
    ids = [given["id"] for _, given in tags if "id" in given]
    assert len(ids) == len(set(ids))
    asked = {name for file in SCRIPTS for name in re.findall(r"byId\(\"([\w-]+)\"\)", text_of(file))}
    assert asked <= set(ids)


def texts():
    """Language -> key -> text."""
    found = {}
    for language, block in re.findall(r"^  (\w+): \{\n(.*?)^  \},", text_of(FOLDER / "texts.js"), re.M | re.S):
        lines = re.findall(r"^    (\w+): (\".*\"),$", block, re.MULTILINE)
        assert len(lines) == len(block.splitlines()), language
        found[language] = {key: json.loads(text) for key, text in lines}
        assert len(found[language]) == len(lines), language
    return found


def test_both_languages_say_the_same_things():
    found = texts()
    assert set(found) == {"en", "zh"}
    places = {
        language: {key: sorted(re.findall(r"\{\d\}", text)) for key, text in said.items()}
        for language, said in found.items()
    }
    assert places["en"] == places["zh"]
    assert not [key for key, text in found["zh"].items() if not re.search(r"[\u4e00-\u9fff]", text)]


def test_every_text_that_is_asked_for_is_there_and_none_is_left_over():
    known = set(texts()["en"])
    page = text_of(FOLDER / "index.html")
    named = set(re.findall(r"data-(?:text|label|hint)=\"(\w+)\"", page))
    code = "".join(text_of(file) for file in SCRIPTS if file.name != "texts.js")
    direct = set(re.findall(r"\bt\(\"(\w+)\"", code))
    assert named | direct <= known
    quoted = set(re.findall(r"\"(\w+)\"", code))
    assert known - named - direct - quoted == set()
