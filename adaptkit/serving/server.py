"""Running an app on a socket until it is asked to stop; what has begun is answered first."""

from __future__ import annotations

import ipaddress
import logging
import signal
import socket
from collections.abc import Callable
from typing import Any

import uvicorn

from adaptkit.errors import ConfigError
from adaptkit.serving.limits import Limits


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that doesn't listen yet.

    Args:
        host: A name or address of this machine.
        port: 0 for any free one.

    Raises:
        ConfigError: The address isn't this machine's, or is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"{host!r} isn't an address of this machine: {error.strerror or error}.") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise ConfigError(
            f"Port {port} of {host} can't be used ({error.strerror}): choose another --port or --host."
        ) from error
    return bound


def is_local(bound: socket.socket) -> bool:
    """Whether a bound socket can be reached from this machine alone."""
    return ipaddress.ip_address(bound.getsockname()[0].split("%")[0]).is_loopback


def url(bound: socket.socket) -> str:
    """Where a bound socket is reached."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    """Tells when it listens."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()


def serve(app: Any, bound: socket.socket, limits: Limits, ready: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT (Ctrl-C); requests that have begun are answered before it returns.

    Args:
        app: From `adaptkit.serving.app.create_app`.
        bound: From `bind`; closed at the end.
        limits: The app's.
        ready: Called when it listens.
    """
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        loop="asyncio",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        # a request takes as long to arrive as to be answered; connections beyond that don't hold up the end
        timeout_graceful_shutdown=int(2 * limits.seconds) + 5,
    )
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # forms that can't be read are the sender's matter
    # uvicorn raises the signal again when it is done: having stopped in good order is no failure
    kept = {kind: signal.signal(kind, lambda *_: None) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        _Server(config, ready).run(sockets=[bound])
    finally:
        for kind, handler in kept.items():
            signal.signal(kind, handler)
        bound.close()
