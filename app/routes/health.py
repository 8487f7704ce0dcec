"""/live, /ready and /metrics."""

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import JSONResponse, Response

from app.engine.client import EngineClient
from app.problems import NotReady

router = APIRouter()


@router.get("/live")
async def live() -> dict[str, str]:
    """200 while this process answers; restart it when it does not."""
    return {"status": "live"}


@router.get("/ready", responses={503: {"description": "starting, restarting or draining"}})
async def ready(request: Request) -> JSONResponse:
    """200 while a request would be served: the engine answered within the last seconds. Send traffic only then."""
    engine: EngineClient = request.app.state.engine
    ready = engine.require_ready()
    if not engine.is_ready or engine.report is None:
        raise NotReady("the engine has not answered lately; ask again", retry_after=5)
    resident = [variant.name for variant in engine.report.variants if variant.state == "resident"]
    return JSONResponse(
        {
            "status": "ready",
            "family": ready.family,
            "device": ready.device,
            "dtype": ready.dtype,
            "resident": resident,
            "compiled": engine.report.compiled,
        }
    )


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus metrics."""
    engine: EngineClient = request.app.state.engine
    engine.gauge()
    return Response(generate_latest(engine.metrics.registry), media_type=CONTENT_TYPE_LATEST)
