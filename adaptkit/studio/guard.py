"""Who may talk to the studio: its own page alone, from this machine.

A page of another site could send requests to localhost (CSRF), or give its own name this machine's address (DNS
rebinding). So each request must name this host, come from this page where the browser says where it comes from, and,
for anything but the page's own files, carry the token that was printed at the start. There are no cookies.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import MutableMapping
from typing import Any

from adaptkit.serving.hosts import LOCAL, App, Receive, Scope, Send, headers_of, names_one

TOKEN_HEADER = "x-studio-token"
MAX_BODY = 256 * 2**20
"""Bytes of one request; the page sends images in smaller parts."""

_HEADERS = (
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self';"
        b" media-src 'self' blob:; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),  # the token stands in the address
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(self), microphone=(), geolocation=()"),
)


class Guard:
    """ASGI middleware that refuses foreign requests and too large bodies, and forbids the page any other address.

    Args:
        app: What is guarded.
        token: That every request must carry, in the header X-Studio-Token or as ?token=.
        port: Where the studio listens.
    """

    def __init__(self, app: App, token: str, port: int) -> None:
        self.app, self.token = app, token
        self.hosts = LOCAL if port == 80 else tuple(f"{name}:{port}" for name in LOCAL)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or pass on one request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # no web sockets
        refusal = self._refusal(scope)
        if refusal is not None:
            await _refuse(send, *refusal)
            return
        await self.app(scope, receive, _with_headers(send, private=not scope["path"].startswith("/page/")))

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Status and sentence for a request that is refused."""
        headers = headers_of(scope)
        host = headers.get("host", "").lower()
        if not names_one(host, self.hosts):
            return 421, "The studio answers on localhost only."
        if headers.get("origin", f"http://{host}").lower() != f"http://{host}":
            return 403, "The studio answers its own page only."
        if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            return 403, "The studio answers its own page only."
        if not scope["path"].startswith("/page/") and not self._has_token(scope, headers):
            return 403, "The token is missing or old: open the address that 'adaptkit studio' printed."
        return _body_refusal(scope["method"], headers)

    def _has_token(self, scope: Scope, headers: dict[str, str]) -> bool:
        from urllib.parse import parse_qs

        query = parse_qs(scope["query_string"].decode("latin-1"))
        given = [headers.get(TOKEN_HEADER, "")]
        if scope["method"] in ("GET", "HEAD"):  # images and the page itself can't send headers
            given += query.get("token", [])
        return any(secrets.compare_digest(text.encode(), self.token.encode()) for text in given)


def _body_refusal(method: str, headers: dict[str, str]) -> tuple[int, str] | None:
    if method in ("GET", "HEAD"):
        return None
    length = headers.get("content-length", "0")  # without either header there is no body
    if "transfer-encoding" in headers or not length.isdecimal():
        return 411, "The request must say how long it is."
    if int(length[:19]) > MAX_BODY:
        return 413, f"A request has at most {MAX_BODY // 2**20} MB: send the images in smaller parts."
    return None


async def _refuse(send: Send, status: int, sentence: str) -> None:
    body = json.dumps({"error": sentence}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await _with_headers(send, private=True)({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _with_headers(send: Send, *, private: bool) -> Send:
    async def sending(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            own = {key for key, _ in message.get("headers", ())}
            cache = b"no-cache" if not private else b"no-store"
            added = [*_HEADERS, (b"cache-control", cache)]
            message["headers"] = [*message.get("headers", ()), *(pair for pair in added if pair[0] not in own)]
        await send(message)

    return sending
