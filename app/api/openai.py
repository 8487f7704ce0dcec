"""POST /v1/images/generations and /v1/images/edits, as OpenAI's SDKs and those who follow them send it.

What they send as a matter of course is taken; what would be another picture is refused by name.
"""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, ClassVar, Literal

import msgspec
from fastapi import APIRouter, Request, Response
from fastapi.sse import KEEPALIVE_COMMENT
from pydantic import AliasChoices, Field, model_validator

from app.api import sse
from app.api.compat import (
    LONGEST_PROMPT,
    MOST_PICTURES,
    CompatRoute,
    Prompt,
    Seed,
    Tolerant,
    read_images,
    variant_of,
)
from app.api.deps import Parts, PartsDep
from app.api.draw import as_base64, as_json, draw, flag, make_file, preview_file, watch
from app.api.problems import OPENAI_ERROR, declare, named, openai_error
from app.api.schemas import File, Lora, OutputFormat, refusal
from app.engine.jobs import Job
from app.engine.messages import Done, Preview
from app.engine.queue import Accepted, Waiting
from app.errors import Problem
from app.http.ledger import owner_of
from app.http.limits import PictureRoute
from app.images import MEDIA_TYPES
from app.order import MOST_STYLES, Order
from app.uploads import transparent_is_white
from models.catalog import Variant

router = APIRouter(prefix="/v1/images", route_class=CompatRoute)
editing = APIRouter(route_class=PictureRoute)

STEPS = {"low": 2, "medium": 4, "high": 8, "standard": 4, "auto": 4, "hd": 8, "xhigh": 8, "max": 8}
QUALITY = {1: "low", 2: "low", 4: "medium"}  # of the answer, by steps; more are high
NAMES = {"variant": "model", "steps": "num_inference_steps", "width": "size", "height": "size"}
IMPOSSIBLE = {
    "markup": "is not read: send a mask",
    "svg": "cannot be made: pictures are made of pixels",
}
REFUSALS = declare(400, 404, 408, 413, 415, 429, 500, 503, 504, shape=OPENAI_ERROR)
EVENTS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
EDITS_FORM = {"content": {"multipart/form-data": {"schema": {"$ref": "#/components/schemas/EditsRequest"}}}}


class ImagesRequest(Tolerant):
    """OpenAI's fields, and those of the few-step servers beside them: seed, num_inference_steps, guidance_scale,
    negative_prompt, loras."""

    event: ClassVar = "image_generation"
    impossible: ClassVar = {**IMPOSSIBLE, **dict.fromkeys(("image", "mask"), "belongs to /v1/images/edits")}

    prompt: Prompt
    model: str | None = None
    n: int = Field(1, ge=1, le=MOST_PICTURES)
    size: str = Field("auto", pattern=r"^(auto|[1-9][0-9]{0,3}x[1-9][0-9]{0,3})$")
    quality: Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] = "auto"
    background: Literal["auto", "opaque"] = "auto"
    output_format: OutputFormat = "png"
    output_compression: int = Field(90, ge=0, le=100)
    response_format: Literal["b64_json", "url"] = Field("b64_json", description="url: a data: URL")
    stream: bool = False
    partial_images: int = Field(0, ge=0, le=3)
    seed: Seed | None = Field(None, ge=0)
    num_inference_steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = Field(None, ge=0)
    negative_prompt: str | None = Field(None, max_length=LONGEST_PROMPT)
    loras: list[Lora] = Field([], max_length=MOST_STYLES)

    @model_validator(mode="before")
    @classmethod
    def _possible(cls, data: object) -> object:
        if isinstance(data, dict) and (field := next((name for name in cls.impossible if data.get(name)), None)):
            raise refusal(field, cls.impossible[field])
        return data

    async def order(self, owner: str, parts: Parts) -> Order:
        """What is asked for. Raises Problem where there is no such model."""
        variant = variant_of(self.model, parts)
        steps = self.num_inference_steps
        if steps is None and variant is None and parts.family.choose(None, STEPS[self.quality]):
            steps = STEPS[self.quality]  # else the family's default
        width, height = (None, None) if self.size == "auto" else map(int, self.size.split("x"))
        return Order(
            owner=owner,
            prompt=self.prompt,
            variant=variant,
            styles=tuple((each.name, each.scale) for each in self.loras),
            negative_prompt=self.negative_prompt or None,
            guidance=self.guidance_scale,
            steps=steps,
            seed=self.seed,
            n=self.n,
            width=width,
            height=height,
            fit=parts.settings.size_policy == "nearest",
            previews=self.stream and self.partial_images > 0,
            **await self.over((width, height), parts),
        )

    async def over(self, size: tuple[int | None, int | None], parts: Parts) -> dict[str, Any]:
        """What is drawn over, as fields of an Order."""
        return {}


class EditsRequest(ImagesRequest):
    """A form, or JSON with base64. Of several pictures none is drawn over. strength is ours, as in /generate."""

    event: ClassVar = "image_edit"
    impossible: ClassVar = IMPOSSIBLE

    image: File = Field(validation_alias=AliasChoices("image", "image[]"))
    mask: File | None = None
    strength: float | None = Field(None, gt=0, le=1)

    async def over(self, size: tuple[int | None, int | None], parts: Parts) -> dict[str, Any]:
        """The picture, and the mask, whose transparent pixels are drawn anew."""
        image, mask = await read_images(self.image, self.mask, size, parts, transparent_is_white)
        return {"image": image, "mask": mask, "strength": self.strength}


@router.post("/generations", response_model=None, responses={**EVENTS, **REFUSALS})
async def generate_images(body: ImagesRequest, request: Request, parts: PartsDep) -> Response:
    """Draw pictures, as OpenAI's API has it: JSON, or server-sent events where stream is true."""
    return await _answer(body, request, parts)


@editing.post(
    "/edits", response_model=None, responses={**EVENTS, **REFUSALS}, openapi_extra={"requestBody": EDITS_FORM}
)
async def edit_images(body: EditsRequest, request: Request, parts: PartsDep) -> Response:
    """Draw over a picture, where its mask is transparent, or all of it."""
    return await _answer(body, request, parts)


router.include_router(editing)


async def _answer(body: ImagesRequest, request: Request, parts: Parts) -> Response:
    request.state.seeded = body.seed is not None
    with named(**NAMES):
        order = await body.order(owner_of(request), parts)
        if body.stream:
            return await sse.respond(request, _events(body, order, request, parts), _error)
        drawn = await draw(order, body.output_format, body.output_compression or 1, request, parts)
    pictures = await _pictures(body, [picture.file for picture in drawn.pictures])
    first = drawn.pictures[0]
    answer = {
        "created": int(time.time()),
        "data": [
            {**each, "seed": picture.job.seed, **flag(picture.done)}
            for each, picture in zip(pictures, drawn.pictures, strict=True)
        ],
        **_about(body, first.job, first.done),
        "model": first.job.weights.variant,
        "prompt_truncated": drawn.prompt_truncated,
    }
    return as_json(answer)


async def _events(body: ImagesRequest, order: Order, request: Request, parts: Parts) -> AsyncGenerator[bytes]:
    """The pictures as events, each as soon as it is done, behind its partial images."""
    jobs: dict[int, Job] = {}
    async with aclosing(watch(order, request, parts)) as events:
        async for event in events:
            match event:
                case Accepted():
                    jobs = {job.id: job for job in event.jobs}
                case Waiting():
                    yield KEEPALIVE_COMMENT
                case Preview(id, step) if (index := _index(step, len(jobs[id].path), body.partial_images)) is not None:
                    yield await _partial(body, jobs[id], index, event, parts)
                case Done(id):
                    variant = request.state.family.variants[jobs[id].weights.variant]
                    yield await _completed(body, variant, jobs[id], event, parts)


def _index(step: int, steps: int, wanted: int) -> int | None:
    """Which of the wanted partial images a step makes, from 0; None for none. They are spread over the steps."""
    before, behind = ((each * (wanted + 1)) // steps for each in (step - 1, step))
    return before if behind > before else None


async def _partial(body: ImagesRequest, job: Job, index: int, preview: Preview, parts: Parts) -> bytes:
    file = await preview_file(preview, body.output_format, body.output_compression or 1, parts)
    (picture,) = await _pictures(body, [file])
    about = {
        "partial_image_index": index,
        "created_at": int(time.time()),
        **_shape(body, job, preview),
        "seed": job.seed,
    }
    return sse.event(f"{body.event}.partial_image", {"type": f"{body.event}.partial_image", **picture, **about})


async def _completed(body: ImagesRequest, variant: Variant, job: Job, done: Done, parts: Parts) -> bytes:
    file = await make_file(variant, job, done, body.output_format, body.output_compression or 1, parts)
    (picture,) = await _pictures(body, [file])
    about = {"created_at": int(time.time()), **_about(body, job, done), "seed": job.seed, **flag(done)}
    return sse.event(f"{body.event}.completed", {"type": f"{body.event}.completed", **picture, **about})


def _error(problem: Problem) -> bytes:
    return sse.event("error", openai_error(problem))


async def _pictures(body: ImagesRequest, files: list[bytes]) -> list[dict[str, msgspec.Raw]]:
    prefix = f"data:{MEDIA_TYPES[body.output_format]};base64," if body.response_format == "url" else ""
    return [{body.response_format: text} for text in await as_base64(files, prefix)]


def _about(body: ImagesRequest, job: Job, done: Done) -> dict[str, Any]:
    """What OpenAI's answers and events say of a picture. Nothing is counted as output: pictures are no tokens here."""
    tokens = {"image_tokens": 0, "text_tokens": done.tokens}
    return {
        **_shape(body, job, done),
        "usage": {
            "input_tokens": done.tokens,
            "input_tokens_details": tokens,
            "output_tokens": 0,
            "total_tokens": done.tokens,
        },
    }


def _shape(body: ImagesRequest, job: Job, picture: Done | Preview) -> dict[str, str]:
    """What a picture is, drawn or partial."""
    return {
        "background": "opaque",
        "output_format": body.output_format,
        "quality": QUALITY.get(job.steps, "high"),
        "size": f"{picture.width}x{picture.height}",
    }
