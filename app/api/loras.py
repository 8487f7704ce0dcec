"""GET /v1/loras: the styles that can be asked for."""

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool

from app.api.deps import PartsDep
from app.api.problems import declare
from app.api.schemas import LoraCard, LoraList

router = APIRouter()


@router.get("/v1/loras", responses=declare(503))
async def list_loras(parts: PartsDep) -> LoraList:
    """Every style in LORA_DIR. Whether its file can be used is seen when it is first asked for."""
    found = await run_in_threadpool(parts.styles.all, parts.family)
    return LoraList(data=[LoraCard(id=each.name, created=int(each.modified), size=each.size) for each in found])
