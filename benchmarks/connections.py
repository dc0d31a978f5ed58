"""A server under far more connections than it takes: what they are told, what they cost, and who is harmed.

    gemma-deploy serve ARTIFACT --connections 1000 --port 9000 &
    python benchmarks/connections.py --server http://127.0.0.1:9000 --pid $! --connections 10000

A client begins a long stream. Then so many connections are opened as fast as it goes, and all of them stay open as long
as they are let. Each of those that are refused has to read a whole answer of 503. Meanwhile the first client's stream
goes on, and one of the connections that were taken is answered. When all have left, new ones are answered as before.
Memory and open files are what /proc says of the server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import time
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

STREAM = {"prompt": "a", "max_tokens": 700, "ignore_eos": True, "stream": True, "n": 16}
SHORT = {"prompt": "a", "max_tokens": 2}
KEPT = "kept"


def request(body: dict[str, object]) -> bytes:
    """Of `/v1/completions`, for an address that is not looked at."""
    text = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Length: "
    return f"{head}{len(text)}\r\n\r\n".encode() + text


async def answer(host: str, port: int) -> str:
    """The first line of a server's answer to a short request."""
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(request(SHORT))
    found = await reader.read()
    writer.close()
    return found.split(b"\r\n")[0].decode()


async def one(host: str, port: int, release: asyncio.Event) -> str:
    """What becomes of a connection that asks for nothing."""
    try:
        reader, writer = await asyncio.open_connection(host, port)
    except OSError as error:
        return f"not connected: {error.strerror}"
    try:
        reading = asyncio.ensure_future(reader.read())
        waiting = asyncio.ensure_future(release.wait())
        await asyncio.wait((reading, waiting), return_when=asyncio.FIRST_COMPLETED)
        if not reading.done():
            reading.cancel()
            return KEPT
        waiting.cancel()
        found = reading.result()
        head, _, body = found.partition(b"\r\n\r\n")
        whole = head.startswith(b"HTTP/1.1 503") and json.loads(body)["error"]["code"] == "too_many_connections"
        return "refused politely" if whole else f"cut off behind {len(found)} bytes"
    except OSError as error:
        return f"broken: {error.strerror}"
    finally:
        writer.close()


def memory(pid: int) -> float:
    """MiB of a process that are in memory."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


async def measure(arguments: argparse.Namespace) -> int:
    """All of it: 1 where somebody was harmed."""
    address = urlsplit(arguments.server)
    host, port, pid = str(address.hostname), int(address.port or 80), arguments.pid
    print(f"before: {await answer(host, port)}, {memory(pid):.1f} MiB")
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(request(STREAM))
    pieces = 0

    async def stream() -> None:
        nonlocal pieces
        while await reader.readline():
            pieces += 1

    streaming = asyncio.create_task(stream())
    while not pieces:
        await asyncio.sleep(0.01)
    release, started = asyncio.Event(), time.monotonic()
    before = pieces
    many = [asyncio.create_task(one(host, port, release)) for _ in range(arguments.connections)]
    most, files = 0.0, 0
    while not all(task.done() for task in many) and time.monotonic() < started + arguments.seconds:
        most = max(most, memory(pid))
        files = max(files, len(list(Path(f"/proc/{pid}/fd").iterdir())))
        await asyncio.sleep(0.05)
        if len(many) - sum(task.done() for task in many) <= arguments.limit:
            break  # the others were taken
    seconds, during = time.monotonic() - started, pieces - before
    release.set()
    outcomes = Counter(await asyncio.gather(*many))
    print(
        f"{seconds:.1f} s: {dict(outcomes)}; at most {most:.1f} MiB and {files} files; the stream went on by {during} "
        "lines"
    )
    await asyncio.sleep(1)
    last = await answer(host, port)
    print(f"after: {last}, {memory(pid):.1f} MiB")
    streaming.cancel()
    writer.close()
    return int(not last.startswith("HTTP/1.1 200") or not during or not set(outcomes) <= {KEPT, "refused politely"})


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="http://127.0.0.1:9000")
    parser.add_argument("--pid", type=int, required=True, help="of the server")
    parser.add_argument("--connections", type=int, default=10_000)
    parser.add_argument("--limit", type=int, default=1000, help="--connections of the server")
    parser.add_argument("--seconds", type=float, default=60, help="to wait for all to be told")
    arguments = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return asyncio.run(measure(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
