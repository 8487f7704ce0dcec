"""Connections: how many may be open, how long an answer may wait to be read, and who makes way where room is short."""

import asyncio
import logging
import resource
import sys
import time
from contextlib import suppress
from resource import RLIMIT_NOFILE as NOFILE

OURS = 32  # descriptors that are not for connections: 24 with those that the engine's start may need, and some to spare
EACH = 2  # descriptors: a connection may be sending a file
STALLED_S = 5.0  # an answer that has waited this long for its reader makes way for others, where room is short

log = logging.getLogger("app.server")


class Connections:
    """All of one server, as transports. limit: open at once. answer_s: how long an answer may wait for its client to
    read it, seconds.

    A connection that would be one too many closes another one: the longest idle, or the one that has stalled longest.
    """

    def __init__(self, limit: int, answer_s: float) -> None:
        self.limit, self.answer_s = _affordable(limit), answer_s
        self._open: set[asyncio.BaseTransport] = set()
        # Both in order: the first has been there for longest.
        self._idle: dict[asyncio.Transport, None] = {}
        self._unread: dict[asyncio.Transport, float] = {}

    def opened(self, transport: asyncio.Transport) -> bool:
        """Take in a connection that has no request yet. False where there is no room for it."""
        self._open.add(transport)
        has_room = len(self._open) <= self.limit or self._make_room()
        self.idle(transport)
        return has_room

    def closed(self, transport: asyncio.Transport) -> None:
        """It has gone."""
        self._open.discard(transport)
        self._idle.pop(transport, None)
        self._unread.pop(transport, None)

    def idle(self, transport: asyncio.Transport) -> None:
        """It has no request."""
        self._idle[transport] = None

    def busy(self, transport: asyncio.Transport) -> None:
        """A request arrives on it."""
        self._idle.pop(transport, None)

    def unread(self, transport: asyncio.Transport) -> None:
        """Its client does not read as fast as we write."""
        self._unread.setdefault(transport, time.monotonic())

    def read(self, transport: asyncio.Transport) -> None:
        """Its client has read."""
        self._unread.pop(transport, None)

    def cut_the_slow(self) -> None:
        """End those whose answer has waited for too long."""
        while self._cut_slowest(self.answer_s):
            log.info("an answer was not read within %g s: its connection is closed", self.answer_s)

    def _make_room(self) -> bool:
        if (transport := next(iter(self._idle), None)) is None:
            return self._cut_slowest(STALLED_S)
        self.closed(transport)
        transport.abort()
        return True

    def _cut_slowest(self, seconds: float) -> bool:
        transport, since = next(iter(self._unread.items()), (None, 0.0))
        if transport is None or time.monotonic() - since < seconds:
            return False
        self.closed(transport)
        transport.abort()
        return True


def _affordable(limit: int) -> int:
    """So many connections, or as many as there are descriptors for, when we have asked for enough."""
    soft, hard = (sys.maxsize if each == resource.RLIM_INFINITY else each for each in resource.getrlimit(NOFILE))
    wanted = min(OURS + EACH * limit, hard)
    if soft < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(NOFILE, (wanted, resource.getrlimit(NOFILE)[1]))
            soft = wanted
    if (affordable := max(1, (soft - OURS) // EACH)) < limit:
        log.warning("ulimit -n allows %d descriptors: at most %d connections", soft, affordable)
    return min(limit, affordable)
