"""POST /generate, our own API: strict, and nothing that was asked for is ignored."""

import base64
import time

from fastapi import APIRouter, Request, Response

from app import images
from app.api.accept import choose_format
from app.api.deps import PartsDep, owner_of
from app.api.draw import Drawn, draw
from app.api.problems import declare, named
from app.api.schemas import GenerateRequest, GenerateResponse, Image
from app.http.limits import DrawingRoute
from app.order import Order

router = APIRouter(route_class=DrawingRoute)

PICTURE = {"content": {media: {} for media in images.MEDIA_TYPES.values()}, "description": "the pictures, or one bare"}
REFUSALS = declare(400, 406, 408, 413, 415, 422, 429, 431, 500, 503, 504)


@router.post("/generate", response_model=GenerateResponse, responses={200: PICTURE, **REFUSALS})
async def generate(body: GenerateRequest, request: Request, parts: PartsDep) -> Response:
    """Draw pictures. The answer is JSON, or the bare picture where the Accept header asks for image/* (n = 1)."""
    bare = choose_format(", ".join(request.headers.getlist("accept")), body)
    order = _order(body, owner_of(request))
    with named(width="size", height="size") if body.size else named():
        drawn = await draw(order, bare or body.output_format, body.quality, request, parts)
    return _picture(drawn, bare) if bare else _json(request, drawn)


def _order(body: GenerateRequest, owner: str) -> Order:
    width, height = (int(side) for side in body.size.split("x")) if body.size else (body.width, body.height)
    return Order(
        owner=owner,
        prompt=body.prompt,
        variant=body.variant,
        styles=tuple((each.name, each.scale) for each in body.loras or ()),
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


def _json(request: Request, drawn: Drawn) -> Response:
    first = drawn.pictures[0]
    answer = GenerateResponse(
        id=request.state.request_id,
        created=int(time.time()),
        variant=first.job.weights.variant,
        width=first.done.width,
        height=first.done.height,
        prompt_tokens=first.done.tokens,
        prompt_truncated=drawn.prompt_truncated,
        images=[Image(b64_json=base64.b64encode(each.file).decode(), seed=each.job.seed) for each in drawn.pictures],
        timings_ms=drawn.timings_ms,
        batch_sizes=first.done.batches,
    )
    return Response(answer.model_dump_json(), media_type="application/json")
