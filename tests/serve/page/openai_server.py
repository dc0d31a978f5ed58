"""A small server of OpenAI's protocol that says what a test tells it to, and keeps what it was asked."""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Said:
    """One answer.

    Args:
        pieces: of the text; thoughts: of `reasoning_content`, in front of it.
        pause: seconds before each piece; hold: waited for before the last piece.
        status, body, headers: of an answer that is none of the model's.
        finish: finish_reason; usage: whether tokens are counted; broken: the stream ends without an end.
    """

    pieces: Sequence[str] = ("Hello", " there", ".")
    thoughts: Sequence[str] = ()
    pause: float = 0.0
    hold: threading.Event | None = None
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    finish: str = "stop"
    usage: bool = True
    broken: bool = False


class OpenAIServer(ThreadingHTTPServer):
    """Answers `answers` one after the other, `Said()` when there are none left."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.models = ["demo-int8", "other"]
        self.key = ""
        self.answers: deque[Said] = deque()
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.left = threading.Event()
        self.stopped = False

    @property
    def url(self) -> str:
        """Up to /v1."""
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def __enter__(self) -> OpenAIServer:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Nobody listens any more; again is nothing."""
        if not self.stopped:
            self.stopped = True
            self.shutdown()
            self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: OpenAIServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        """The models."""
        self._keep()
        if self._refused():
            return
        self._whole(200, json.dumps({"object": "list", "data": [{"id": name} for name in self.server.models]}).encode())

    def do_POST(self) -> None:
        """What comes next."""
        self._keep()
        body = self.rfile.read(int(self.headers["content-length"]))
        if self._refused():
            return
        self.server.asked.append(json.loads(body))
        said = self.server.answers.popleft() if self.server.answers else Said()
        if said.status != 200 or said.body:
            self._whole(said.status, said.body, said.headers)
            return
        try:
            self._stream(said)
        except (BrokenPipeError, ConnectionResetError):
            self.server.left.set()
            self.close_connection = True

    def _keep(self) -> None:
        self.server.paths.append(self.path)
        self.server.headers.append({name.lower(): value for name, value in self.headers.items()})

    def _refused(self) -> bool:
        if not self.server.key or self.headers.get("authorization") == f"Bearer {self.server.key}":
            return False
        self._whole(401, b'{"error": {"message": "no such key", "type": "invalid_request_error"}}')
        return True

    def _whole(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")  # or a thread of a server that has stopped goes on answering
        self.end_headers()
        self.wfile.write(body)

    def _stream(self, said: Said) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        deltas = [{"reasoning_content": piece} for piece in said.thoughts] + [{"content": one} for one in said.pieces]
        for number, delta in enumerate(deltas):
            time.sleep(said.pause)
            if said.hold is not None and number == len(deltas) - 1:
                self._wait(said.hold)
            self._event({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
        if said.broken:
            return
        self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": said.finish}]})
        if said.usage:
            self._event({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2 * len(deltas)}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _wait(self, hold: threading.Event) -> None:
        """Comments meanwhile, by which it is noticed that the reader left."""
        while not hold.wait(0.05):
            self.wfile.write(b": waiting\n\n")

    def _event(self, told: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(told)}\n\n".encode())
