"""Typed access to what main.py assembled. Nothing else reads the application's state."""

from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, FastAPI, Request
from starlette.types import Scope

from app.engine.fleet import Fleet
from app.keys import Key
from app.metrics import Metrics
from app.settings import Settings


@dataclass(frozen=True)
class Parts:
    """What one server is made of. chosen: what a client of an API chose for all requests to it."""

    fleet: Fleet
    settings: Settings
    metrics: Metrics
    chosen: dict[str, str] = field(default_factory=dict)


def install(app: FastAPI, parts: Parts) -> None:
    """Give an application its parts."""
    app.state.parts = parts


def parts_of(scope: Scope) -> Parts:
    """The parts of the server that a request came to."""
    parts: Parts = scope["app"].state.parts
    return parts


def owner_of(request: Request) -> str:
    """Who asks: the name of a key, or an address."""
    key: Key | None = request.scope["state"].get("key")
    if key is not None:
        return key.name
    return request.client.host if request.client else ""


async def _parts(request: Request) -> Parts:
    return parts_of(request.scope)


async def _fleet(request: Request) -> Fleet:
    return parts_of(request.scope).fleet


PartsDep = Annotated[Parts, Depends(_parts)]
FleetDep = Annotated[Fleet, Depends(_fleet)]
