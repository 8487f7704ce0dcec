"""Typed access to what main.py assembled. Nothing else reads the application's state, but
app.http.limits what it keeps there itself."""

from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, FastAPI, Request
from starlette.types import Scope

from app.check import Check
from app.engine.fleet import Fleet
from app.marking import Signer
from app.metrics import Metrics
from app.settings import Settings
from models.catalog import Family
from models.styles import Styles


@dataclass(frozen=True)
class Parts:
    """What one server is made of. families: all that it could serve. signer, check: of pictures, where there are such.
    chosen: what a client of an API chose for all requests to it."""

    fleet: Fleet
    settings: Settings
    metrics: Metrics
    families: dict[str, Family]
    styles: Styles
    signer: Signer | None = None
    check: Check | None = None
    chosen: dict[str, str] = field(default_factory=dict)

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
