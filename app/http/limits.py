"""What a route takes of a request's body: its type, its size, the time it has to arrive, and one way to read it."""

import asyncio
import re
import time
from collections.abc import Callable, Coroutine, MutableMapping
from dataclasses import dataclass
from inspect import isclass
from typing import Any

from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from app import errors
from app.errors import Problem
from app.http.keys import take
from app.http.ledger import count, glance
from app.http.protocol import RECEIVE_S
from app.http.reading import SMALL, loads, read_form, text_names

JSON = re.compile(r"application/(json|[^\s;/]+\+json)\s*(;|$)", re.IGNORECASE)  # RFC 8259; RFC 6839, 3.1
FORM = re.compile(r"multipart/form-data\s*(;|$)", re.IGNORECASE)  # RFC 7578


@dataclass
class Room:
    """The memory for large bodies. body: the most that one may take; bodies: that all take together, from the first
    byte of each to the end of its request; held: that they take now. Bytes. rate: the least that one may arrive with,
    bytes per second."""

    body: int
    bodies: int
    rate: float
    held: int = 0


def install(app: Starlette, room: Room) -> None:
    """Give an application its room."""
    app.state.room = room


class LimitedRoute(APIRoute):
    """A route whose body is limited. A subclass may take more. By the route, not by the path, so that all of it holds
    under any prefix."""

    body_limit = SMALL
    draws = takes_pictures = False

    def timeout(self, body: bytes | None) -> float | None:
        """What a request that draws says of its deadline, seconds; None where its API has no such field. body: None
        where it is not read yet."""
        return None

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Judge the request by its key and head, and pass it on with a receive() that keeps the limits."""
        if scope["method"] not in (self.methods or ()):
            return await super().handle(scope, receive, send)
        if self.draws:
            count(scope)
            take(scope)
        headers = Headers(scope=scope)
        _check_type(headers, self.takes_pictures)
        room: Room = scope["app"].state.room
        body = Body(receive, room, room.body if self.takes_pictures else self.body_limit, scope["state"])
        length = int(headers.get("content-length", 0))
        body.check(length)
        try:
            if self.draws:
                await self._glance(scope, headers, length, body)
            return await super().handle(scope, body.receive, send)
        finally:
            body.let_go()

    async def _glance(self, scope: Scope, headers: Headers, length: int, body: "Body") -> None:
        """Refuse a request that has no place: one with a picture, or a form, by its head. That says who comes again,
        too: a form's bytes are others each time."""
        content_type = headers.get("content-type", "")
        small = None
        if length <= self.body_limit and JSON.match(content_type):
            small = await body.small(self.body_limit)
        head = b"%d bytes" % length
        glance(scope, head if small is None else small, self.timeout(small))

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The web framework's, with our way to read JSON and forms."""
        handler = super().get_route_handler()
        model = self.body_field.field_info.annotation if self.body_field else None
        texts = text_names(model) if isclass(model) and issubclass(model, BaseModel) else frozenset[str]()

        async def strict(request: Request) -> Response:
            return await handler(StrictRequest(request.scope, request.receive, texts))

        return strict


class DrawingRoute(LimitedRoute):
    """A route that draws: it is counted from its arrival to its end, and not parsed where there is no room for it."""

    draws = True


class PictureRoute(DrawingRoute):
    """One that takes pictures, too: in JSON or in a form."""

    takes_pictures = True


class Body:
    """A request's body on its way. limit: bytes."""

    def __init__(self, receive: Receive, room: Room, limit: int, state: MutableMapping[str, Any]) -> None:
        self._receive, self._room, self._limit, self._state = receive, room, limit, state
        self._read, self._is_whole, self._start = 0, False, time.monotonic()
        self._kept: list[Message] = []

    async def small(self, limit: int) -> bytes | None:
        """All of it, where that is no more than so many bytes; what was read is received again. Raises Refused as
        receive(), and Problem where the client leaves."""
        kept: list[Message] = []
        while not self._is_whole and self._read <= limit:
            kept.append(await self.receive())
            if kept[-1]["type"] == "http.disconnect":
                raise Problem(errors.CLIENT_LEFT)
        self._kept = kept
        return b"".join(message.get("body", b"") for message in kept) if self._read <= limit else None

    async def receive(self) -> Message:
        """The next message. Raises Refused for a body that is too large, too slow, or too much with all the others."""
        if self._kept:
            return self._kept.pop(0)
        try:
            async with asyncio.timeout(None if self._is_whole else max(0.0, self._end - time.monotonic())):
                message = await self._receive()
        except TimeoutError:
            seconds = self._end - self._start
            raise Refused(Problem(errors.TOO_SLOW, f"the body did not arrive within {seconds:.3g} s")) from None
        read = len(message.get("body", b""))
        self._read += read
        self._room.held += read
        self._is_whole = not message.get("more_body", False)
        self.check(self._read)
        if message["type"] == "http.disconnect" and not self._state.get("status"):
            self._state["client_left"] = True
        return message

    def check(self, length: int) -> None:
        """Raises Refused where so many bytes of it are too many. A small body is never too much."""
        if length > self._limit:
            raise Refused(Problem(errors.BODY_TOO_LARGE, f"the body is larger than the limit of {self._limit} bytes"))
        if length > SMALL and self._room.held + length - self._read > self._room.bodies:
            raise Refused(Problem(errors.BODIES))

    def let_go(self) -> None:
        """The request has ended."""
        self._room.held -= self._read

    @property
    def _end(self) -> float:
        return self._start + RECEIVE_S + self._read / self._room.rate


class StrictRequest(Request):
    """A request whose JSON or form is read our way. The bytes are let go once they are read: the web framework would
    hold them."""

    def __init__(self, scope: Scope, receive: Receive, texts: frozenset[str]) -> None:
        super().__init__(scope, receive)
        self._texts = texts

    @property
    def headers(self) -> Headers:
        """Of JSON, so that the web framework asks for that."""
        others = [(name, value) for name, value in super().headers.raw if name != b"content-type"]
        return Headers(raw=[*others, (b"content-type", b"application/json")])

    async def body(self) -> bytes:
        """Something: the web framework asks for JSON where there is a body."""
        return b"{}"

    async def json(self) -> Any:
        """Raises json.JSONDecodeError, whose message says why, or Refused."""
        content_type = super().headers.get("content-type", "")
        if FORM.match(content_type):
            try:
                return await read_form(content_type, self.stream(), self._texts)
            except Problem as problem:
                raise Refused(problem) from None
        return loads(b"".join([chunk async for chunk in self.stream()]))


class Refused(HTTPException):
    """A Problem as the web framework lets it pass while it reads a body; itself it would take for a parser's fault."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.cause.status, problem.detail)
        self.problem = problem


def _check_type(headers: Headers, takes_forms: bool) -> None:
    content_type = headers.get("content-type", "")
    if not JSON.match(content_type) and not (takes_forms and FORM.match(content_type)):
        form = ", or a form with multipart/form-data" if takes_forms else ""
        detail = f"send JSON, with the header content-type: application/json{form}"
        raise Refused(Problem(errors.UNSUPPORTED, detail))
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise Refused(Problem(errors.UNSUPPORTED, "send the body as it is: content-encoding is not understood"))
