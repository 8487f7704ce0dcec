"""Every request's id, its line in the log, and its outcome in the metrics: each that draws is counted exactly once."""

import hashlib
import logging
import re
import time
import uuid
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import errors
from app.errors import Problem
from app.keys import Key
from app.metrics import Metrics

SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
QUIET = ("/live", "/ready", "/health", "/metrics")  # asked every few seconds: no line while all is well

log = logging.getLogger("app.http")


class Ledger:
    """Pure ASGI, so that a handler hears of its client leaving. What it keeps of a request is in scope["state"]:
    request_id, status (0 until the answer begins), ledger, draws, who, variant, problem, client_left, key, flagged.
    render: the answer to a fault that nobody foresaw. glance: raises the Problem of a request that nobody has read yet,
    by its timeout and who it is, where it will not be served now."""

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        render: Callable[[Request, Problem], Response],
        glance: Callable[[float | None, str], None] = lambda timeout, who: None,
    ) -> None:
        self.app, self.metrics, self.render, self.glance = app, metrics, render, glance

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; other scopes pass."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["request_id"], state["status"] = _request_id(Headers(scope=scope)), 0
        state["ledger"] = self
        start = time.monotonic()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                state["status"] = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = state["request_id"]
                if state.get("flagged"):
                    MutableHeaders(scope=message)["X-Check"] = "flag"
            await send(message)

        try:
            # The answer to HEAD is GET's; uvicorn leaves its body out.
            seen = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
            await self.app(seen, receive, send_with_id)
        except Exception:
            log.exception("unexpected fault", extra={"fields": {"id": state["request_id"]}})
            if not state["status"]:
                await self.render(Request(scope), Problem(errors.INTERNAL))(scope, receive, send_with_id)
        finally:
            seconds = time.monotonic() - start
            if state.get("draws"):
                self._settle(state, seconds)
            _log_line(scope, state, seconds)

    def _settle(self, state: MutableMapping[str, Any], seconds: float) -> None:
        outcome = _outcome(state)
        self.metrics.requests.labels(state.get("variant", ""), outcome).inc()
        if "key" in state:
            self.metrics.of_key.labels(state["key"].name, outcome).inc()
        if outcome == "ok":
            self.metrics.total.observe(seconds)


def owner_of(scope: Mapping[str, Any]) -> str:
    """Who asks: the name of a key, or an address. scope: a request, or its scope."""
    key: Key | None = scope["state"].get("key")
    return key.name if key is not None else (scope.get("client") or ("",))[0]


def glance(scope: Scope, body: bytes, timeout: float | None) -> None:
    """Raises Problem where a request that draws will not be served now whatever it says. `who` it is: the same when
    the same client sends the same again, which is how a promise of Retry-After is recognised."""
    state = scope["state"]
    state["who"] = hashlib.sha256(repr((owner_of(scope), scope["path"])).encode() + body).hexdigest()
    ledger: Ledger = state["ledger"]
    ledger.glance(timeout, state["who"])


def count(scope: Scope) -> None:
    """A request that draws has arrived: from here to its end it is in the metrics."""
    ledger: Ledger = scope["state"]["ledger"]
    ledger.metrics.received.inc()
    scope["state"]["draws"] = True


def _outcome(state: MutableMapping[str, Any]) -> str:
    if state.get("client_left") or not state["status"]:
        return errors.CLIENT_LEFT.outcome
    problem: Problem | None = state.get("problem")
    return "ok" if problem is None else problem.cause.outcome


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if SANE_ID.fullmatch(given) else uuid.uuid4().hex


def _log_line(scope: Scope, state: MutableMapping[str, Any], seconds: float) -> None:
    if scope["path"].endswith(QUIET) and state["status"] < 400:
        return
    fields = {
        "id": state["request_id"],
        "method": scope["method"],
        "path": scope["path"],
        "status": state["status"] or "client left",
        "variant": state.get("variant", ""),
        "ms": round(seconds * 1000, 1),
    }
    if "key" in state:
        fields["key"] = state["key"].name
    log.info("request", extra={"fields": fields})
