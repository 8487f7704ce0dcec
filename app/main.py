"""The application: routes, middleware, and the engine's life around them. Imports no torch."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline

from app import problems
from app.engine.client import EngineClient
from app.metrics import Metrics
from app.middleware import Front
from app.routes import generate, health, models
from app.settings import Settings

DESCRIPTION = "Few-step text-to-image generation with SDXL-Lightning (arXiv 2402.13929)."


def create_app(settings: Settings) -> FastAPI:
    """The ASGI application. Its lifespan starts the engine process and stops it."""
    metrics = Metrics()
    engine = EngineClient(settings.engine_config(), settings.queue_limit, metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await engine.start()
        yield
        await engine.stop()

    app = FastAPIOffline(
        title="sdxl-lightning-server",
        description=DESCRIPTION,
        version=version("sdxl-lightning-server"),
        lifespan=lifespan,
        redoc_url=None,
    )
    app.state.engine, app.state.settings = engine, settings
    for routes in (generate, health, models):
        app.include_router(routes.router)
    problems.install(app)
    app.add_middleware(Front, metrics=metrics)
    return app
