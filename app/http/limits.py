"""What a route takes of a request's body: its type, its size, the time it has to arrive, and one way to read it."""

import asyncio
import json
import re
import time
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from app import errors
from app.errors import Cause, Problem
from app.http.keys import take
from app.http.ledger import count, glance
from app.http.protocol import RECEIVE_S

BODY_LIMIT = 64 << 10  # bytes; a prompt of 2,000 characters takes 12 KB at most, fully escaped 24 KB
JSON = re.compile(r"application/(json|[^\s;/]+\+json)\s*(;|$)", re.IGNORECASE)  # RFC 8259; RFC 6839, 3.1


class LimitedRoute(APIRoute):
    """A route whose body is limited. A subclass may take more. By the route, not by the path, so that all of it holds
    under any prefix."""

    body_limit = BODY_LIMIT
    draws = False

    def timeout(self, body: bytes) -> float | None:
        """What a request that draws says of its deadline, seconds; None where its API has no such field."""
        return None

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Judge the request by its key and head, and pass it on with a receive() that keeps the limits."""
        if scope["method"] in (self.methods or ()):
            if self.draws:
                count(scope)
                take(scope)
            headers = Headers(scope=scope)
            _check_type(headers)
            if int(headers.get("content-length", 0)) > self.body_limit:
                raise self._too_large()
            receive = self._limited(scope, receive)
            if self.draws:
                body = await _whole(receive)
                glance(scope, body, self.timeout(body))
                receive = _again(body, receive)
        await super().handle(scope, receive, send)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The web framework's, with our way to read JSON."""
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handler(StrictRequest(request.scope, request.receive))

        return strict

    def _limited(self, scope: Scope, receive: Receive) -> Receive:
        read, is_whole, state, end = 0, False, scope["state"], time.monotonic() + RECEIVE_S

        async def limited() -> Message:
            nonlocal read, is_whole
            try:
                async with asyncio.timeout(None if is_whole else max(0.0, end - time.monotonic())):
                    message = await receive()
            except TimeoutError:
                raise _refusal(errors.TOO_SLOW, f"the body did not arrive within {RECEIVE_S:g} s") from None
            read += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if read > self.body_limit:
                raise self._too_large()
            if message["type"] == "http.disconnect" and not state.get("status"):
                state["client_left"] = True
            return message

        return limited

    def _too_large(self) -> HTTPException:
        return _refusal(errors.BODY_TOO_LARGE, f"the body is larger than the limit of {self.body_limit} bytes")


class DrawingRoute(LimitedRoute):
    """A route that draws: it is counted from its arrival to its end, and not parsed where there is no room for it."""

    draws = True


async def _whole(receive: Receive) -> bytes:
    """A request's body. Raises Problem where the client leaves."""
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Problem(errors.CLIENT_LEFT)
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def _again(body: bytes, receive: Receive) -> Receive:
    """A receive() that gives a body that was read already, then what comes behind it."""
    is_given = False

    async def replay() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


class StrictRequest(Request):
    """A request whose JSON has one meaning: UTF-8 (a byte order mark is skipped), and no key twice."""

    async def json(self) -> Any:
        """Raises json.JSONDecodeError, whose message says why."""
        try:
            return json.loads((await self.body()).decode("utf-8-sig"), object_pairs_hook=_once)
        except UnicodeDecodeError:
            raise json.JSONDecodeError("it is not UTF-8", "", 0) from None
        except RecursionError:
            raise json.JSONDecodeError("it is nested too deeply", "", 0) from None
        except json.JSONDecodeError:
            raise
        except ValueError as error:  # a number of thousands of digits
            raise json.JSONDecodeError(str(error).split(";")[0], "", 0) from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise json.JSONDecodeError("it holds a key twice", "", 0)
    return found


def _check_type(headers: Headers) -> None:
    if not JSON.match(headers.get("content-type", "")):
        raise _refusal(errors.UNSUPPORTED, "send JSON, with the header content-type: application/json")
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise _refusal(errors.UNSUPPORTED, "send the body as it is: content-encoding is not understood")


def _refusal(cause: Cause, detail: str) -> HTTPException:
    """What the web framework lets pass while it reads a body; a Problem it would take for a fault of its parser."""
    return HTTPException(cause.status, detail)
