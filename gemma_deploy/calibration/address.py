"""The address of a Ray cluster: is it one, is ray installed, does anybody answer? Imports neither ray nor torch."""

from __future__ import annotations

import importlib.util
import os
import socket

from gemma_deploy.errors import CalibrationError, UsageError

CONNECT_SECONDS = 5.0
INSTALL = 'pip install "gemma-deploy[ray]"'


def require_cluster(address: str) -> None:
    """Refuse a cluster that cannot be used, before any work.

    Raises:
        UsageError: ray is not installed, or this is no address; CalibrationError: nobody answers there.
    """
    where = f"workspace.cluster: {address}"
    if importlib.util.find_spec("ray") is None:
        raise UsageError("ray is not installed here", where=where, next_step=INSTALL)
    if address.startswith("ray://") and importlib.util.find_spec("grpc") is None:
        raise UsageError("ray's client is not installed here (grpc is missing)", where=where, next_step=INSTALL)
    if address != "auto" and _host_and_port(address) is None:
        raise UsageError(
            "this is no address of a Ray cluster",
            where=where,
            expected="auto, HOST:PORT or ray://HOST:PORT",
            next_step="correct it, or remove workspace.cluster to calibrate on this machine",
        )
    probe(address)


def probe(address: str) -> None:
    """Ask for a connection ourselves: ray waits long for a host that is not there.

    Raises:
        CalibrationError: there is none.
    """
    target = os.environ.get("RAY_ADDRESS", "auto") if address == "auto" else address
    place = _host_and_port(target)
    if place is None:
        return
    try:
        socket.create_connection(place, CONNECT_SECONDS).close()
    except OSError as error:
        raise unreachable(address, error.strerror or str(error)) from error


def unreachable(address: str, why: str) -> CalibrationError:
    """What to say when no cluster answers."""
    return CalibrationError(
        f"no Ray cluster answers: {why}",
        where=f"workspace.cluster: {address}",
        expected="a running cluster (ray start --head --port=6379 on one machine, "
        "ray start --address=HEAD:6379 on the others)",
        next_step="start it or correct the address; without workspace.cluster this machine does the work",
    )


def _host_and_port(address: str) -> tuple[str, int] | None:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    return (host, int(port)) if host and port.isdigit() and int(port) < 1 << 16 else None
