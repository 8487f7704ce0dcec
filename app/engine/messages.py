"""What crosses between the HTTP process and the engine: typed, schema-checked both ways, size-capped, no pickle.

A frame is its length in 4 bytes, then one msgpack message. The socket is a private pair; nobody else can open it.
"""

import asyncio
import socket
from typing import Annotated

import msgspec

from app.engine.costs import Costs
from app.engine.jobs import Id, Job

FRAME_LIMIT = 64 << 20  # bytes; a 1536 px picture takes 7 MB


class Submit(msgspec.Struct, tag=True, frozen=True):
    """Draw these pictures."""

    jobs: list[Job]


class Cancel(msgspec.Struct, tag=True, frozen=True):
    """Nobody waits for these any more."""

    ids: list[Id]


class Ping(msgspec.Struct, tag=True, frozen=True):
    """Answer between two steps: the loop is alive."""


class VariantReport(msgspec.Struct, frozen=True):
    """A variant as the registry sees it; state as in models.registry.VariantStatus."""

    name: str
    steps: int
    state: str
    resident_bytes: int = 0
    reason: str = ""


class Report(msgspec.Struct, tag=True, frozen=True):
    """The answer to a Ping. device_bytes: GPU memory in use; 0 on a CPU."""

    variants: list[VariantReport]
    device_bytes: int
    switches: int
    compiled: bool


class Ready(msgspec.Struct, tag=True, frozen=True):
    """The engine serves: what it serves, and what it measured at warm-up."""

    family: str
    device: str
    dtype: str
    costs: Costs
    report: Report


class Measured(msgspec.Struct, tag=True, frozen=True):
    """New costs, once compiled code is in place."""

    costs: Costs


class Worked(msgspec.Struct, tag=True, frozen=True):
    """One call on the device. stage: "encode", "denoise" or "decode". ids: the rows in it."""

    stage: str
    variant: str
    ids: list[Id]
    seconds: float
    pixels: int


class Done(msgspec.Struct, tag=True, frozen=True):
    """A picture: height x width x 3 bytes, or if is_jpeg a file of them. Seconds by stage, and the batch size of each
    step."""

    id: Id
    height: int
    width: int
    pixels: bytes
    is_jpeg: bool
    seconds: dict[str, float]
    batches: list[int]
    truncated: bool


class Failed(msgspec.Struct, tag=True, frozen=True):
    """No picture. code: a key of app.problems.ENGINE_FAILURES."""

    id: Id
    code: Annotated[str, msgspec.Meta(max_length=64)]
    detail: str = ""


class Fatal(msgspec.Struct, tag=True, frozen=True):
    """The engine cannot start, and starting it again would not help; the reason is for the operator."""

    reason: str


ToEngine = Submit | Cancel | Ping
FromEngine = Ready | Measured | Report | Worked | Done | Failed | Fatal

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
