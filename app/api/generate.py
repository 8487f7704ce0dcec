"""POST /generate, our own API: strict, and nothing that was asked for is ignored."""

import math
import time
from binascii import b2a_base64
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from app import images, uploads
from app.api import sse
from app.api.accept import check_stream, choose_format
from app.api.deps import Parts, PartsDep
from app.api.draw import Drawn, as_base64, draw, finish, flag, preview_file, watch
from app.api.problems import declare, named
from app.api.schemas import GenerateRequest, GenerateResponse
from app.engine.jobs import Job
from app.engine.messages import Done, Preview
from app.engine.queue import Accepted, Waiting
from app.errors import Problem, document
from app.http.ledger import owner_of
from app.http.limits import PictureRoute
from app.order import Order
from app.uploads import Bitmap


class Deadline(msgspec.Struct):
    """All that is read of a request while there is no place for it."""

    timeout: float | None = None


class StrictRoute(PictureRoute):
    """A route whose requests may name their deadline."""

    def timeout(self, body: bytes | None) -> float | None:
        """By a millionth of a second's work; for ever where it is not known yet."""
        if body is None:
            return math.inf
        try:
            return msgspec.json.decode(body, type=Deadline).timeout
        except msgspec.DecodeError:
            return None


router = APIRouter(route_class=StrictRoute)

MEDIA = (*images.MEDIA_TYPES.values(), "text/event-stream")
PICTURE = {"content": {media: {} for media in MEDIA}, "description": "the pictures, or one bare, or events"}
REFUSALS = declare(400, 406, 408, 413, 415, 422, 429, 431, 500, 503, 504)


FORM = {"content": {"multipart/form-data": {"schema": {"$ref": "#/components/schemas/GenerateRequest"}}}}


@router.post(
    "/generate",
    response_model=GenerateResponse,
    responses={200: PICTURE, **REFUSALS},
    openapi_extra={"requestBody": FORM},
)
async def generate(body: GenerateRequest, request: Request, parts: PartsDep) -> Response:
    """Draw pictures. The answer is JSON; the bare picture where the Accept header asks for image/* (n = 1); or, with
    `stream`, server-sent events: `queued` (ahead: pictures; starts_in_s), again where nothing else happens for 5 s;
    `preview` (index, seed, step, steps, width, height, b64_json) after each step but the last, the newest for who reads
    slowly; and `result`, which is the JSON, or `error`, a problem with retry_after."""
    accept = ", ".join(request.headers.getlist("accept"))
    image, mask = await uploads.read(body.image, body.mask)
    order = _order(body, owner_of(request), image, mask)
    with named(width="size", height="size") if body.size else named():
        if body.stream:
            check_stream(accept)
            return await sse.respond(request, _events(body, order, request, parts), _error)
        bare = choose_format(accept, body)
        drawn = await draw(order, bare or body.output_format, body.quality, request, parts)
    if bare:
        return _picture(drawn, bare)
    return Response(await _json(request, drawn), media_type="application/json")


def _order(body: GenerateRequest, owner: str, image: Bitmap | None, mask: Bitmap | None) -> Order:
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
        image=image,
        mask=mask,
        strength=body.strength,
        previews=body.stream,
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
    if picture.job.strength is not None:
        headers["X-Strength"] = f"{picture.job.strength:g}"
    return Response(picture.file, media_type=images.MEDIA_TYPES[output_format], headers=headers)


async def _events(body: GenerateRequest, order: Order, request: Request, parts: Parts) -> AsyncGenerator[bytes]:
    start, jobs, done = time.monotonic(), dict[int, Job](), dict[int, Done]()
    async with aclosing(watch(order, request, parts)) as events:
        async for event in events:
            match event:
                case Accepted():
                    jobs = {job.id: job for job in event.jobs}
                case Waiting(ahead, seconds):
                    yield sse.event("queued", {"ahead": ahead, "starts_in_s": round(seconds, 3)})
                case Preview(id):
                    file = await preview_file(event, body.output_format, body.quality, parts)
                    yield sse.event("preview", _preview(list(jobs).index(id), jobs[id], event, file))
                case Done(id):
                    done[id] = event
    drawn = await finish(
        order, list(jobs.values()), [done[id] for id in jobs], body.output_format, body.quality, start, request, parts
    )
    yield sse.event("result", msgspec.Raw(await _json(request, drawn)))


def _preview(index: int, job: Job, preview: Preview, file: bytes) -> dict[str, Any]:
    return {
        "index": index,
        "seed": job.seed,
        "step": preview.step,
        "steps": job.steps,
        "width": preview.width,
        "height": preview.height,
        "b64_json": b2a_base64(file, newline=False).decode(),
    }


def _error(problem: Problem) -> bytes:
    return sse.event("error", {**document(problem), "retry_after": problem.retry_after})


async def _json(request: Request, drawn: Drawn) -> bytes:
    first = drawn.pictures[0]
    answer = GenerateResponse(
        id=request.state.request_id,
        created=int(time.time()),
        variant=first.job.weights.variant,
        width=first.done.width,
        height=first.done.height,
        strength=first.job.strength,
        prompt_tokens=first.done.tokens,
        prompt_truncated=drawn.prompt_truncated,
        images=[],
        timings_ms=drawn.timings_ms,
        batch_sizes=first.done.batches,
    )
    files = await as_base64([each.file for each in drawn.pictures])
    pictures = [
        {"b64_json": file, "seed": each.job.seed, **flag(each.done)}
        for file, each in zip(files, drawn.pictures, strict=True)
    ]
    encoded: bytes = msgspec.json.encode({**answer.model_dump(exclude_none=True), "images": pictures})
    return encoded
