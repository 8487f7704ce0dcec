"""What every request passes on its way in and out: its id, the limits on its body, the ledger and the log line."""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.metrics import Metrics
from app.problems import unexpected
from app.protocol import RECEIVE_S

BODY_LIMIT = 64 << 10  # bytes; a prompt of 2,000 characters takes 12 KB at most, fully escaped 24 KB
JSON = re.compile(r"application/(json|[^\s;/]+\+json)\s*(;|$)", re.IGNORECASE)  # RFC 8259; RFC 6839, 3.1
SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
OUTCOMES = {200: "ok", 429: "refused", 503: "refused", 504: "expired"}
LOST = ("engine_died", "unavailable")  # codes of a 503 for what had been accepted

log = logging.getLogger("app.http")


class Front:
    """Pure ASGI, so that a handler hears of its client leaving. Counts each POST /generate exactly once:
    what it received, and how it ended."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; other scopes pass."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["request_id"] = _request_id(Headers(scope=scope))
        start, status, read, whole = time.monotonic(), 0, 0, False

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = state["request_id"]
            await send(message)

        counts = scope["method"] == "POST" and scope["path"] == "/generate"
        if counts:
            self.metrics.received.inc()

        async def receive_limited() -> Message:
            nonlocal read, whole
            if counts and read == 0:
                _check_type(Headers(scope=scope))
            try:
                async with asyncio.timeout(None if whole else max(0.0, start + RECEIVE_S - time.monotonic())):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"the body did not arrive within {RECEIVE_S:g} s") from None
            read += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if read > BODY_LIMIT:
                raise HTTPException(413, f"the body is larger than the limit of {BODY_LIMIT} bytes")
            if message["type"] == "http.disconnect" and status == 0:
                state["client_left"] = True
            return message

        try:
            # The answer to HEAD is GET's; uvicorn leaves its body out.
            seen = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
            await self.app(seen, receive_limited, send_with_id)
        except Exception:
            log.exception("unexpected fault", extra={"fields": {"id": state["request_id"]}})
            if status == 0:
                await unexpected(Request(scope))(scope, receive, send_with_id)
        finally:
            seconds = time.monotonic() - start
            if counts:
                self._settle(state, status, seconds)
            _log_line(scope, state, status, seconds)

    def _settle(self, state: MutableMapping[str, Any], status: int, seconds: float) -> None:
        outcome = "dropped" if state.get("client_left") or status == 0 else _outcome(state, status)
        self.metrics.requests.labels(state.get("variant", ""), outcome).inc()
        if outcome == "ok":
            self.metrics.total.observe(seconds)


def _outcome(state: MutableMapping[str, Any], status: int) -> str:
    if status >= 500 and status not in (503, 504):
        return "failed"
    if state.get("code") in LOST:
        return "failed"
    return OUTCOMES.get(status, "invalid")


def _check_type(headers: Headers) -> None:
    if not JSON.match(headers.get("content-type", "")):
        raise HTTPException(415, "send JSON, with the header content-type: application/json")
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise HTTPException(415, "send the body as it is: content-encoding is not understood")


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if SANE_ID.fullmatch(given) else uuid.uuid4().hex


def _log_line(scope: Scope, state: MutableMapping[str, Any], status: int, seconds: float) -> None:
    if scope["path"] in ("/live", "/ready", "/metrics") and status < 400:
        return
    fields = {
        "id": state["request_id"],
        "method": scope["method"],
        "path": scope["path"],
        "status": status or "client left",
        "variant": state.get("variant", ""),
        "ms": round(seconds * 1000, 1),
    }
    log.info("request", extra={"fields": fields})
