"""The application: its parts, its APIs, and the engine's life around them. Imports no torch."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from fastapi.routing import APIRoute
from fastapi_offline import FastAPIOffline

from app.api import a1111, deps, generate, health, huggingface, models, openai, page, problems
from app.engine.fleet import Fleet
from app.http.ledger import Ledger
from app.metrics import Metrics
from app.settings import Settings

DESCRIPTION = "Few-step text-to-image generation with SDXL-Lightning (arXiv 2402.13929)."


def create_app(settings: Settings) -> FastAPI:
    """The ASGI application. Its lifespan starts the engine process and stops it."""
    metrics = Metrics()
    fleet = Fleet(settings.engine_config(), settings.queue_limit, metrics)

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
        redirect_slashes=False,  # a redirected POST would lose the proxy's path, and its body with some clients
        generate_unique_id_function=_plain_name,
    )
    deps.install(app, deps.Parts(fleet, settings, metrics))
    for api in (generate, openai, models, a1111, huggingface, page, health):
        app.include_router(api.router)
    problems.install(app)

    def glance(timeout: float | None, who: str) -> None:
        fleet.glance(settings.timeout_s if timeout is None else timeout, who)

    app.add_middleware(Ledger, metrics=metrics, render=problems.respond, glance=glance)
    return app


def _plain_name(route: APIRoute) -> str:
    return route.name
