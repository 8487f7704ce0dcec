"""uvicorn's HTTP/1.1 protocol with the limits it lacks: on how long and how large a request's head may be, and on how
long a whole request may take to arrive. A client that pipelines is seen to leave, too."""

import asyncio
import json
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from app import errors
from app.errors import MEDIA_TYPE, Problem, document

RECEIVE_S = 10.0  # for a request to arrive, from its first byte (or the connection's start) to its last
HEAD_LIMIT = 32 << 10  # bytes of a request that are not its body: line, headers, framing of chunks, trailers
PIPELINED = 8  # requests that may wait behind one in work while we go on reading


class Protocol(HttpToolsProtocol):
    """One connection. What is wrong before a request is whole is answered here, as a problem, and ends it."""

    _deadline: asyncio.TimerHandle | None = None
    _working: RequestResponseCycle | None = None
    _head = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._deadline = self.loop.call_later(RECEIVE_S, self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has left. uvicorn tells the last request it read; the one in work may be an earlier one."""
        self._arrived()
        if self._working is not None and not self._working.response_complete:
            self._working.disconnected = True
            self._working.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes from the client."""
        if self._deadline is None:
            self._deadline = self.loop.call_later(RECEIVE_S, self._too_slow)
        self._head += len(data)  # on_body takes the body's off again
        super().data_received(data)
        if self._head > HEAD_LIMIT:
            self.send_400_response("")

    def on_headers_complete(self) -> None:
        """The head is whole: hand the request on, unless it is too large; the parser turns the error into a refusal.
        A header costs four bytes besides its name and value."""
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > HEAD_LIMIT:
            self._head = size
            raise ValueError("the head is too large")
        super().on_headers_complete()
        if 0 < len(self.pipeline) <= PIPELINED:
            self.flow.resume_reading()  # else nobody would hear of the client's leaving

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        self._head -= len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request has arrived."""
        self._arrived()
        self._head = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no request, or has too large a head."""
        if self._head > HEAD_LIMIT:
            detail = f"the headers are over the limit of {HEAD_LIMIT} bytes"
            self._refuse(Problem(errors.HEADER_TOO_LARGE, detail))
        else:
            self._refuse(Problem(errors.BAD_REQUEST, "this is no HTTP/1.1 request"))

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._working = cycle
        super()._start_asgi_task(cycle, app)

    def _arrived(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        self._deadline = None
        if self._working is not None and not self._working.response_complete:
            self.cycle.keep_alive = False  # app.http.limits answers, or has; the connection ends with that
        else:
            self._refuse(Problem(errors.TOO_SLOW, f"the request did not arrive within {RECEIVE_S:g} s"))

    def _refuse(self, problem: Problem) -> None:
        """Answer and hang up; without a word where an answer would be taken for another request's."""
        is_answered = self.cycle is not None and self.scope is self.cycle.scope
        is_behind = self._working is not None and not self._working.response_complete
        if self._head > 0 and not is_answered and not is_behind:
            status, body = HTTPStatus(problem.cause.status), json.dumps(document(problem)).encode()
            head = f"HTTP/1.1 {status} {status.phrase}\r\nconnection: close\r\ncontent-type: {MEDIA_TYPE}\r\n"
            self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        self.transport.close()
