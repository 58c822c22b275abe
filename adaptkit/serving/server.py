"""Running an app on a socket until it is asked to stop; what has begun is answered first."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import signal
import socket
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

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


class _Protocol(H11Protocol):
    """HTTP as uvicorn speaks it, but a request's head must arrive in time; uvicorn waits for it without end.

    Args:
        seconds: From the connection, or from the first byte after an answer, to the end of the head.
    """

    def __init__(self, *words: Any, seconds: float, **named: Any) -> None:
        super().__init__(*words, **named)
        self._seconds = seconds
        self._late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def send_400_response(self, msg: str) -> None:
        super().send_400_response(msg)
        if self.cycle is not None:  # a request whose body isn't HTTP: what the app says to it can't be sent any more
            self.cycle.disconnected = True

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._forget()

    def _watch(self) -> None:
        """Start to wait for a head, once, or stop where it has come."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._forget()
        elif self._late is None:
            self._late = self.loop.call_later(self._seconds, self._close)

    def _forget(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _close(self) -> None:
        self._late = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


class _Server(uvicorn.Server):
    """Tells when it listens."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready
        self._early = False

    def stop_early(self, *_: Any) -> None:
        """Remember a signal that comes before uvicorn listens for them."""
        self._early = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.should_exit = self.should_exit or self._early
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
        http=cast("type[asyncio.Protocol]", partial(_Protocol, seconds=limits.seconds)),
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
    server = _Server(config, ready)
    # uvicorn raises the signal again when it is done: having stopped in good order is no failure
    kept = {kind: signal.signal(kind, server.stop_early) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run(sockets=[bound])
    finally:
        for kind, handler in kept.items():
            signal.signal(kind, handler)
        bound.close()
