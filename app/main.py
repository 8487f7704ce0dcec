"""The application: its parts, its APIs, and the engine's life around them. Imports no torch."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.routing import APIRoute
from fastapi_offline import FastAPIOffline
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from app.api import a1111, deps, generate, health, huggingface, loras, models, openai, page, problems
from app.api.deps import Parts
from app.check import Check, load
from app.engine.fleet import Fleet
from app.http import limits
from app.http.keys import Guard, Ring, refusal
from app.http.ledger import Ledger
from app.http.origins import ANY, EXPOSED, Origins, names
from app.lists import listed
from app.marking import Signer
from app.metrics import Metrics
from app.settings import Settings
from app.traces import Tracing, make_tracer
from models.styles import Styles

MIB = 2**20
DESCRIPTION = "Few-step text-to-image generation with SDXL-Lightning (arXiv 2402.13929)."


def create_app(settings: Settings) -> FastAPI:
    """The ASGI application. Its lifespan starts the engine process and stops it."""
    metrics = Metrics()
    fleet = Fleet(settings.engine_configs(), settings.queue_limit, metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        fleet.start()
        yield
        await fleet.stop()

    app: FastAPI = FastAPIOffline(
        title="sdxl-lightning-server",
        description=DESCRIPTION,
        version=version("sdxl-lightning-server"),
        lifespan=lifespan,
        redoc_url=None,
        responses=problems.declare(401, 403),
        redirect_slashes=False,  # a redirected POST would lose the proxy's path, and its body with some clients
        generate_unique_id_function=_plain_name,
    )

    def glance(timeout: float | None, who: str) -> None:
        fleet.glance(settings.timeout_s if timeout is None else timeout, who)

    styles = Styles(settings.lora_dir)
    signer, check = _signer(settings, metrics), _check(settings, metrics)
    parts = Parts(fleet, settings, metrics, settings.families, styles, signer, check)
    open_to_all = [page.router, health.router] + ([] if settings.admin_port else [health.metrics_router])
    drawing = (generate.router, openai.router, models.router, loras.router, a1111.router, huggingface.router)
    _furnish(app, parts, [*drawing, *open_to_all])
    body, bodies = (int(mib * MIB) for mib in (settings.max_body_mib, settings.max_bodies_mib))
    limits.install(app, limits.Room(body, bodies, settings.min_upload_kb_s * 1000))
    # The last one added is the first that a request meets.
    if settings.api_keys_file is not None:
        ring, public = Ring(settings.api_keys_file, metrics), _create_public(parts, open_to_all)
        app.add_middleware(Guard, ring=ring, public=public, metrics=metrics)
    origins = listed(settings.allowed_origins)
    app.add_middleware(Origins, render=problems.respond, hosts=names(settings), origins=origins)
    app.add_middleware(Ledger, metrics=metrics, render=problems.respond, glance=glance)
    if (tracer := make_tracer()) is not None:
        app.add_middleware(Tracing, tracer=tracer)
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=("GET", "POST"),
            allow_headers=(ANY,),
            expose_headers=EXPOSED,
        )
    return app


def _signer(settings: Settings, metrics: Metrics) -> Signer | None:
    if settings.c2pa_cert is None or settings.c2pa_key is None:
        return None
    signer = Signer(settings.c2pa_cert, settings.c2pa_key)
    metrics.certificate_expiry.set(signer.expires.timestamp())
    signer.warn()
    return signer


def _check(settings: Settings, metrics: Metrics) -> Check | None:
    if settings.check is None:
        return None
    return Check(load(settings.check), settings.check_timeout_s, settings.check_fails == "open", metrics)


def create_admin(parts: Parts) -> ASGIApp:
    """What ADMIN_PORT shows."""
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    _furnish(app, parts, [health.router, health.metrics_router])
    return Ledger(Origins(app, problems.respond, hosts=[]), parts.metrics, problems.respond)


def _create_public(parts: Parts, routers: Sequence[APIRouter]) -> FastAPI:
    """What is answered without a key. What is not here is a 401, whatever it would be with one."""
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    _furnish(app, parts, routers)
    for status in (404, 405):
        app.add_exception_handler(status, _unauthorised)
    return app


def _furnish(app: FastAPI, parts: Parts, routers: Sequence[APIRouter]) -> None:
    deps.install(app, parts)
    for router in routers:
        app.include_router(router)
    problems.install(app)


async def _unauthorised(request: Request, _: Exception) -> Response:
    response = problems.respond(request, refusal(request.headers))
    response.headers["WWW-Authenticate"] = "Bearer"  # not Basic, too: a browser would ask for a password
    return response


def _plain_name(route: APIRoute) -> str:
    return route.name
