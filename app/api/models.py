"""GET /v1/models: what can be asked for, in OpenAI's shape. Nothing is loaded or unloaded over this port."""

from fastapi import APIRouter

from app import errors
from app.api.deps import FleetDep
from app.api.problems import declare
from app.api.schemas import ModelCard, ModelList
from app.engine.messages import VariantReport
from app.errors import Problem

router = APIRouter(prefix="/v1/models")

RELEASED = 1708473600  # 2024-02-21, the day SDXL-Lightning was released


@router.get("", responses=declare(503))
async def list_models(fleet: FleetDep) -> ModelList:
    """Every variant and where its weights are: resident, loading, failed or on disk."""
    family, report = fleet.require_ready().family, fleet.report
    return ModelList(data=[_card(variant, family) for variant in (report.variants if report else [])])


@router.get("/{name}", responses=declare(404, 503))
async def get_model(name: str, fleet: FleetDep) -> ModelCard:
    """One variant."""
    cards = {card.id: card for card in (await list_models(fleet)).data}
    if name not in cards:
        raise Problem(errors.UNKNOWN_MODEL, f"there is no such model; there are {', '.join(cards)}", "model")
    return cards[name]


def _card(variant: VariantReport, family: str) -> ModelCard:
    return ModelCard(
        id=variant.name,
        created=RELEASED,
        owned_by=family,
        steps=variant.steps,
        state=variant.state,
        resident_bytes=variant.resident_bytes,
        reason="its weights could not be loaded; the server's log says why" if variant.reason else None,
    )
