"""The socket between the HTTP process and the engine: a private pair that nobody else can open.

A frame is its length in 4 bytes, then one msgpack message: typed, checked both ways, bounded in size, no pickle.
"""

import asyncio
import os
import queue
import socket
import threading
from collections.abc import Callable

import msgspec

from app.engine.messages import FromEngine, Starting, ToEngine

FRAME_LIMIT = 64 << 20  # bytes; a 1536 px picture takes 7 MB

_encoder = msgspec.msgpack.Encoder()
_to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_from_engine: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


def frame(message: ToEngine | FromEngine) -> bytes:
    """A message as bytes for the socket. Raises ValueError above FRAME_LIMIT."""
    body = _encoder.encode(message)
    if len(body) > FRAME_LIMIT:
        raise ValueError(f"a message of {len(body)} bytes is over the limit of {FRAME_LIMIT}")
    return len(body).to_bytes(4, "big") + body


def receive(sock: socket.socket) -> ToEngine:
    """The next message on the engine's side. Raises EOFError when the peer has gone, ValueError on a bad frame."""
    length = int.from_bytes(_exactly(sock, 4), "big")
    if length > FRAME_LIMIT:
        raise ValueError(f"a frame of {length} bytes is over the limit of {FRAME_LIMIT}")
    return _to_engine.decode(_exactly(sock, length))


async def read(stream: asyncio.StreamReader) -> FromEngine:
    """The next message on the HTTP side. Raises asyncio.IncompleteReadError when the engine has gone, ValueError on a
    bad frame."""
    length = int.from_bytes(await stream.readexactly(4), "big")
    if length > FRAME_LIMIT:
        raise ValueError(f"a frame of {length} bytes is over the limit of {FRAME_LIMIT}")
    return _from_engine.decode(await stream.readexactly(length))


def _exactly(sock: socket.socket, length: int) -> bytes:
    parts = bytearray()
    while len(parts) < length:
        part = sock.recv(length - len(parts))
        if not part:
            raise EOFError("the HTTP process has gone")
        parts += part
    return bytes(parts)


class Wire:
    """The engine's end of the socket: a thread that reads, and one that writes. hear: is called with each message that
    arrives; until it is replaced by the loop's, it says that we are starting."""

    def __init__(self, sock: socket.socket) -> None:
        self.hear: Callable[[ToEngine], None] = lambda message: self.send(Starting())
        self._sock = sock
        self._writing = threading.Lock()
        self._outbox: queue.SimpleQueue[FromEngine] = queue.SimpleQueue()
        threading.Thread(target=self._write, daemon=True, name="write").start()
        threading.Thread(target=self._read, daemon=True, name="read").start()

    def send(self, message: FromEngine) -> None:
        """Put a message on the wire; never blocks."""
        self._outbox.put(message)

    def last_word(self, message: FromEngine) -> None:
        """Send a message at once, before the process ends."""
        with self._writing:
            self._sock.sendall(frame(message))

    def _write(self) -> None:
        while True:
            data = frame(self._outbox.get())
            try:
                with self._writing:
                    self._sock.sendall(data)
            except OSError:
                os._exit(0)  # the HTTP process has gone, and with it everybody who waits

    def _read(self) -> None:
        while True:
            try:
                message = receive(self._sock)
                self.hear(message)  # as it is now, not as it was before we waited
            except (EOFError, OSError):
                os._exit(0)
