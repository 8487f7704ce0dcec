"""GET /v1/models: what can be asked for, in OpenAI's shape. Nothing is loaded or unloaded over this port."""

from fastapi import APIRouter

from app import errors
from app.api.deps import FleetDep, PartsDep
from app.api.problems import OPENAI_ERROR, declare
from app.api.schemas import ModelCard, ModelList
from app.engine.messages import VariantReport
from app.errors import Problem
from app.settings import ANY_STEPS

router = APIRouter(prefix="/v1/models")

RELEASED = 1708473600  # 2024-02-21, the day SDXL-Lightning was released


@router.get("", responses=declare(503, shape=OPENAI_ERROR))
async def list_models(fleet: FleetDep) -> ModelList:
    """The model as a whole, whose variant follows from the steps, then every variant and where its weights are:
    resident, loading, failed or on disk."""
    family, report = fleet.require_ready().family, fleet.report
    cards = [_card(variant, family) for variant in (report.variants if report else [])]
    held = sum(card.resident_bytes for card in cards)
    state = "resident" if held else "on disk"
    whole = ModelCard(id=ANY_STEPS, created=RELEASED, owned_by=family, steps=None, state=state, resident_bytes=held)
    return ModelList(data=[whole, *cards])


@router.get("/{name}", responses=declare(404, 503, shape=OPENAI_ERROR))
async def get_model(name: str, parts: PartsDep) -> ModelCard:
    """One model, by its name or an alias."""
    cards = {card.id: card for card in (await list_models(parts.fleet)).data}
    name = parts.settings.aliases.get(name, name)
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
