"""What the page makes of a model's text: what markdown-it makes of ordinary text, and nothing that can run."""

import html.parser
import random
import time

import pytest

from tests.serve.page.openai_server import Said
from tests.serve.page.samples import HOSTILE, LARGE, ORDINARY

pytestmark = pytest.mark.slow
# A text drawn in a node outside the page -> its HTML.
DRAW = """
const [text, done] = arguments;
import('/markdown.js').then(({Markdown}) => {
  const root = document.createElement('div');
  const drawn = new Markdown(root);
  for (const end of %s) drawn.draw(text.slice(0, end));
  done(root.innerHTML);
}).catch((error) => done('failed: ' + error.stack));
"""
TAGS = {
    *("p", "em", "strong", "del", "code", "pre", "br", "hr", "ul", "ol", "li", "blockquote", "a", "span", "div"),
    *("h2", "h3", "h4", "h5", "h6", "table", "thead", "tbody", "tr", "th", "td", "button", "svg", "path"),
}
ATTRIBUTES = {
    "a": {"href", "target", "rel", "title"},
    "button": {"type", "class", "aria-label", "title"},
    "svg": {"viewbox", "aria-hidden"},
    "path": {"d"},
    "ol": {"start"},
    "pre": {"tabindex", "class"},
}


class Tree(html.parser.HTMLParser):
    """(tag, attributes) and texts in their order, as lists that can be compared."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        self.found.append(("/" + tag, {}))

    def handle_data(self, data):
        if self.found and self.found[-1][0] == "":
            data = self.found.pop()[1] + data
        self.found.append(("", data))


def outline(text):
    """Tags and words of ordinary HTML; heads of code, spaces around blocks and the boxes of this page left out."""
    found, skipped = [], 0
    for tag, given in Tree(text).found:
        if tag == "div" and given.get("class") == "code-head":
            skipped = 1
        elif skipped:
            skipped += (tag in ("div", "span", "button", "svg", "path")) - tag.startswith("/")
        elif tag == "":
            found += [given.strip("\n") if found and found[-1] == "code" else " ".join(given.split())]
        elif tag.strip("/") not in ("div", "span", "br/"):
            level = tag[-1] if tag.strip("/") in {f"h{i}" for i in range(1, 7)} else ""
            found.append(f"{tag[:-1]}{min(6, int(level))}" if level else tag)
            found += [given["href"].rstrip("/")] if "href" in given else []
            found += [f"start {given['start']}"] if "start" in given else []
    return [one for one in found if one not in ("", "/br", "/hr")]


def reference(text):
    """markdown-it with tables and strikethrough, line ends as breaks, headings one lower, as the page has them."""
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"breaks": True, "html": False}).enable(["table", "strikethrough"])
    parser.disable(["lheading", "code", "reference", "entity", "image"])
    parser.validateLink = lambda url: url.startswith(("http://", "https://"))
    tokens = parser.parse(text)
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(6, int(token.tag[1]) + 1)}"
    rendered = parser.renderer.render(tokens, parser.options, {})
    return rendered.replace("<s>", "<del>").replace("</s>", "</del>")


def draw(page, text, ends="[text.length]"):
    page.driver.set_script_timeout(120)
    drawn = page.driver.execute_async_script(DRAW % ends, text)
    assert not drawn.startswith("failed: "), drawn
    return drawn


def test_ordinary_text_is_read_as_markdown_it_reads_it(page):
    wrong = {}
    for text in ORDINARY:
        drawn, expected = outline(draw(page, text)), outline(reference(text))
        if drawn != expected:
            wrong[text] = (drawn, expected)
    assert not wrong, "\n\n".join(f"{text!r}\n  {one}\n  {other}" for text, (one, other) in wrong.items())


def test_a_text_that_grows_is_drawn_as_if_it_came_at_once(page):
    for text in ORDINARY:
        every = "Array.from({length: text.length}, (_, i) => i + 1)"
        assert draw(page, text, every) == draw(page, text), text


def test_addresses_in_a_text_become_links_without_what_is_around_them(page):
    text = (
        'See https://e.org/a, (https://e.org/b_(c)), **https://e.org/d**, "http://e.org/e"\uff1a见https://e.org/f\u3002'
    )
    text += " but not xhttps://e.org/g, ftp://e.org or `https://e.org/h`; [https://e.org/i](https://e.org/j)."
    links = [given["href"] for tag, given in Tree(draw(page, text)).found if tag == "a"]
    assert links == [f"https://e.org/{one}" for one in ("a", "b_(c)", "d")] + [
        "http://e.org/e",
        "https://e.org/f",
        "https://e.org/j",
    ]


def test_mixtures_have_no_tag_and_no_attribute_but_the_pages_own(page):
    """Samples cut into pieces and mixed, drawn; and only http and https in links."""
    draws = random.Random(7)
    marks = [
        "*",
        "**",
        "_",
        "`",
        "```",
        "\n",
        "\n\n",
        "> ",
        "- ",
        "1. ",
        "| ",
        "|---|---|\n",
        "[",
        "](",
        ")",
        "<",
        "\\",
    ]
    pieces = [*marks, *HOSTILE, *ORDINARY]
    texts = ["".join(draws.choices(pieces, k=draws.randrange(1, 30))) for _ in range(300)]
    for text in [*HOSTILE, *ORDINARY, *texts]:
        for tag, given in Tree(draw(page, text)).found:
            if tag and not tag.startswith("/"):
                assert tag in TAGS, (tag, text)
                assert set(given) <= ATTRIBUTES.get(tag, {"class"}), (tag, given, text)
                if tag == "a":
                    assert given["href"].startswith(("https://", "http://")), text
                    assert given["rel"] == "noopener noreferrer nofollow"


@pytest.mark.parametrize("name", LARGE)
def test_no_text_is_costly(page, name):
    """Longest seen on a busy machine 1.0 s (fences); what is quadratic takes a minute."""
    started = time.monotonic()
    draw(page, LARGE[name])
    assert time.monotonic() - started < 10


def test_hostile_replies_run_nothing_load_nothing_and_are_shown(page, server):
    """In replies, thoughts, names of models and errors alike; the browser's log stays empty of refusals too."""
    server.models = HOSTILE[:4]
    page.reload()
    for text in HOSTILE:
        server.answers.append(Said([text], thoughts=[text]))
        page.ask(text)
    page.script("document.querySelectorAll('details').forEach(d => d.open = true)")
    server.answers.append(Said(status=400, body=b'{"error": {"message": "<img src=x onerror=\\"window.ran=true\\">"}}'))
    page.ask("x")
    page.reload()
    page.click("#list .open", which=0)
    page.script("document.querySelectorAll('summary, article .icon').forEach(e => e.click())")
    time.sleep(0.5)
    assert page.script("return window.ran") is None
    loaded = page.script("return performance.getEntriesByType('resource').map(e => new URL(e.name).origin)")
    assert set(loaded) == {page.url.rstrip("/")}
    assert page.script("return document.querySelectorAll('script').length") == 2
    assert not page.all(
        "#messages img, #messages iframe, #messages style, #messages object, #messages form:not(.editor)"
    )
    assert "<script>window.ran = true</script>" in page.script("return document.body.textContent")


def test_the_policy_stops_what_would_get_through(page):
    """The second line: even nodes that a fault of the page let in do not run."""
    attempts = [
        "document.body.innerHTML = '<img src=x onerror=window.ran=true>'",
        "const i = document.createElement('img'); i.setAttribute('onerror', 'window.ran = true')",
        "const s = document.createElement('script'); s.append('window.ran = true'); document.body.append(s)",
        "const s = document.createElement('script'); s.src = 'https://e.org/x.js'; document.body.append(s)",
        "const i = document.createElement('img'); i.src = 'https://e.org/x.png'; document.body.append(i)",
        "const f = document.createElement('iframe'); f.src = 'https://e.org/'; document.body.append(f)",
        "const a = document.createElement('a'); a.href = 'javascript:window.ran=true'; a.click()",
        "fetch('https://e.org/').catch(() => {})",
        "setTimeout('window.ran = true')",
    ]
    for attempt in attempts:
        page.script(
            "try { (() => { " + attempt + " })(); } catch (error) { if (error.name !== 'TypeError') throw error; }"
        )
    time.sleep(0.5)
    assert page.script("return window.ran") is None
    told = page.problems()
    assert len([one for one in told if "Content Security Policy" in one or "Trusted" in one]) >= len(attempts), told


def test_a_long_reply_stays_smooth(page, server):
    """A reply of 100,000 characters in 2,000 pieces is drawn at most a few times a second, and to its end."""
    words = "**word** and `code` in a sentence of some length.\n"
    server.answers.append(Said([words] * 2000, pause=0.001))
    page.ask("x", wait=False)
    page.until(lambda: not page.one("#stop").is_displayed(), 60)
    assert page.script("return document.querySelectorAll('article strong').length") == 2000


SPLIT = """
const [text, done] = arguments;
import('/channels.js').then(({split}) =>
  done(Array.from({length: text.length + 1}, (_, i) => split(text.slice(0, i), false)).concat([split(text, true)])));
"""
CHANNELS = {
    "a<|channel>thought\nb\n<channel|>c": ("b", "ac"),
    "<|channel>thought\nb<channel|>\n\nc<|channel>thought\nd<channel|>e": ("b\n\nd", "ce"),
    "<think>b</think>c": ("b", "c"),
    " \n<think>b < c</think>\n\nc": ("b < c", "c"),
    "say <think>b</think>": ("", "say <think>b</think>"),
    "a < b <| c <chan": ("", "a < b <| c <chan"),
    "<|channel>thought\nb <chan": ("b <chan", ""),
    "<|channel>final\na": ("", "<|channel>final\na"),
}


@pytest.mark.parametrize("text", CHANNELS)
def test_what_is_shown_of_a_marker_that_comes_in_pieces_is_nothing(page, text):
    *growing, whole = page.driver.execute_async_script(SPLIT, text)
    assert (whole["thinking"], whole["answer"]) == CHANNELS[text]
    for part in growing:
        assert whole["answer"].startswith(part["answer"].strip()), part
        assert whole["thinking"].startswith(part["thinking"].strip()), part
