"""POST /generate, our own API: strict, and nothing that was asked for is ignored."""

import time

import msgspec
from fastapi import APIRouter, Request, Response

from app import images
from app.api.accept import choose_format
from app.api.deps import PartsDep, owner_of
from app.api.draw import Drawn, as_base64, as_json, draw
from app.api.problems import declare, named
from app.api.schemas import GenerateRequest, GenerateResponse
from app.http.limits import DrawingRoute
from app.order import Order


class Deadline(msgspec.Struct):
    """All that is read of a request while there is no place for it."""

    timeout: float | None = None


class StrictRoute(DrawingRoute):
    """A route whose requests may name their deadline."""

    def timeout(self, body: bytes) -> float | None:
        """By a millionth of a second's work."""
        try:
            return msgspec.json.decode(body, type=Deadline).timeout
        except msgspec.DecodeError:
            return None


router = APIRouter(route_class=StrictRoute)

PICTURE = {"content": {media: {} for media in images.MEDIA_TYPES.values()}, "description": "the pictures, or one bare"}
REFUSALS = declare(400, 406, 408, 413, 415, 422, 429, 431, 500, 503, 504)


@router.post("/generate", response_model=GenerateResponse, responses={200: PICTURE, **REFUSALS})
async def generate(body: GenerateRequest, request: Request, parts: PartsDep) -> Response:
    """Draw pictures. The answer is JSON, or the bare picture where the Accept header asks for image/* (n = 1)."""
    bare = choose_format(", ".join(request.headers.getlist("accept")), body)
    order = _order(body, owner_of(request))
    with named(width="size", height="size") if body.size else named():
        drawn = await draw(order, bare or body.output_format, body.quality, request, parts)
    if bare:
        return _picture(drawn, bare)
    return await _json(request, drawn)


def _order(body: GenerateRequest, owner: str) -> Order:
    width, height = (int(side) for side in body.size.split("x")) if body.size else (body.width, body.height)
    return Order(
        owner=owner,
        prompt=body.prompt,
        variant=body.variant,
        negative_prompt=body.negative_prompt,
        guidance=body.guidance_scale,
        steps=body.steps,
        seed=body.seed,
        n=body.n,
        width=width,
        height=height,
        timeout=body.timeout,
    )


def _picture(drawn: Drawn, output_format: str) -> Response:
    (picture,) = drawn.pictures
    headers = {
        "X-Seed": str(picture.job.seed),
        "X-Variant": picture.job.weights.variant,
        "X-Prompt-Tokens": str(picture.done.tokens),
        "X-Prompt-Truncated": str(picture.done.truncated).lower(),
        "Server-Timing": ", ".join(f"{stage};dur={milliseconds}" for stage, milliseconds in drawn.timings_ms.items()),
    }
    return Response(picture.file, media_type=images.MEDIA_TYPES[output_format], headers=headers)


async def _json(request: Request, drawn: Drawn) -> Response:
    first = drawn.pictures[0]
    answer = GenerateResponse(
        id=request.state.request_id,
        created=int(time.time()),
        variant=first.job.weights.variant,
        width=first.done.width,
        height=first.done.height,
        prompt_tokens=first.done.tokens,
        prompt_truncated=drawn.prompt_truncated,
        images=[],
        timings_ms=drawn.timings_ms,
        batch_sizes=first.done.batches,
    )
    files = await as_base64([each.file for each in drawn.pictures])
    pictures = [{"b64_json": file, "seed": each.job.seed} for file, each in zip(files, drawn.pictures, strict=True)]
    return as_json({**answer.model_dump(), "images": pictures})
