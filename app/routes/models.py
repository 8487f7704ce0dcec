"""GET /v1/models: what can be asked for, in OpenAI's shape. Nothing is loaded or unloaded over this port."""

import re

from fastapi import APIRouter, Request

from app.engine.client import EngineClient
from app.engine.messages import VariantReport
from app.problems import UnknownModel
from app.schemas import ModelCard, ModelList

router = APIRouter(prefix="/v1/models")

PATH = re.compile(r"(?<![^\s'\"(])/[^\s'\")]+")  # where files lie is the operator's business, and in the log
RELEASED = 1708473600  # 2024-02-21, the day SDXL-Lightning was released


@router.get("")
async def list_models(request: Request) -> ModelList:
    """Every variant and where its weights are: resident, loading, failed or on disk."""
    engine: EngineClient = request.app.state.engine
    family = engine.require_ready().family
    report = engine.report
    return ModelList(data=[_card(variant, family) for variant in (report.variants if report else [])])


@router.get("/{name}")
async def get_model(name: str, request: Request) -> ModelCard:
    """One variant."""
    cards = (await list_models(request)).data
    for card in cards:
        if card.id == name:
            return card
    raise UnknownModel(f"there is no such model; there are {', '.join(card.id for card in cards)}", "model")


def _card(variant: VariantReport, family: str) -> ModelCard:
    return ModelCard(
        id=variant.name,
        created=RELEASED,
        owned_by=family,
        steps=variant.steps,
        state=variant.state,
        resident_bytes=variant.resident_bytes,
        reason=PATH.sub("...", variant.reason),
    )
