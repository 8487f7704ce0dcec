"""Which names this server answers to, and which web pages may use it from a browser."""

import ipaddress
import re
from collections.abc import Callable, Sequence

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from app import errors
from app.errors import Problem
from app.lists import listed
from app.settings import Settings

HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^:/?#@\[\]\s]+)(:[0-9]*)?")  # RFC 3986, 3.2.2, without what we never answer to
ANY = "*"
SAFE = ("GET", "HEAD", "OPTIONS")
EXPOSED = (  # headers that a page of another origin may read
    *("Retry-After", "X-Request-Id", "X-Seed", "X-Variant", "X-Strength", "X-Prompt-Truncated", "X-Check"),
    *("X-Should-Retry", "RateLimit", "RateLimit-Policy", "Server-Timing", "WWW-Authenticate"),
)


class Origins:
    """Pure ASGI. hosts: names that the Host header may have besides localhost and IP addresses; None: any. A page that
    lets its own name point to 127.0.0.1 (DNS rebinding) sends that name. origins: pages of other sites that may
    send what is not only read; a browser names such a request, and without CORS may send it all the same."""

    def __init__(
        self,
        app: ASGIApp,
        render: Callable[[Request, Problem], Response],
        hosts: Sequence[str] | None,
        origins: Sequence[str] = (),
    ) -> None:
        self.app, self.render = app, render
        self.hosts, self.origins = hosts, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; other scopes pass."""
        problem = self._refusal(Headers(scope=scope), scope["method"]) if scope["type"] == "http" else None
        if problem is None:
            await self.app(scope, receive, send)
        else:
            await self.render(Request(scope), problem)(scope, receive, send)

    def _refusal(self, headers: Headers, method: str) -> Problem | None:
        host = headers.get("host", "")
        if host and self.hosts is not None and not is_known(host, self.hosts):
            return Problem(errors.UNKNOWN_HOST, f"this server does not answer to {host[:100]!r}; see ALLOWED_HOSTS")
        if is_foreign(headers) and method not in SAFE and not {ANY, headers.get("origin", "")} & set(self.origins):
            origin = headers.get("origin", "")[:100]
            return Problem(errors.FOREIGN_ORIGIN, f"pages of {origin!r} may not use this server; see ALLOWED_ORIGINS")
        return None


def is_foreign(headers: Headers) -> bool:
    """Whether a page of another site sends this. A browser says so, but over plain HTTP only to its own machine; to
    others it sends a form, unlike JSON, without asking first, and names the page's origin."""
    site, kind = headers.get("sec-fetch-site"), headers.get("content-type", "").lower()
    if site is not None or not kind.startswith("multipart/"):
        return site == "cross-site"
    return "origin" in headers and headers["origin"].partition("://")[2] != headers.get("host")


def is_known(host: str, allowed: Sequence[str]) -> bool:
    """Whether a Host header is localhost, an IP address (which nobody can rebind), or allowed; *.example.com stands for
    all names below it."""
    parsed = HOST.fullmatch(host)
    if parsed is None:
        return False
    name = parsed[1].strip("[]").lower().removesuffix(".")
    return is_address(name) or any(
        name == each or (each.startswith("*.") and name.endswith(each[1:]))
        for each in (*allowed, "localhost", "*.localhost")
    )


def names(settings: Settings) -> list[str] | None:
    """What Origins is told of hosts."""
    if settings.allowed_hosts is None:
        return [] if is_loopback(settings.host) else None
    allowed = listed(settings.allowed_hosts.lower())
    return None if ANY in allowed else allowed


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address to listen on."""
    return host == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)


def is_address(host: str) -> bool:
    """Whether it is an IP address."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
