"""uvicorn, with a drain: after SIGTERM, SIGINT or SIGHUP accepted requests finish, and new ones are told to go
elsewhere."""

import asyncio
import ipaddress
import logging
import signal
import socket
import sys
import time
from functools import partial
from types import FrameType

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from app.engine.fleet import Fleet
from app.http.connections import Connections
from app.http.protocol import Protocol
from app.settings import Settings

log = logging.getLogger("app.server")

LOOPBACK = "127.0.0.1"
TICK_S = 0.1  # uvicorn's
SECOND_S = 0.5  # make and a terminal both signal the group: two signals within this time are one
KEEP_ALIVE_S = 75  # above the 60 s that load balancers keep a connection, so that they close first


class Server(uvicorn.Server):
    """A uvicorn server that keeps its port open while it drains."""

    def __init__(self, app: FastAPI, settings: Settings, fleet: Fleet, admin: ASGIApp) -> None:
        self._connections = Connections(settings.max_connections, settings.send_timeout_s)
        self._speak = partial(Protocol, self._connections)
        config = partial(
            uvicorn.Config,
            http=self._speak,  # type: ignore[arg-type]
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=5,
        )
        super().__init__(config(app, host=settings.host, port=settings.port, root_path=settings.root_path))
        self._admin = config(admin, lifespan="off")
        self._admin_socket = _listen(settings.admin_port)
        self._fleet = fleet
        self._drain_s = settings.drain_s
        self._draining_since: float | None = None
        self._ticked = 0.0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, on ADMIN_PORT, too."""
        await super().startup(sockets)
        if self._admin_socket is not None and not self.should_exit:
            self._admin.load()
            state = {"server_state": self.server_state, "app_state": self.lifespan.state}
            speak = partial(self._speak, config=self._admin, **state)
            self.servers.append(await asyncio.get_running_loop().create_server(speak, sock=self._admin_socket))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; a later second signal ends at once."""
        now = time.monotonic()
        if self._draining_since is None:
            self._draining_since = now
            self._fleet.draining = True
            self.server_state.draining = True  # type: ignore[attr-defined]  # answers say that their connection closes
        elif now - self._draining_since > SECOND_S:
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn every TICK_S."""
        now = time.monotonic()
        if counter:
            self._fleet.metrics.loop_lag.observe(max(0.0, now - self._ticked - TICK_S))
        self._ticked = now
        self._connections.cut_the_slow()
        if self._fleet.fatal is not None:
            log.error(self._fleet.fatal)
            self.should_exit = True
        if self._draining_since is not None and not self.should_exit:
            waited = time.monotonic() - self._draining_since
            self.should_exit = not self._fleet.is_busy or waited > self._drain_s
        return await super().on_tick(counter)


def serve(app: FastAPI, settings: Settings, fleet: Fleet, admin: ASGIApp) -> int:
    """Serve until told to stop; returns the process's exit code. admin: what ADMIN_PORT shows."""
    _check_address(settings)
    server = Server(app, settings, fleet, admin)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup leaves it
        signal.signal(signal.SIGHUP, server.handle_exit)  # uvicorn sees to the others
    server.run()
    return 1 if fleet.fatal or not server.started else 0


def _listen(port: int | None) -> socket.socket | None:
    try:
        return None if port is None else socket.create_server((LOOPBACK, port))
    except OSError as error:
        sys.exit(f"ADMIN_PORT={port}: {error.strerror}")


def _check_address(settings: Settings) -> None:
    """Say where HOST leads, if that is nowhere, or beyond this machine."""
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        sys.exit(f"HOST={settings.host!r} is no address: {getattr(error, 'strerror', None) or error}")
    addresses = sorted({str(address[0]) for *_, address in found})
    is_local = all(ipaddress.ip_address(address.split("%")[0]).is_loopback for address in addresses)
    if not is_local and settings.api_keys_file is None:
        where = ", ".join(addresses)
        log.warning("listening beyond this machine, on %s, without API_KEYS_FILE: whoever can reach it may draw", where)
