"""A Ray cluster (https://docs.ray.io): is this an address, is ray installed, does anybody answer? And joining one.

Imports ray where a cluster is joined, and not before.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from gemma_deploy.errors import DeployError, UsageError
from gemma_deploy.provenance import code_of, version_of

CONNECT_SECONDS = 5.0
INSTALL = 'pip install "gemma-deploy[ray]"'


@dataclass(frozen=True)
class Setting:
    """What names a cluster.

    Args:
        name: of the key or option; without: what happens where it is left out.
        error: what is raised where nobody answers.
        forms: of addresses that it takes.
    """

    name: str
    without: str
    error: type[DeployError] = DeployError
    forms: str = "auto, HOST:PORT or ray://HOST:PORT"

    def require(self, address: str) -> None:
        """Refuse a cluster that cannot be used, before any work.

        Raises:
            UsageError: ray is not installed, or this is no address; `error`: nobody answers there.
        """
        where = f"{self.name}: {address}"
        if importlib.util.find_spec("ray") is None:
            raise UsageError("ray is not installed here", where=where, next_step=INSTALL)
        client = address.startswith("ray://")
        if client and "ray://" in self.forms and importlib.util.find_spec("grpc") is None:
            raise UsageError("ray's client is not installed here (grpc is missing)", where=where, next_step=INSTALL)
        if (client and "ray://" not in self.forms) or (address != "auto" and _host_and_port(address) is None):
            raise UsageError(
                "this is no address of a Ray cluster",
                where=where,
                expected=self.forms,
                next_step=f"correct it, or leave it out: {self.without}",
            )
        self._probe(address)

    def _probe(self, address: str) -> None:
        """Ask for a connection ourselves: ray waits long for a host that is not there."""
        target = os.environ.get("RAY_ADDRESS", "auto") if address == "auto" else address
        place = _host_and_port(target)
        if place is None:
            return
        try:
            socket.create_connection(place, CONNECT_SECONDS).close()
        except OSError as error:
            raise self.unreachable(address, error.strerror or str(error)) from error

    def unreachable(self, address: str, why: str) -> DeployError:
        """What to say when no cluster answers."""
        return self.error(
            f"no Ray cluster answers: {why}",
            where=f"{self.name}: {address}",
            expected="a running cluster (ray start --head --port=6379 on one machine, "
            "ray start --address=HEAD:6379 on the others)",
            next_step=f"start it or correct the address; {self.without}",
        )

    def join(self, address: str) -> Any:
        """Connect this process to a cluster: the module ray. `ray.shutdown()` ends it.

        Nothing of the directory where this program was started goes to the nodes: their workers are given an empty one,
        without which they look for modules in that directory first of all.

        Raises:
            UsageError, `error`: as `require`; or the cluster refuses.
        """
        self.require(address)
        import ray

        before = signal.getsignal(signal.SIGTERM)
        try:
            with tempfile.TemporaryDirectory() as empty:
                ray.init(
                    address=address,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    runtime_env={"working_dir": empty},
                )
        except (ConnectionError, RuntimeError, ValueError, TimeoutError, ImportError, ray.exceptions.RayError) as error:
            raise self.unreachable(address, str(error).splitlines()[0]) from error
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, before)  # ray has put its own there, which prints where it was
        return ray


def versions(modules: Collection[str], libraries: Collection[str] | None = None) -> dict[str, str]:
    """What must be the same on every node: the code of this package that does some work, its libraries, and Python.

    Args:
        modules: that do the work; what they import counts as well.
        libraries: those that count, None: all that are imported.
    """
    code = code_of(tuple(modules))
    known = code.versions if libraries is None else {name: version_of(name) for name in libraries}
    python = ".".join(map(str, sys.version_info[:2]))
    return {"gemma-deploy": code.sha256[:12], "Python": python, **known}


def _host_and_port(address: str) -> tuple[str, int] | None:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    return (host, int(port)) if host and port.isdigit() and int(port) < 1 << 16 else None
