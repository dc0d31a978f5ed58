"""The page in a real browser: what somebody in front of it does, and what hostile servers cannot."""

import json
import re
import threading

import pytest

from tests.serve.page.openai_server import Said

pytestmark = pytest.mark.slow
ENTER, SHIFT, ESCAPE = "\ue007", "\ue008", "\ue00c"
REPLY = "article.assistant .body"


def test_a_reply_grows_while_it_comes_and_says_how_fast(page, server):
    hold = threading.Event()
    server.answers.append(Said(["One ", "**two**", " three ", "four"], pause=0.05, hold=hold))
    page.ask("Count", wait=False)
    page.until(lambda: page.texts(REPLY) == ["One two three"])
    assert page.texts(f"{REPLY} strong") == ["two"]
    assert page.one("#stop").is_displayed()
    hold.set()
    page.done()
    assert page.texts(REPLY) == ["One two three four"]
    assert page.texts("article.user .body") == ["Count"]
    (figures,) = page.texts(".figures")
    assert re.fullmatch(r"demo-int8 · 8 tokens · [\d.]+ tokens/s · first token after [\d.]+ s", figures)
    (asked,) = server.asked
    assert asked == {
        "model": "demo-int8",
        "messages": [{"role": "user", "content": "Count"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_figures_are_those_of_the_clock(page, server):
    """Ten pieces a fifth of a second apart: twenty tokens as the server counts, the first two of them at 0.2 s."""
    server.answers.append(Said(["a "] * 10, pause=0.2))
    page.ask("x")
    (figures,) = page.texts(".figures")
    rate, first = map(float, re.search(r"([\d.]+) tokens/s · first token after ([\d.]+) s", figures).groups())
    assert rate == pytest.approx(19 / 1.8, rel=0.15)
    assert 0.2 <= first < 0.6
    server.answers.append(Said(["a "] * 3, usage=False))
    page.ask("y")
    assert " · 3 pieces · " in page.texts(".figures")[1]


@pytest.mark.parametrize("how", ["escape", "button"])
def test_stop_keeps_what_came_and_ends_the_request(page, server, how):
    server.answers.append(Said(["kept", " lost"], hold=threading.Event()))
    page.ask("x", wait=False)
    page.until(lambda: page.texts(REPLY) == ["kept"])
    if how == "escape":
        page.type("", ESCAPE)
    else:
        page.click("#stop")
    page.done()
    assert page.texts(REPLY) == ["kept"]
    assert page.texts(".note") == ["Stopped."]
    assert server.left.wait(10)  # the server hears of it, through what is between
    page.ask("go on")
    assert [one["content"] for one in server.asked[-1]["messages"]] == ["x", "kept", "go on"]


def test_regenerate_asks_again_with_what_was_before(page, server):
    server.answers += [Said(["first"]), Said(["second"]), Said(["other first"])]
    page.ask("a")
    page.ask("b")
    page.click("article.assistant [aria-label='Answer again']", which=0)
    page.until(lambda: page.texts(REPLY) == ["other first"])
    page.done()
    assert page.texts("article.user .body") == ["a"]
    assert server.asked[-1]["messages"] == [{"role": "user", "content": "a"}]


def test_an_edited_message_goes_on_from_there(page, server):
    server.answers += [Said(["one"]), Said(["two"]), Said(["three"])]
    page.ask("a")
    page.ask("b")
    page.click("article.user [aria-label='Edit']", which=0)
    page.type("", ESCAPE, selector=".editor textarea")
    assert page.texts(".editor") == []
    page.click("article.user [aria-label='Edit']", which=0)
    page.type("bc", ENTER, selector=".editor textarea")
    page.until(lambda: page.texts(REPLY) == ["three"])
    page.done()
    assert page.texts("article.user .body") == ["abc"]
    assert server.asked[-1]["messages"] == [{"role": "user", "content": "abc"}]


def test_an_edited_reply_is_what_the_model_is_told_it_said(page, server):
    page.ask("a")
    page.click("article.assistant [aria-label='Edit']")
    area = page.one(".editor textarea")
    area.clear()
    area.send_keys("I said *this*")
    page.click(".editor .main")
    assert page.texts(f"{REPLY} em") == ["this"]
    page.ask("b")
    assert [one["content"] for one in server.asked[-1]["messages"]] == ["a", "I said *this*", "b"]


def test_settings_are_sent_as_they_were_set_and_outlive_a_reload(page, server):
    page.click("#open-settings")
    page.type("Answer in verse.", selector="#system")
    values = {"temperature": "0.7", "top_p": "0.9", "top_k": "40", "min_p": "0.05", "max_tokens": "64", "seed": "7",
              "presence_penalty": "-1", "frequency_penalty": "0.5", "repetition_penalty": "1.1"}  # fmt: skip
    for name, value in values.items():
        page.type(value, selector=f"#{name}")
    page.choose("#thinking", "on")
    page.shot("settings")
    page.type("", ESCAPE, selector="#system")
    page.choose("#model", "other")
    page.ask("a")
    page.reload()
    page.ask("b")
    for asked in server.asked:
        assert asked["messages"][0] == {"role": "system", "content": "Answer in verse."}
        assert {name: asked[name] for name in values} == {name: float(value) for name, value in values.items()}
        assert asked["chat_template_kwargs"] == {"enable_thinking": True}
        assert asked["model"] == "other"


def test_a_setting_that_cannot_be_is_shown_and_not_sent(page, server):
    page.click("#open-settings")
    page.type("3", selector="#temperature")
    page.type("1.5", selector="#top_k")
    assert [one.get_attribute("aria-invalid") for one in page.all("#temperature, #top_k")] == ["true", "true"]
    assert "0 to 2" in page.texts(".wrong")
    page.type("", ESCAPE, selector="#top_k")
    page.ask("a")
    assert not {"temperature", "top_k"} & set(server.asked[-1])


@pytest.mark.parametrize(
    "said",
    [
        Said(["It is ", "4."], thoughts=["Two and ", "two."]),
        Said(["<|channel>thou", "ght\nTwo and two.<chan", "nel|>It is 4."]),
        Said(["<think>\nTwo and two.\n</think>\n\nIt is 4."]),
    ],
    ids=["reasoning_content", "gemma", "think"],
)
def test_thinking_is_folded_and_not_told_again(page, server, said):
    server.answers.append(said)
    page.ask("2 + 2?")
    assert page.texts(REPLY) == ["It is 4."]
    assert re.match(r"Thought for [\d.]+ s", page.texts(".thinking summary")[0])
    assert not page.one(".thought").is_displayed()
    page.click(".thinking summary")
    assert page.texts(".thought") == ["Two and two."]
    page.ask("And?")
    assert server.asked[-1]["messages"][1] == {"role": "assistant", "content": "It is 4."}


def test_thinking_stays_open_while_it_grows(page, server):
    hold = threading.Event()
    server.answers.append(Said(["done"], thoughts=["a ", "b "], pause=0.3, hold=hold))
    page.ask("x", wait=False)
    page.until(lambda: page.all(".thinking"))
    assert page.texts(".thinking summary") == ["Thinking …"]
    page.click(".thinking summary")
    page.until(lambda: page.texts(".thought") == ["a b"])
    hold.set()
    page.done()
    assert page.one(".thought").is_displayed()


def test_conversations_are_kept_renamed_deleted_and_brought_back(page, server):
    page.ask("First question")
    page.click("#new")
    page.ask("Second question")
    page.reload()
    assert page.texts("#list .open") == ["Second question", "First question"]
    page.click("#list .open", which=1)
    assert page.texts("article.user .body") == ["First question"]
    assert page.texts(REPLY) == ["Hello there."]
    page.click("#list .current [aria-label='Rename']")
    page.script("document.activeElement.select()")
    page.type("名字 <b>", ENTER, selector="#list input")
    assert page.texts("#list .open") == ["Second question", "名字 <b>"]
    page.click("#list .current [aria-label='Delete']")
    assert page.texts("#list .open") == ["Second question"]
    assert page.texts("article") == []
    page.click("#toast button")
    assert page.texts("#list .open") == ["Second question", "名字 <b>"]
    page.click("#list .current [aria-label='Delete']")
    page.reload()
    assert page.texts("#list .open") == ["Second question"]


def test_a_reload_amid_a_reply_keeps_what_came(page, server):
    server.answers.append(Said(["kept ", "kept", " lost"], hold=threading.Event()))
    page.ask("x", wait=False)
    page.until(lambda: page.texts(REPLY) == ["kept kept"])
    page.reload()
    page.click("#list .open")
    assert page.texts(REPLY) == ["kept kept"]
    assert page.texts(".note") == ["Stopped."]


def test_a_reply_goes_on_while_another_conversation_is_looked_at(page, server):
    hold = threading.Event()
    server.answers += [Said(["slow ", "end"], hold=hold), Said(["quick"])]
    page.ask("a", wait=False)
    page.until(lambda: page.texts(REPLY) == ["slow"])
    page.click("#new")
    assert not page.one("#stop").is_displayed()
    page.ask("b")
    assert page.texts(REPLY) == ["quick"]
    hold.set()
    page.until(lambda: not page.all("#list .busy"))
    page.click("#list .open", which=[*page.texts("#list .open")].index("a"))
    assert page.texts(REPLY) == ["slow end"]


def test_what_is_kept_has_a_bound_that_is_told(page, server):
    """Another conversation has nearly all of the room."""
    big = {"id": "big", "title": "big", "system": "", "changed": 1, "messages": [{"role": "user", "content": ""}]}
    page.script(
        "const big = arguments[0]; big.messages[0].content = 'x'.repeat(3999000);"
        "localStorage.setItem('gemma-deploy.chat.big', JSON.stringify(big));",
        big,
    )
    page.reload()
    assert page.texts("#room") == ["100 % of the room for conversations is used."]
    server.answers.append(Said(["y" * 2000]))
    page.ask("a question")
    assert "room for conversations is full" in page.texts("#toast")[0]
    assert page.texts(REPLY) == ["y" * 2000]  # it goes on in this tab
    assert page.script("return Object.keys(localStorage).filter(k => k.includes('.chat.')).length") <= 2
    page.click("#list li .open", which=[*page.texts("#list .open")].index("big"))
    page.click("#list .current [aria-label='Delete']")
    page.click("#list .open", which=0)
    page.ask("again")
    page.reload()
    assert page.texts("#list .open") == ["a question"]


@pytest.mark.parametrize("kept", ["{", "null", "[]", '{"id": "x"}', '{"id":"x","title":1,"system":"","messages":[]}'])
def test_what_is_no_conversation_breaks_nothing(page, kept):
    page.script("localStorage.setItem('gemma-deploy.chat.x', arguments[0])", kept)
    page.script("localStorage.setItem('gemma-deploy.settings', arguments[0])", kept)
    page.reload()
    page.ask("a")
    assert page.texts("#list .open") == ["a"]


def test_the_key_is_sent_and_kept_in_this_tab_alone(page, server):
    server.key = "secret-7"
    page.reload()
    page.until(lambda: "asks for an API key" in page.texts("#toast")[0])
    page.ask("a")
    assert page.texts(".problem span") == [
        "The server asks for an API key that it knows: give it in the settings. It says: no such key"
    ]
    page.click("#open-settings")
    page.type("secret-7", selector="#key")
    page.type("", ESCAPE, selector="#key")
    page.click(".problem button")
    page.until(lambda: page.texts(REPLY) == ["Hello there."])
    page.done()
    assert "secret-7" not in page.script("return JSON.stringify(localStorage)")
    page.reload()
    assert "secret-7" in page.script("return JSON.stringify(sessionStorage)")
    page.ask("b")
    assert server.headers[-1]["authorization"] == "Bearer secret-7"


ERRORS = {
    (400, "max_tokens is too large"): "The server refused the request. It says: max_tokens is too large",
    (404, "no model x"): "The server does not know this model or address. It says: no model x",
    (413, ""): "The conversation is too long for the server.",
    (429, ""): "The server is busy. Try again in 3 s.",
    (500, ""): "The server failed (HTTP 500).",
}


@pytest.mark.parametrize(("status", "words"), ERRORS)
def test_errors_of_the_server_are_sentences(page, server, status, words):
    body = json.dumps({"error": {"message": words}}).encode()
    server.answers.append(Said(status=status, body=body, headers={"Retry-After": "3"}))
    page.ask("a")
    assert page.texts(".problem span") == [ERRORS[status, words]]
    page.click(".problem button")
    page.until(lambda: page.texts(REPLY) == ["Hello there."])
    assert page.texts(".problem") == []
    assert server.asked[-1]["messages"] == [{"role": "user", "content": "a"}]


def test_a_stream_that_breaks_and_one_that_is_no_json_are_told(page, server):
    server.answers.append(Said(["half"], broken=True))
    page.ask("a")
    assert page.texts(REPLY) == ["half"]
    assert page.texts(".problem span") == ["The connection broke off. What came until then is kept."]
    server.answers.append(Said(body=b"data: {nonsense\n\n", headers={"Content-Type": "text/event-stream"}))
    page.ask("b")
    assert page.texts(".problem span")[1] == "The server's answer could not be understood."
    server.answers.append(Said(["cut"], finish="length"))
    page.ask("c")
    assert page.texts(".note") == ["The limit of tokens was reached: the answer is not complete."]
    said = [(one["role"], one["content"]) for one in server.asked[-1]["messages"]]
    assert said == [("user", "a"), ("assistant", "half"), ("user", "b\n\nc")]  # roles take turns


def test_a_server_that_is_gone_is_told(page, server):
    server.stop()
    page.ask("a")
    (said,) = page.texts(".problem span")
    assert said.startswith("The server failed (HTTP 502). It says: there is no connection to http://127.0.0.1:")


def test_shift_enter_begins_a_line_and_composing_sends_nothing(page, server):
    page.type("one", SHIFT, ENTER, SHIFT)
    page.type("two")
    page.script(
        "document.getElementById('input').dispatchEvent("
        "new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true}))"
    )
    assert server.asked == []
    page.type("", ENTER)
    page.done()
    assert server.asked[0]["messages"] == [{"role": "user", "content": "one\ntwo"}]


def test_what_is_copied_is_what_was_written(page, server):
    page.driver.execute_cdp_cmd(
        "Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    )
    server.answers.append(Said(["Take **this**:\n\n```python\nprint('<b>')\n```\n"]))
    page.ask("a")

    def clipboard():
        return page.driver.execute_async_script("navigator.clipboard.readText().then(arguments[0])")

    page.click("[aria-label='Copy this code']")
    page.until(lambda: page.all(".code-head .done"))
    assert clipboard() == "print('<b>')"
    page.click("article.assistant .buttons [aria-label='Copy']")
    page.until(lambda: page.all(".buttons .done"))
    assert clipboard() == "Take **this**:\n\n```python\nprint('<b>')\n```\n"


def test_both_languages_and_the_browsers_is_the_first(page, server):
    page.speaks("zh-TW,en;q=0.5")
    page.reload()
    assert page.texts("#new") == ["新对话"]
    assert page.script("return document.documentElement.lang") == "zh-CN"
    server.answers.append(Said(status=401, body=b"{}"))
    page.ask("你好")
    assert page.texts(".problem span") == ["服务器需要有效的 API 密钥\uff1a请在设置中填写。"]
    page.click("#open-settings")
    assert page.texts("#settings h2") == ["设置"]
    page.shot("settings-zh")
    page.choose("#choose-language", "en")
    assert page.texts("#settings h2") == ["Settings"]
    page.reload()
    assert page.texts("#new") == ["New conversation"]
    page.speaks("de,zh;q=0.5")
    page.script("localStorage.clear()")
    page.reload()
    assert page.texts("#new") == ["New conversation"]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_follow_the_system_until_they_are_chosen(page, theme):
    features = [{"name": "prefers-color-scheme", "value": theme}]
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def is_dark():
        text = page.script("return getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", text)[:3])) < 3 * 128

    assert is_dark() == (theme == "dark")
    page.click("#theme")
    assert is_dark() == (theme == "light")
    page.reload()
    assert is_dark() == (theme == "light")
    chosen = page.script("return document.documentElement.dataset.theme")
    assert chosen == ("light" if theme == "dark" else "dark")


def test_a_phone_shows_all_of_it(page, server):
    page.size(360, 720, touch=True)
    wide = "| a | b | c | d |\n|---|---|---|---|\n" + "| " + " | ".join(["wordwordword"] * 4) + " |\n"
    server.answers.append(Said([f"# Title\n\n{'x' * 500}\n\n{wide}\n```\n{'code ' * 60}\n```\n\n`{'y' * 300}`"]))
    page.ask("z" * 300)
    assert page.script("return document.documentElement.scrollWidth") == 360
    assert page.script("return document.getElementById('scroll').scrollWidth <= 360")
    boxes = page.script(
        "return [...document.querySelectorAll('header > *, #composer .box, #composer button, article')]"
        ".filter(e => e.offsetParent).map(e => e.getBoundingClientRect()).map(b => [b.left, b.right])"
    )
    assert all(left >= 0 and right <= 360 for left, right in boxes), boxes
    assert page.script("const p = document.querySelector('.code pre'); p.scrollLeft = 40; return p.scrollLeft") == 40
    assert page.script("const t = document.querySelector('.table'); t.scrollLeft = 40; return t.scrollLeft") == 40
    assert not page.one("#new").is_displayed()
    page.click("#open-side")
    page.until(lambda: page.one("#new").is_displayed())
    page.click("#new")
    page.until(lambda: not page.one("#new").is_displayed())
    assert page.texts("article") == []


def test_the_page_follows_a_reply_unless_one_reads_above(page, server):
    hold = threading.Event()
    server.answers.append(Said([f"line {i}\n\n" for i in range(200)], pause=0.01, hold=hold))
    page.ask("x", wait=False)
    page.until(lambda: "line 60" in page.texts(REPLY)[0])
    below = "const s = document.getElementById('scroll'); return s.scrollHeight - s.scrollTop - s.clientHeight"
    page.until(lambda: page.script(below) < 5)
    page.script("document.getElementById('scroll').scrollTop = 0")
    page.until(lambda: "line 198" in page.texts(REPLY)[0])
    assert page.script(below) > 2000
    hold.set()
    page.done()
    assert page.script(below) > 2000
