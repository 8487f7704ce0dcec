"""/live, /ready (and /health), and /metrics, which may have a port of its own."""

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import Response

from app import errors
from app.api.deps import FleetDep
from app.api.problems import declare
from app.api.schemas import Live, ReadyBody
from app.errors import Problem

router = APIRouter()
metrics_router = APIRouter()


@router.get("/live")
async def live() -> Live:
    """200 while this process answers; restart it when it does not."""
    return Live(status="live")


@router.get("/health", responses=declare(503), operation_id="health")
@router.get("/ready", responses=declare(503))
async def ready(fleet: FleetDep) -> ReadyBody:
    """200 while a request would be served: the engine answered within the last seconds. Send traffic only then."""
    ready, report = fleet.require_ready(), fleet.report
    if not fleet.is_ready or report is None:
        raise Problem(errors.SILENT)
    return ReadyBody(
        status="ready",
        family=ready.family,
        device=ready.device,
        dtype=ready.dtype,
        resident=[variant.name for variant in report.variants if variant.state == "resident"],
        compiled=report.compiled,
        engines=fleet.serving,
    )


@metrics_router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(fleet: FleetDep) -> Response:
    """Prometheus metrics."""
    fleet.gauge()
    return Response(generate_latest(fleet.metrics.registry), media_type=CONTENT_TYPE_LATEST)
