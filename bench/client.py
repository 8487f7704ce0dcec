"""A small HTTP/1.1 client. The load generator shares the cores with the server it measures, so it must cost little."""

import asyncio
from dataclasses import dataclass
from types import TracebackType
from typing import Self

PATIENCE_S = 90.0  # a server that needs longer than this for an answer has failed
NO_ANSWER = 0  # the status of a request whose connection broke or that ran out of patience


@dataclass(frozen=True)
class Reply:
    """What came back. head: status line and headers as they are."""

    status: int
    head: bytes = b""
    body: bytes = b""

    def header(self, name: str) -> str | None:
        """A header's value, by its lower-case name."""
        for line in self.head.split(b"\r\n")[1:]:
            key, _, value = line.partition(b":")
            if key.strip().lower() == name.encode():
                return value.strip().decode()
        return None


class Connection(asyncio.Protocol):
    """One kept-alive connection, one request at a time."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._reply: asyncio.Future[Reply] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self._settle(Reply(NO_ANSWER))

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = bytes(self._buffer[:end])
        reply = Reply(int(head[9:12]), head)
        length = int(reply.header("content-length") or 0)
        if len(self._buffer) >= end + 4 + length:
            body = bytes(self._buffer[end + 4 : end + 4 + length])
            self._buffer.clear()
            self._settle(Reply(reply.status, head, body))

    def ask(self, request: bytes) -> asyncio.Future[Reply]:
        """Send the bytes of a request. The reply has status NO_ANSWER if the connection breaks."""
        self._reply = asyncio.get_running_loop().create_future()
        if self.transport is None:
            self._settle(Reply(NO_ANSWER))
        else:
            self.transport.write(request)
        return self._reply

    def _settle(self, reply: Reply) -> None:
        if self._reply is not None and not self._reply.done():
            self._reply.set_result(reply)


class Client:
    """POSTs to one path of one server, over as many connections as there are requests in flight."""

    def __init__(self, host: str, port: int, path: str = "/generate", accept: str = "image/*") -> None:
        self.host, self.port = host, port
        self._head = (
            f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nAccept: {accept}\r\n"
            "Content-Type: application/json\r\nContent-Length: "
        ).encode()
        self._idle: list[Connection] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for connection in self._idle:
            if connection.transport is not None:
                connection.transport.close()
        self._idle.clear()

    async def post(self, body: bytes) -> Reply:
        """One request and its reply; a failure to answer is a reply too (NO_ANSWER)."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                connection = await self._connection()
                reply = await connection.ask(b"%b%d\r\n\r\n%b" % (self._head, len(body), body))
        except (OSError, TimeoutError):
            return Reply(NO_ANSWER)
        self._idle.append(connection)
        return reply

    async def _connection(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.transport is not None and not connection.transport.is_closing():
                return connection
        _, connection = await asyncio.get_running_loop().create_connection(Connection, self.host, self.port)
        return connection
