"""What a route takes of a request's body: its type, its size, and the time it has to arrive."""

import asyncio
import re
import time

from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

from app import errors
from app.errors import Cause
from app.http.ledger import count
from app.http.protocol import RECEIVE_S

BODY_LIMIT = 64 << 10  # bytes; a prompt of 2,000 characters takes 12 KB at most, fully escaped 24 KB
JSON = re.compile(r"application/(json|[^\s;/]+\+json)\s*(;|$)", re.IGNORECASE)  # RFC 8259; RFC 6839, 3.1


class DrawingRoute(APIRoute):
    """A route that draws. It is counted from its arrival to its end, and its body is limited. A subclass may take
    more. By the route, not by the path, so that all of it holds under any prefix."""

    body_limit = BODY_LIMIT

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count the request, and pass it on with a receive() that keeps the limits."""
        if scope["method"] in (self.methods or ()):
            count(scope)
            receive = self._limited(scope, receive)
        await super().handle(scope, receive, send)

    def _limited(self, scope: Scope, receive: Receive) -> Receive:
        headers, end = Headers(scope=scope), time.monotonic() + RECEIVE_S
        read, is_whole, state = 0, False, scope["state"]

        async def limited() -> Message:
            nonlocal read, is_whole
            if read == 0:
                _check_type(headers)
            try:
                async with asyncio.timeout(None if is_whole else max(0.0, end - time.monotonic())):
                    message = await receive()
            except TimeoutError:
                raise _refusal(errors.TOO_SLOW, f"the body did not arrive within {RECEIVE_S:g} s") from None
            read += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if read > self.body_limit:
                detail = f"the body is larger than the limit of {self.body_limit} bytes"
                raise _refusal(errors.BODY_TOO_LARGE, detail)
            if message["type"] == "http.disconnect" and not state.get("status"):
                state["client_left"] = True
            return message

        return limited


def _check_type(headers: Headers) -> None:
    if not JSON.match(headers.get("content-type", "")):
        raise _refusal(errors.UNSUPPORTED, "send JSON, with the header content-type: application/json")
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise _refusal(errors.UNSUPPORTED, "send the body as it is: content-encoding is not understood")


def _refusal(cause: Cause, detail: str) -> HTTPException:
    """What the web framework lets pass while it reads a body; a Problem it would take for a fault of its parser."""
    return HTTPException(cause.status, detail)
