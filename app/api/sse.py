"""Server-sent events, for every API that streams: a refusal is a plain answer, a later fault the last event."""

import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import msgspec
from fastapi.sse import EventSourceResponse, format_sse_event
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from app import errors
from app.errors import Problem

HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # no proxy may keep an event back

log = logging.getLogger("app.http")


def event(name: str, data: object) -> bytes:
    """One event, its data as JSON."""
    return format_sse_event(event=name, data_str=msgspec.json.encode(data).decode())


async def respond(
    request: Request, events: AsyncGenerator[bytes], show: Callable[[Problem], bytes]
) -> EventSourceResponse:
    """An answer of events, as format_sse_event makes them. Raises the Problem that comes before the first. show:
    the event of one that comes behind it."""
    return _Stream(request, await anext(events), events, show)


class _Stream(EventSourceResponse):
    """Ends its events with itself, so that a client that leaves takes its jobs out of the engine."""

    def __init__(
        self, request: Request, first: bytes, events: AsyncGenerator[bytes], show: Callable[[Problem], bytes]
    ) -> None:
        super().__init__(self._body(first), headers=HEADERS)
        self.request, self.events, self.show, self.is_whole = request, events, show, False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events, until there is none or the client has left."""
        try:
            async with aclosing(self.events):
                await super().__call__(scope, receive, send)
        finally:
            self.request.state.client_left = not self.is_whole

    async def _body(self, first: bytes) -> AsyncGenerator[bytes]:
        state = self.request.state
        try:
            yield first
            async for event in self.events:
                yield event
        except Problem as problem:
            state.problem = problem  # for the ledger
        except Exception:
            log.exception("unexpected fault", extra={"fields": {"id": state.request_id}})
            state.problem = Problem(errors.INTERNAL)
        if fault := getattr(state, "problem", None):
            yield self.show(fault)
        self.is_whole = True
