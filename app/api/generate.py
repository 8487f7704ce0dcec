"""POST /generate, our own API: strict, and nothing that was asked for is ignored."""

import base64
import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.sse import format_sse_event

from app import images
from app.api import sse
from app.api.accept import check_stream, choose_format
from app.api.deps import Parts, PartsDep, owner_of
from app.api.draw import Drawn, draw, finish, preview_file, watch
from app.api.problems import declare, named
from app.api.schemas import GenerateRequest, GenerateResponse, Image
from app.engine.jobs import Job
from app.engine.messages import Done, Preview
from app.engine.queue import Accepted, Waiting
from app.errors import Problem, document
from app.http.limits import DrawingRoute
from app.order import Order

router = APIRouter(route_class=DrawingRoute)

MEDIA = (*images.MEDIA_TYPES.values(), "text/event-stream")
PICTURE = {"content": {media: {} for media in MEDIA}, "description": "the pictures, or one bare, or events"}
REFUSALS = declare(400, 406, 408, 413, 415, 422, 429, 431, 500, 503, 504)


@router.post("/generate", response_model=GenerateResponse, responses={200: PICTURE, **REFUSALS})
async def generate(body: GenerateRequest, request: Request, parts: PartsDep) -> Response:
    """Draw pictures. The answer is JSON; the bare picture where the Accept header asks for image/* (n = 1); or, with
    `stream`, server-sent events: `queued` (ahead: pictures; starts_in_s), again where nothing else happens for 5 s;
    `preview` (index, seed, step, steps, width, height, b64_json) after each step but the last, the newest for who reads
    slowly; and `result`, which is the JSON, or `error`, a problem with retry_after."""
    accept = ", ".join(request.headers.getlist("accept"))
    order = _order(body, owner_of(request))
    with named(width="size", height="size") if body.size else named():
        if body.stream:
            check_stream(accept)
            return await sse.respond(request, _events(body, order, request, parts), _error)
        bare = choose_format(accept, body)
        drawn = await draw(order, bare or body.output_format, body.quality, request, parts)
    return _picture(drawn, bare) if bare else Response(_json(request, drawn), media_type="application/json")


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
    return Response(picture.file, media_type=images.MEDIA_TYPES[output_format], headers=headers)


async def _events(body: GenerateRequest, order: Order, request: Request, parts: Parts) -> AsyncGenerator[bytes]:
    start, jobs, done = time.monotonic(), dict[int, Job](), dict[int, Done]()
    async with aclosing(watch(order, request, parts)) as events:
        async for event in events:
            match event:
                case Accepted():
                    jobs = {job.id: job for job in event.jobs}
                case Waiting(ahead, seconds):
                    yield _event("queued", {"ahead": ahead, "starts_in_s": round(seconds, 3)})
                case Preview(id):
                    file = preview_file(event, body.output_format, body.quality)
                    yield _event("preview", _preview(list(jobs).index(id), jobs[id], event, file))
                case Done(id):
                    done[id] = event
    pictures = list(jobs.values()), [done[id] for id in jobs]
    drawn = await finish(order, *pictures, body.output_format, body.quality, start, parts)
    yield format_sse_event(event="result", data_str=_json(request, drawn))


def _preview(index: int, job: Job, preview: Preview, file: bytes) -> dict[str, Any]:
    return {
        "index": index,
        "seed": job.seed,
        "step": preview.step,
        "steps": job.steps,
        "width": preview.width,
        "height": preview.height,
        "b64_json": base64.b64encode(file).decode(),
    }


def _error(problem: Problem) -> bytes:
    return _event("error", {**document(problem), "retry_after": problem.retry_after})


def _event(name: str, data: dict[str, Any]) -> bytes:
    return format_sse_event(event=name, data_str=json.dumps(data))


def _json(request: Request, drawn: Drawn) -> str:
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
    return answer.model_dump_json()
