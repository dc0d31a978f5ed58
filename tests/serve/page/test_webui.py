"""`gemma-deploy webui` without a browser: headers of the page, and what passes to the other server and back."""

import asyncio
import contextlib
import json
import socket

import pytest

from gemma_deploy.cli import main
from gemma_deploy.errors import UsageError
from gemma_deploy.serve import passing, visitors
from gemma_deploy.serve.passing import base_of

httpx2 = pytest.importorskip("httpx2")
pytest.importorskip("starlette")
from starlette.testclient import TestClient  # noqa: E402

from gemma_deploy.serve.webui import FOLDER, KINDS, SAFE_HEADERS, webui_app  # noqa: E402

BASE = "http://127.0.0.1:9000/v1"
JSON = {"content-type": "application/json"}
CHAT = "/v1/chat/completions"


class Bytes(httpx2.AsyncByteStream):
    """A body as a network gives it."""

    def __init__(self, content):
        self.content = content

    async def __aiter__(self):
        yield self.content


def whole(status, content, **headers):
    """An answer that is no stream of events."""
    given = {"content-type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    return httpx2.Response(status, stream=Bytes(content), headers=given)


class Server:
    """Another server, in this process."""

    def __init__(self, answer=None):
        self.answer, self.asked = answer, []

    async def __call__(self, request):
        self.asked.append(request)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer or whole(200, b'{"data": [{"id": "m"}]}')


def browser(server, **options):
    """A client of webui in front of it, under the name that the command gives."""
    app = webui_app(BASE, transport=httpx2.MockTransport(server), **options)
    return TestClient(app, base_url="http://127.0.0.1:9600", follow_redirects=False)


def error_of(answer):
    return answer.json()["error"]["message"]


# --- the page --------------------------------------------------------------------------------------------------------


def test_every_file_comes_with_safe_headers_and_is_asked_for_again():
    client = browser(Server())
    for file in FOLDER.iterdir():
        path = "/" if file.name == "index.html" else f"/{file.name}"
        answer = client.get(path)
        assert answer.content == file.read_bytes()
        assert answer.headers["content-type"].partition(";")[0] == KINDS[file.suffix]
        assert SAFE_HEADERS.items() <= dict(answer.headers).items()
        assert answer.headers["cache-control"] == "no-cache"
        again = client.get(path, headers={"if-none-match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert client.head(path).content == b""
    policy = dict(one.split(" ", 1) for one in SAFE_HEADERS["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"


@pytest.mark.parametrize("path", ["/page", "/page/", "/..%2fwebui.py", "/%2e%2e/setup.cfg", "/x.js", "/docs"])
def test_nothing_else_is_served_and_nothing_listed(path):
    answer = browser(Server()).get(path)
    assert answer.status_code == 404
    assert "main.js" not in answer.text


def test_the_page_takes_no_other_method():
    assert browser(Server()).post("/").status_code == 405


# --- what passes -----------------------------------------------------------------------------------------------------


def test_key_and_body_pass_and_nothing_else_does():
    server = Server(whole(200, b'{"x": 1}', set_cookie="a=b", x_other="y"))
    sent = {
        **JSON,
        "authorization": "Bearer k",
        "cookie": "c=d",
        "x-forwarded-for": "1.2.3.4",
        "origin": "http://127.0.0.1:9600",
    }
    answer = browser(server).post(f"{CHAT}?a=b", content=b'{"model": "m"}', headers=sent)
    (asked,) = server.asked
    assert (str(asked.url), asked.method, asked.content) == (f"{BASE}/chat/completions", "POST", b'{"model": "m"}')
    assert asked.headers["authorization"] == "Bearer k"
    assert asked.headers["accept-encoding"] == "identity"
    assert not {"cookie", "x-forwarded-for", "origin", "user-agent-of-browser"} & set(asked.headers)
    assert answer.json() == {"x": 1}
    assert not {"set-cookie", "x-other"} & set(answer.headers)
    assert SAFE_HEADERS.items() <= dict(answer.headers).items()


def test_errors_pass_with_the_time_to_wait():
    server = Server(whole(429, b'{"error": {"message": "later"}}', retry_after="7"))
    answer = browser(server).post(CHAT, json={})
    assert (answer.status_code, answer.headers["retry-after"], error_of(answer)) == (429, "7", "later")


def test_a_page_of_another_server_is_no_page_here():
    server = Server(whole(502, b"<script>alert(1)</script>", content_type="text/html"))
    answer = browser(server).get("/v1/models")
    assert answer.headers["content-type"] == "text/plain"
    assert answer.headers["x-content-type-options"] == "nosniff"


WRONG = {
    "redirect": (whole(302, b"", location="http://169.254.169.254/"), 502, "not followed"),
    "compressed": (whole(200, b"x", content_encoding="gzip"), 502, "compresses"),
    "nobody": (httpx2.ConnectError("refused"), 502, "no connection to http://127.0.0.1:9000/v1: refused"),
    "silent": (httpx2.ReadTimeout(""), 504, "says nothing any more"),
    "broken": (httpx2.RemoteProtocolError("bad"), 502, "broke: bad"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_goes_wrong_behind_is_a_sentence(name):
    answer, status, words = WRONG[name]
    server = Server(answer)
    said = browser(server).get("/v1/models")
    assert said.status_code == status
    assert words in error_of(said)
    assert len(server.asked) == 1


REFUSED = {
    "other path": ("GET", "/v1/embeddings", {}, 404),
    "path that climbs": ("GET", "/v1/models/../../admin", {}, 404),
    "other method": ("DELETE", "/v1/models", {}, 404),
    "get for post": ("GET", CHAT, JSON, 404),
    "form of another site": ("POST", CHAT, {"content-type": "text/plain"}, 415),
    "script of another site": ("POST", CHAT, {**JSON, "origin": "http://evil.example"}, 403),
    "sandboxed frame": ("POST", CHAT, {**JSON, "origin": "null"}, 403),
    "another port": ("POST", CHAT, {**JSON, "origin": "http://127.0.0.1:9601"}, 403),
    "picture of another site": ("GET", "/v1/models", {"sec-fetch-site": "cross-site"}, 403),
    "name that leads here": ("GET", "/v1/models", {"host": "evil.example:9600"}, 421),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_the_pages_is_refused_before_the_server_hears_of_it(name):
    method, path, headers, status = REFUSED[name]
    server = Server()
    answer = browser(server, hosts=frozenset({"127.0.0.1"})).request(method, path, headers=headers)
    assert answer.status_code == status
    assert server.asked == []


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:9600", "localhost:9600", "[::1]:9600", "[::1]"])
def test_loopback_names_are_known(host):
    client = browser(Server(), hosts=frozenset(visitors.LOOPBACK))
    assert client.get("/v1/models", headers={"host": host}).status_code == 200


# --- bounds ----------------------------------------------------------------------------------------------------------


def scope(method="POST", path=CHAT, headers=()):
    lines = [(b"host", b"127.0.0.1:9600"), (b"content-type", b"application/json"), *headers]
    return {"type": "http", "method": method, "path": path, "headers": lines}


def passed(server, messages, *, send=None, headers=(), transport=None):
    """What a browser gets that sends these messages and then waits (None: and leaves)."""
    sent, taken = [], []

    async def receive():
        if not messages:
            await asyncio.Event().wait()
        taken.append(1)
        return messages.pop(0)

    async def keep(message):
        sent.append(message)

    async def run():
        async with passing.new_client(transport or httpx2.MockTransport(server)) as client:
            app = passing.PassThrough(BASE, client, headers={}, hosts=None)
            await app(scope(headers=headers), receive, send or keep)

    asyncio.run(asyncio.wait_for(run(), 20))
    return sent, len(taken)


def body(content, more=False):
    return {"type": "http.request", "body": content, "more_body": more}


def test_a_body_that_says_it_is_too_large_is_not_read():
    server = Server()
    sent, taken = passed(server, [body(b"x")], headers=[(b"content-length", b"99999999999999999999999")])
    assert (sent[0]["status"], taken, server.asked) == (413, 0, [])


def test_a_body_that_becomes_too_large_is_read_no_further(monkeypatch):
    monkeypatch.setattr(passing, "BODY_BYTES", 1000)
    server = Server()
    sent, taken = passed(server, [body(b"x" * 400, more=True) for _ in range(100)])
    assert (sent[0]["status"], taken, server.asked) == (413, 3, [])


def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(passing, "BODY_SECONDS", 0.05)
    sent, _ = passed(Server(), [body(b"{", more=True)])
    assert sent[0]["status"] == 408


def test_too_many_requests_at_a_time_are_refused(monkeypatch):
    monkeypatch.setattr(passing, "MOST_REQUESTS", 0)
    sent, _ = passed(Server(), [body(b"{}")])
    assert sent[0]["status"] == 503


class Events(httpx2.AsyncByteStream):
    """A stream without an end; says when it was closed, and how much was read."""

    def __init__(self, piece=b"data: {}\n\n", pause=0.0):
        self.piece, self.pause, self.read, self.closed = piece, pause, 0, False

    async def __aiter__(self):
        while True:
            await asyncio.sleep(self.pause)
            self.read += 1
            yield self.piece

    async def aclose(self):
        self.closed = True


def streaming(events):
    return Server(httpx2.Response(200, stream=events, headers={"content-type": "text/event-stream; charset=utf-8"}))


def test_events_pass_one_by_one_and_end_when_the_browser_leaves():
    events = Events(pause=0.005)
    messages, got = [body(b"{}")], []

    async def send(message):
        got.append(message)
        if len(got) == 4:
            messages.append({"type": "http.disconnect"})

    async def run():
        async with passing.new_client(httpx2.MockTransport(streaming(events))) as client:

            async def receive():
                while not messages:
                    await asyncio.sleep(0.001)
                return messages.pop(0)

            await passing.PassThrough(BASE, client, headers={}, hosts=None)(scope(), receive, send)

    asyncio.run(asyncio.wait_for(run(), 20))
    assert got[0]["status"] == 200
    assert (b"content-type", b"text/event-stream") in got[0]["headers"]
    assert [one["body"] for one in got[1:4]] == [events.piece] * 3
    assert events.closed
    assert events.read < 10


def test_a_browser_that_leaves_before_the_answer_begins_ends_the_request():
    """As while a long prompt is read."""
    begun, ended = [], []

    async def run():
        waiting = asyncio.Event()

        async def slow(request):
            begun.append(request)
            waiting.set()
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                ended.append(request)
                raise

        messages = [body(b"{}")]

        async def receive():
            if messages:
                return messages.pop(0)
            await waiting.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            raise AssertionError(message)

        async with passing.new_client(httpx2.MockTransport(slow)) as client:
            await passing.PassThrough(BASE, client, headers={}, hosts=None)(scope(), receive, send)

    asyncio.run(asyncio.wait_for(run(), 20))
    assert len(begun) == len(ended) == 1


def test_a_browser_that_reads_no_more_holds_nothing(monkeypatch):
    monkeypatch.setattr(passing, "SENT_SECONDS", 0.05)
    events = Events()

    async def stuck(message):
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    passed(streaming(events), [body(b"{}")], send=stuck)
    assert events.closed
    assert events.read == 1  # what is not taken is not read


def test_an_answer_without_end_is_ended_with_a_sentence(monkeypatch):
    monkeypatch.setattr(passing, "ANSWER_BYTES", 1000)
    events = Events()
    sent, _ = passed(streaming(events), [body(b"{}")])
    got = b"".join(one["body"] for one in sent[1:])
    assert len(got) < 1300
    last = json.loads(got.strip().rpartition(b"data: ")[2])
    assert "sent more than" in last["error"]["message"]
    assert not sent[-1]["more_body"]
    assert events.closed
    plain = Server(whole(200, b"x" * 2000))
    sent, _ = passed(plain, [body(b"{}")])
    assert sent[0]["status"] == 502


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "base"),
    [
        ("http://127.0.0.1:9000", "http://127.0.0.1:9000/v1"),
        ("http://127.0.0.1:9000/v1/", "http://127.0.0.1:9000/v1"),
        ("https://e.org/llm", "https://e.org/llm/v1"),
        ("http://[::1]:9000/v1", "http://[::1]:9000/v1"),
    ],
)
def test_an_address_is_taken_with_and_without_v1(given, base):
    assert base_of(given) == base


@pytest.mark.parametrize(
    "given",
    ["127.0.0.1:9000", "ftp://e.org", "file:///etc", "http://", "http://e.org:x", "http://u:p@e.org", "http://e.org/?a",
     "http://e.org/#a", "http://e.org/a b\n", "http://[::1", "javascript:x"],
)  # fmt: skip
def test_what_is_no_address_is_refused(given, capsys):
    with pytest.raises(UsageError, match="is no address of a server"):
        base_of(given)
    assert main(["webui", "--api-base-url", given, "--port", "0"]) == 2
    assert "next: name it as in" in capsys.readouterr().err


def test_a_port_that_is_taken_is_told(capsys):
    pytest.importorskip("uvicorn")
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = str(taken.getsockname()[1])
        assert main(["webui", "--api-base-url", BASE, "--port", port]) == 2
    assert f"127.0.0.1:{port}: port {port} is taken" in capsys.readouterr().err


def test_a_host_that_others_reach_is_warned_of(monkeypatch, capsys):
    uvicorn = pytest.importorskip("uvicorn")
    monkeypatch.setattr(uvicorn.Server, "run", lambda server, sockets: None)
    for host, warned in (("127.0.0.1", False), ("0.0.0.0", True)):
        assert main(["webui", "--api-base-url", BASE, "--host", host, "--port", "0"]) == 0
        said = capsys.readouterr()
        assert said.out.startswith(f"open http://{host}:")
        assert ("can ask http://127.0.0.1:9000/v1 as this machine can" in said.err) == warned
