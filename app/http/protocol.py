"""uvicorn's HTTP/1.1 protocol, stricter: limits on how large a head may be and how long a request may take to arrive,
one reading of where a body ends, and an end of a connection that lets the client read why."""

import asyncio
import json
from http import HTTPStatus
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from app import errors
from app.errors import MEDIA_TYPE, Problem, document
from app.http.connections import Connections

RECEIVE_S = 10.0  # for a request to arrive, from its first byte (or the connection's start) to its last
HEAD_LIMIT = 32 << 10  # bytes of a request that are not its body: line, headers, framing of chunks, trailers
UNREAD_LIMIT = 64 << 20  # bytes that a client may still send behind its answer, so that it comes to read it
PIPELINED = 8  # requests that may wait behind one in work while we go on reading
OFFERS = (b"upgrade", b"http2-settings")  # headers of another protocol, which we do not take up (RFC 9110, 7.8)


class GentleTransport:
    """A transport whose end is the protocol's to time."""

    def __init__(self, protocol: "Protocol") -> None:
        self._protocol = protocol

    def __getattr__(self, name: str) -> Any:
        return getattr(self._protocol.transport, name)

    def close(self) -> None:
        """Close when the client has sent what it is sending."""
        self._protocol.close_gently()


class Protocol(HttpToolsProtocol):
    """One connection. What is wrong before a request is whole is answered here, as a problem, and ends it."""

    _has_room = True
    _deadline: asyncio.TimerHandle | None = None
    _working: RequestResponseCycle | None = None
    _fault: Problem | None = None
    _is_ending = False
    _head = 0
    _unread = 0

    def __init__(self, connections: Connections, **of_uvicorn: Any) -> None:
        super().__init__(**of_uvicorn)
        self._connections = connections

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._has_room = self._connections.opened(transport)
        self._deadline = self.loop.call_later(RECEIVE_S, self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has left. uvicorn tells the last request it read; the one in work may be an earlier one."""
        self._arrived()
        self._connections.closed(self.transport)
        if self._working is not None and not self._working.response_complete:
            self._working.disconnected = True
            self._working.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes from the client."""
        self._connections.busy(self.transport)
        if self._deadline is None:
            self._deadline = self.loop.call_later(RECEIVE_S, self._too_slow)
        self._head += len(data)  # on_body takes the body's off again
        self._unset_keepalive_if_required()
        try:
            self._feed(data)
        except httptools.HttpParserError:
            self.send_400_response("")
        if self._head > HEAD_LIMIT:
            self.send_400_response("")

    def on_headers_complete(self) -> None:
        """The head is whole: hand the request on, or refuse it; the parser turns the error into a refusal."""
        if self.parser.should_upgrade():
            return  # the same head comes again, without the offer
        self._fault = self._fault_of_head()
        if self._fault is not None:
            raise ValueError(self._fault.detail)
        super().on_headers_complete()
        self.cycle.transport = GentleTransport(self)  # type: ignore[assignment]
        if getattr(self.server_state, "draining", False):
            self.cycle.keep_alive = False
        if 0 < len(self.pipeline) <= PIPELINED:
            self.flow.resume_reading()  # else nobody would hear of the client's leaving

    def on_body(self, body: bytes) -> None:
        """A part of the body. What comes behind the answer is thrown away, up to a limit."""
        self._head -= len(body)
        if self.cycle.response_complete:
            self._unread += len(body)
            if self._unread > UNREAD_LIMIT:
                self.transport.close()
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request has arrived."""
        if self.parser.should_upgrade():
            return
        self._arrived()
        self._head = self._unread = 0
        super().on_message_complete()
        if self._is_ending:
            self._close()

    def on_response_complete(self) -> None:
        """The answer is written, as far as the client reads."""
        super().on_response_complete()
        if self._deadline is None and self.timeout_keep_alive_task is not None:
            self._connections.idle(self.transport)

    def pause_writing(self) -> None:
        """The client does not read as fast as we write."""
        super().pause_writing()
        self._connections.unread(self.transport)

    def resume_writing(self) -> None:
        """It has read nearly all."""
        super().resume_writing()
        if not self.transport.is_closing():
            self._connections.read(self.transport)

    def timeout_keep_alive_handler(self) -> None:
        """No request came for a long time."""
        self._close()

    def close_gently(self) -> None:
        """End the connection: at once, or when the client has sent the rest of its request; it may read only then."""
        if self._deadline is None:
            self._close()
            return
        self._is_ending = True
        if self.transport.can_write_eof():
            self.transport.write_eof()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no request, or has too large a head."""
        if self._head > HEAD_LIMIT:
            self._fault = _too_large()
        self._refuse(self._fault or Problem(errors.BAD_REQUEST, "this is no HTTP/1.1 request"))

    def _feed(self, data: bytes) -> None:
        """Parse. A request that offers another protocol is read as if it did not: where its body ends must not depend
        on a header that we do not honour, and the parser would take the body for the other protocol's."""
        while data:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as offer:
                if self.parser.get_method() == b"CONNECT":
                    raise httptools.HttpParserError from None
                data = self._head_without_offer() + data[offer.args[0] :]
                self.parser = httptools.HttpRequestParser(self)
            else:
                return

    def _head_without_offer(self) -> bytes:
        version = self.parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version)]
        for name, value in self.headers:
            if name == b"connection":
                tokens = [token for token in value.split(b",") if token.strip().lower() not in OFFERS]
                lines.append(b"connection: " + b",".join(tokens))
            elif name not in OFFERS:
                lines.append(name + b": " + value)
        return b"\r\n".join(lines) + b"\r\n\r\n"

    def _fault_of_head(self) -> Problem | None:
        """What is wrong with a head. A header costs four bytes besides its name and value."""
        if not self._has_room:
            return Problem(errors.CROWDED)
        if len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > HEAD_LIMIT:
            return _too_large()
        version = self.parser.get_http_version()
        hosts = sum(name == b"host" for name, _ in self.headers)
        if version not in ("1.0", "1.1"):
            return Problem(errors.BAD_REQUEST, f"HTTP/{version} is not served here: HTTP/1.1 is")
        if hosts > 1 or (hosts == 0 and version == "1.1"):  # RFC 9112, 3.2
            return Problem(errors.BAD_REQUEST, f"a request has one Host header, not {hosts}")
        if any(name == b"transfer-encoding" and value.lower() != b"chunked" for name, value in self.headers):
            return Problem(errors.BAD_REQUEST, "chunked is the only transfer-encoding that is understood")
        return None

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
            again = f"retry-after: {problem.retry_after}\r\n" if problem.retry_after else ""
            self.transport.write(f"{head}{again}content-length: {len(body)}\r\n\r\n".encode() + body)
        self._close()

    def _close(self) -> None:
        """End the connection, when what was written has been read."""
        self.transport.close()
        if self.transport.get_write_buffer_size():
            self._connections.unread(self.transport)


def _too_large() -> Problem:
    return Problem(errors.HEADER_TOO_LARGE, f"the headers are over the limit of {HEAD_LIMIT} bytes")
