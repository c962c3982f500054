"""Who may talk to the server. One ASGI layer in front of everything, HTTP and WebSocket alike.

* Host must be one of ours: a page that rebinds its name to 127.0.0.1 still sends its own name.
* Origin, where a browser sends it, must be the server itself; what a browser calls cross-site is refused.
* With a token: `Authorization: Bearer`, or the cookie that opening `/?token=...` once is exchanged for.
* Bodies are JSON, and not large. Answers carry a strict Content-Security-Policy.

Browsers hide why an upgrade was refused, so a WebSocket is accepted, then closed with a code and a reason.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from dataclasses import dataclass, replace
from http.cookies import CookieError, SimpleCookie
from ipaddress import ip_address
from urllib.parse import SplitResult, parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = ("localhost", "127.0.0.1", "::1")
COOKIE = "shotstream"
OPEN_PATHS = ("/healthz", "/readyz")  # for whoever watches over the process; they tell nothing about anybody

HEADERS = {
    "Content-Security-Policy": "default-src 'self'; media-src 'self' blob:; img-src 'self' data:; "
    "object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class Refused(Exception):
    """A request that may not pass, in one line; with its HTTP status and its WebSocket close code."""

    def __init__(self, status: int, close: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.close = close


@dataclass(frozen=True)
class Guard:
    """The rules of one server. hosts: names, without port, that it answers to. token: None asks for none."""

    hosts: tuple[str, ...] = LOOPBACK
    addresses: bool = False  # answer to any IP address too: a page can rebind a name, but not a number
    token: str | None = None
    body_bytes: int = 1_000_000

    def check(self, scope: Scope) -> None:
        """Raises Refused if the request comes from the wrong place or person."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self._is_ours(_split(f"//{host}").hostname or ""):
            remedy = "start the server with --allow-host to let it answer to it"
            raise Refused(403, 4403, f"host {host[:60]!r} is not a name of this server; {remedy}")
        _check_origin(scope, headers, host)
        if self.token is not None and scope["path"] not in OPEN_PATHS:
            _check_token(self.token, headers)

    def _is_ours(self, name: str) -> bool:
        return bool(name) and (name in self.hosts or (self.addresses and _is_address(name)))

    def check_body(self, headers: Headers, size: int) -> None:
        """Raises Refused for a body of another type than JSON, or one that is too large."""
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if size and kind != "application/json":
            raise Refused(415, 4403, f"content type {kind[:60]!r}; send application/json")
        if size > self.body_bytes:
            raise Refused(413, 4429, f"body_bytes is limited to {self.body_bytes}; send less at once")


def _check_origin(scope: Scope, headers: Headers, host: str) -> None:
    origin = headers.get("origin")
    if origin is not None:
        parts = _split(origin)
        if parts.scheme not in ("http", "https") or parts.netloc.lower() != host.lower():
            raise Refused(403, 4403, f"origin {origin[:60]!r} may not use this server; open its own page")
    # Reads of other sites carry no Origin. The page of another port counts as the same site, but is not ours.
    navigates = headers.get("sec-fetch-mode") == "navigate" and scope.get("method") == "GET"
    if headers.get("sec-fetch-site", "none") not in ("same-origin", "none") and not navigates:
        raise Refused(403, 4403, "another site may not use this server; open its own page")


def _check_token(token: str, headers: Headers) -> None:
    scheme, _, given = headers.get("authorization", "").partition(" ")
    bearer = scheme.lower() == "bearer" and same(given.strip(), token)
    if not bearer and not same(_cookie(headers.get("cookie", "")), cookie_value(token)):
        raise Refused(401, 4401, "token missing or wrong; open the address that the server printed")


def same(given: str, wanted: str) -> bool:
    """Equality, in a time that does not tell how much of it was right."""
    return hmac.compare_digest(given.encode(), wanted.encode())


def cookie_value(token: str) -> str:
    """What a browser keeps instead of the token."""
    return hmac.new(token.encode(), b"shotstream cookie", hashlib.sha256).hexdigest()


def _cookie(header: str) -> str:
    try:
        found = SimpleCookie(header).get(COOKIE)
    except CookieError:
        return ""
    return found.value if found else ""


def _split(url: str) -> SplitResult:
    """The parts of a URL, all empty for nonsense."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises, too, if it is not a number
    except ValueError:
        return urlsplit("")
    return parts


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


class Security:
    """The ASGI layer that applies a `Guard`."""

    def __init__(self, app: ASGIApp, guard: Guard) -> None:
        self.app = app
        self.guard = guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        match scope["type"]:
            case "http":
                await self._http(scope, receive, send)
            case "websocket":
                await self._websocket(scope, receive, send)
            case _:
                await self.app(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        try:
            entrance = self._entrance(scope)
            if entrance is None:
                self.guard.check(scope)
                receive = await self._whole_body(scope, receive)
        except Refused as refused:
            headers = {"WWW-Authenticate": "Bearer"} if refused.status == 401 else None
            entrance = JSONResponse({"message": str(refused)}, refused.status, headers)
        await (entrance or self.app)(scope, receive, send_safely)

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self.guard.check(scope)
        except Refused as refused:
            await receive()  # the wish to connect
            await send({"type": "websocket.accept"})
            await send({"type": "websocket.close", "code": refused.close, "reason": str(refused)[:120]})
            return
        await self.app(scope, receive, send)

    def _entrance(self, scope: Scope) -> Response | None:
        """`/?token=...`: the token becomes a cookie and leaves the address.

        By a page that goes on by itself, not by a redirect: after a click in another site's page, a strict cookie
        would not be sent with a redirect.
        """
        query = parse_qs(scope["query_string"].decode("latin-1"))
        if self.guard.token is None or "token" not in query or scope["path"] != "/" or scope["method"] != "GET":
            return None
        replace(self.guard, token=None).check(scope)
        if not same(query["token"][0], self.guard.token):
            raise Refused(401, 4401, "token wrong; open the address that the server printed")
        session = query.get("session", [""])[0]
        then = f"./#{session}" if re.fullmatch(r"[\w-]{1,64}", session) else "./"
        page = f'<!doctype html><title>shotstream</title><meta http-equiv="refresh" content="0; url={then}">'
        response = HTMLResponse(page, headers={"Cache-Control": "no-store"})
        response.set_cookie(COOKIE, cookie_value(self.guard.token), httponly=True, samesite="strict")
        return response

    async def _whole_body(self, scope: Scope, receive: Receive) -> Receive:
        """Read the body, checking it, and give back a `receive` that plays it again. Raises Refused."""
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return receive
        headers, body, more = Headers(scope=scope), bytearray(), True
        self.guard.check_body(headers, _content_length(headers))
        while more:
            message = await receive()
            if message["type"] != "http.request":
                break  # the client has gone
            body += message.get("body", b"")
            more = message.get("more_body", False)
            self.guard.check_body(headers, len(body))
        waiting: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            return waiting.pop() if waiting else await receive()

        return replay


def _content_length(headers: Headers) -> int:
    length = headers.get("content-length", "0")
    return int(length) if length.isascii() and length.isdigit() and len(length) < 16 else 0
