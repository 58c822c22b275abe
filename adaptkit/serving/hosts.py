"""Who may talk to a server on this machine's own address: programs and pages of this machine alone.

A page of another site can give its own name this machine's address (DNS rebinding): the browser then sends that name as
Host. And it can send plain requests straight to localhost, which browsers mark as coming from another site.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

from starlette.responses import JSONResponse

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOCAL = ("127.0.0.1", "localhost", "[::1]")
"""What this machine calls itself."""


def headers_of(scope: Scope) -> dict[str, str]:
    """A request's headers, their names in small letters."""
    return {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}


def names_one(host: str, hosts: Collection[str]) -> bool:
    """Whether a Host header names one of `hosts`, which may be given with a port or, for any port, without."""
    host = host.lower()
    name, colon, port = host.rpartition(":")
    return host in hosts or (bool(colon) and port.isdecimal() and name in hosts)


class LocalOnly:
    """ASGI middleware that refuses requests to other names, and those that pages of other sites send.

    Args:
        app: What is guarded.
        hosts: Names that it answers to, in small letters.
    """

    def __init__(self, app: App, hosts: Collection[str]) -> None:
        self.app, self.hosts = app, frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or pass on one request."""
        refusal = self._refusal(headers_of(scope)) if scope["type"] == "http" else None
        if refusal is None:
            await self.app(scope, receive, send)
        else:
            await JSONResponse({"error": refusal[1]}, refusal[0])(scope, receive, send)

    def _refusal(self, headers: dict[str, str]) -> tuple[int, str] | None:
        """Status and sentence for a request that is refused."""
        if not names_one(headers.get("host", ""), self.hosts):
            names = ", ".join(sorted(self.hosts))
            return 421, f"This server answers to {names} only: another name needs --allow-host when it is started."
        if headers.get("sec-fetch-site") == "cross-site":
            return 403, "This server answers programs, not pages of other sites."
        return None
