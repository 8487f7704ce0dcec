"""Typed access to what main.py assembled. Nothing else reads the application's state."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, FastAPI, Request
from starlette.types import Scope

from app.engine.fleet import Fleet
from app.metrics import Metrics
from app.settings import Settings
from models.catalog import Family


@dataclass(frozen=True)
class Parts:
    """What one server is made of. families: all that it could serve."""

    fleet: Fleet
    settings: Settings
    metrics: Metrics
    families: dict[str, Family]

    @property
    def family(self) -> Family:
        """What it serves. Raises Problem while it does not."""
        return self.families[self.fleet.require_ready().family]


def install(app: FastAPI, parts: Parts) -> None:
    """Give an application its parts."""
    app.state.parts = parts


def parts_of(scope: Scope) -> Parts:
    """The parts of the server that a request came to."""
    parts: Parts = scope["app"].state.parts
    return parts


async def _parts(request: Request) -> Parts:
    return parts_of(request.scope)


async def _fleet(request: Request) -> Fleet:
    return parts_of(request.scope).fleet


PartsDep = Annotated[Parts, Depends(_parts)]
FleetDep = Annotated[Fleet, Depends(_fleet)]
