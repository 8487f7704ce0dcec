"""The server as a Ray Serve application: the whole of it in every replica, one replica per machine.

`make serve-ray` starts two replicas on this machine. deploy/ray.yaml is what `serve deploy` takes, and deploy/ray.env
what a cluster's nodes need in their environment. Ray's HAProxy balances by the number of requests; what a replica's
engines do is the server's own business (docs/fleet.md).
"""

import asyncio
import logging
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI
from ray import serve
from ray.serve.config import AutoscalingContext
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import logs
from app.api.deps import parts_of
from app.engine.fleet import Fleet
from app.main import create_admin, create_app
from app.settings import Settings

REACHABLE_S = 35  # for so long Ray keeps a replica that it stops in reach (30 s and 5 of its own), before it waits
LOOK_S = 0.05  # between two looks at the engines
TELL_S = 0.2  # for the answers to those who waited for an engine that died, before the replica goes
SHARE = 3  # a replica that has work for TIMEOUT_S / 3 has as much as it should
LOAD = "load"
LIMITS = ("QUEUE_LIMIT", "MAX_CONNECTIONS", "DRAIN_S", "TIMEOUT_S", "MAX_TIMEOUT_S")
MOST_ENGINES = 64

log = logging.getLogger("app.ray")


@serve.deployment
@serve.ingress()
class Server:
    """One replica. settings: of the server, by their names; what is absent comes from the environment. metrics_port:
    where this replica's /metrics is, since behind the balancer it would be any replica's."""

    def __init__(self, settings: dict[str, Any], metrics_port: int | None) -> None:
        self.settings = Settings(**{name.lower(): value for name, value in settings.items()})
        logs.set_up(self.settings.log_level)
        self.metrics_port = metrics_port

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        """What Ray serves, once its lifespan has begun."""
        app = create_app(self.settings)
        self.parts = parts_of({"app": app})
        begin = app.router.lifespan_context

        @asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[None]:
            async with begin(app):
                await until_ready(self.parts.fleet)  # Ray sends requests from here on
                tasks = [asyncio.create_task(leave_with_the_engines(self.parts.fleet))]
                if self.metrics_port is not None:
                    tasks.append(asyncio.create_task(self._show_metrics(self.metrics_port)))
                yield
                for task in tasks:
                    task.cancel()

        app.router.lifespan_context = lifespan
        return without_request_id(app)

    async def check_health(self) -> None:
        """Raises while no engine answers; after three times Ray replaces the replica."""
        fleet = self.parts.fleet
        if not fleet.is_ready:
            raise RuntimeError(fleet.fatal or "no engine answers")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """The work that is queued here, as a share of what one replica should have: seconds per engine that serves."""
        work = self.parts.fleet.work_seconds().values()
        return {LOAD: SHARE * sum(work) / len(work) / self.settings.timeout_s if work else 0.0}

    async def _show_metrics(self, port: int) -> None:
        config = uvicorn.Config(create_admin(self.parts), "0.0.0.0", port, lifespan="off", log_config=None)  # noqa: S104
        await uvicorn.Server(config).serve()


async def until_ready(fleet: Fleet) -> None:
    """Wait for the first engine. Raises RuntimeError where none can ever start."""
    while not fleet.is_ready:
        if fleet.fatal is not None:
            raise RuntimeError(fleet.fatal)
        await asyncio.sleep(LOOK_S)


async def leave_with_the_engines(fleet: Fleet) -> None:
    """End this process when its last engine has died: it would answer at once, with a 503, and the shortest queue draws
    every request. Who waits is told first; Ray starts another replica."""
    while True:
        await asyncio.sleep(LOOK_S)
        if fleet.report is None:  # of no engine: none serves
            break
    log.critical("the last engine died; the replica ends")
    await asyncio.sleep(TELL_S)
    logs.leave(1)


def without_request_id(app: ASGIApp) -> ASGIApp:
    """Ray writes X-Request-Id into each answer, the same that it gave to the app: it would be there twice."""

    async def serve_one(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_less(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [pair for pair in message["headers"] if pair[0].lower() != b"x-request-id"]
            await send(message)

        await app(scope, receive, send_less)

    return serve_one


def replicas_for(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """How many replicas the queued work would keep busy. Ray keeps to min_replicas, max_replicas and its delays."""
    loads = (context.aggregated_metrics or {}).get(LOAD, {})
    return math.ceil(sum(loads.values())), {}


def app(args: dict[str, Any]) -> serve.Application:
    """The application. args: settings of the server by their names, and metrics_port, which only one replica per
    machine can have. How many replicas there are, and what each needs, is Ray's configuration."""
    settings = dict(args)
    metrics_port = settings.pop("metrics_port", None)
    # Only what is needed here: this machine may have no GPU, nor the files that others name.
    ours = Settings(**{name.lower(): settings[name] for name in LIMITS if name in settings})
    return Server.options(
        # Above what our own admission takes, so that nobody is refused by Ray, which cannot tell when to come back.
        max_ongoing_requests=MOST_ENGINES * ours.queue_limit + ours.max_connections,
        graceful_shutdown_timeout_s=ours.drain_s + REACHABLE_S,
    ).bind(settings, metrics_port)
