"""What the APIs that others defined have in common: they are tolerant, where ours is strict."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from app import errors
from app.api.deps import Parts
from app.api.schemas import refusal
from app.errors import Problem
from app.http.limits import DrawingRoute
from app.order import SEED_LIMIT, is_blank
from app.settings import ANY_STEPS

LONGEST_PROMPT = 32_000  # characters, as OpenAI has it; what is not read is cut
MOST_PICTURES = 10  # of one request, as OpenAI has it


class CompatRoute(DrawingRoute):
    """A route that draws, with room for OpenAI's 32,000 characters of prompt: 384,000 bytes, fully escaped."""

    body_limit = 512 << 10


class Tolerant(BaseModel):
    """A request whose unknown fields are ignored, and where null means the same as absent."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: object) -> object:
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data


def _visible(prompt: str) -> str:
    if is_blank(prompt):
        raise refusal("prompt", "must have a character that can be seen")
    return prompt


Prompt = Annotated[str, Field(max_length=LONGEST_PROMPT), AfterValidator(_visible)]
Seed = Annotated[int, Field(lt=SEED_LIMIT)]


def variant_of(model: str | None, parts: Parts) -> str | None:
    """The variant that a model's name means, None where it follows from the steps. Raises Problem where there is no
    such model."""
    name = parts.settings.aliases.get(model or ANY_STEPS, model or ANY_STEPS)
    if name == ANY_STEPS:
        return None
    known = parts.family.variants
    if name not in known:
        detail = f"there is no model of this name; there are {', '.join((ANY_STEPS, *known))}"
        raise Problem(errors.UNKNOWN_MODEL, detail, "model")
    return name
