"""GET /v1/models: what can be asked for, in OpenAI's shape. Nothing is loaded or unloaded over this port."""

import msgspec
from fastapi import APIRouter

from app import errors
from app.api.deps import PartsDep
from app.api.problems import OPENAI_ERROR, declare
from app.api.schemas import ModelCard, ModelList
from app.engine.messages import VariantReport
from app.errors import Problem
from app.settings import ANY_STEPS
from models.catalog import Family

router = APIRouter(prefix="/v1/models")

RELEASED = 1708473600  # 2024-02-21, the day SDXL-Lightning was released


@router.get("", responses=declare(503, shape=OPENAI_ERROR))
async def list_models(parts: PartsDep) -> ModelList:
    """The model as a whole, whose variant follows from the steps, then every variant: what may be asked of it, and
    where its weights are: resident, loading, failed or on disk."""
    family, report = parts.family, parts.fleet.report
    reports = report.variants if report else []
    held = sum(each.resident_bytes for each in reports)
    whole = VariantReport(ANY_STEPS, "resident" if held else "on disk", held)
    return ModelList(data=[_card(each, family) for each in (whole, *reports)])


@router.get("/{name}", responses=declare(404, 503, shape=OPENAI_ERROR))
async def get_model(name: str, parts: PartsDep) -> ModelCard:
    """One model, by its name or an alias."""
    cards = {card.id: card for card in (await list_models(parts)).data}
    name = parts.settings.aliases.get(name, name)
    if name not in cards:
        raise Problem(errors.UNKNOWN_MODEL, f"there is no such model; there are {', '.join(cards)}", "model")
    return cards[name]


def _card(report: VariantReport, family: Family) -> ModelCard:
    variant = family.variants.get(report.name)
    return ModelCard(
        id=report.name,
        created=RELEASED,
        owned_by=family.name,
        steps=list(variant.steps) if variant else None,
        sampler=variant.sampler if variant else None,
        guidance=msgspec.structs.asdict(variant.guidance) if variant and variant.guidance else None,
        sizes=msgspec.structs.asdict(family.size),
        state=report.state,
        resident_bytes=report.resident_bytes,
        reason="its weights could not be loaded; the server's log says why" if report.reason else None,
    )
