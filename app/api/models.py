"""GET /v1/models: what can be asked for, in OpenAI's shape. Nothing is loaded or unloaded over this port."""

import msgspec
from fastapi import APIRouter

from app import errors
from app.api.deps import PartsDep
from app.api.problems import declare
from app.api.schemas import ModelCard, ModelList
from app.engine.messages import VariantReport
from app.errors import Problem
from models.catalog import Family

router = APIRouter(prefix="/v1/models")

RELEASED = 1708473600  # 2024-02-21, the day SDXL-Lightning was released


@router.get("", responses=declare(503))
async def list_models(parts: PartsDep) -> ModelList:
    """Every variant, what may be asked of it, and where its weights are: resident, loading, failed or on disk."""
    family, report = parts.family, parts.fleet.report
    return ModelList(data=[_card(variant, family) for variant in (report.variants if report else [])])


@router.get("/{name}", responses=declare(404, 503))
async def get_model(name: str, parts: PartsDep) -> ModelCard:
    """One variant."""
    cards = {card.id: card for card in (await list_models(parts)).data}
    if name not in cards:
        raise Problem(errors.UNKNOWN_MODEL, f"there is no such model; there are {', '.join(cards)}", "model")
    return cards[name]


def _card(report: VariantReport, family: Family) -> ModelCard:
    variant = family.variants[report.name]
    return ModelCard(
        id=variant.name,
        created=RELEASED,
        owned_by=family.name,
        steps=list(variant.steps),
        sampler=variant.sampler,
        guidance=variant.guidance and msgspec.structs.asdict(variant.guidance),
        sizes=msgspec.structs.asdict(family.size),
        state=report.state,
        resident_bytes=report.resident_bytes,
        reason="its weights could not be loaded; the server's log says why" if report.reason else None,
    )
