"""Whether a request comes from where it says, or from a page of another site in a browser on this machine.

A page of any site can have a browser ask a server on loopback: under a name of its own that it lets mean 127.0.0.1 (DNS
rebinding), which `Host` shows, or with a simple POST, which `Origin` shows.
"""

from __future__ import annotations

from collections.abc import Collection
from urllib.parse import urlsplit

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
UNKNOWN_NAME, OTHER_SITE = 421, 403


def foreign(host: str, origin: str | None, *, hosts: Collection[str] | None, origins: Collection[str] = ()) -> int:
    """The status of a request that is refused; 0 of one that may go on.

    Args:
        host, origin: of its headers; hosts: names by which the server may be asked, None for any.
        origins: other sites whose pages may ask.
    """
    if hosts is not None and _without_port(host) not in hosts:
        return UNKNOWN_NAME
    if origin is not None and origin not in origins and _place(origin) != host:
        return OTHER_SITE
    return 0


def _place(origin: str) -> str | None:
    """Its name and port; None of what is no address."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdecimal() else host
