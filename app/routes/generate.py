"""POST /generate: from a validated request to jobs, to pictures, to the answer."""

import asyncio
import base64
import hashlib
import secrets
import time
from collections.abc import Coroutine, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from starlette.concurrency import run_in_threadpool

from app import images
from app.accept import choose_format
from app.engine.client import EngineClient
from app.engine.jobs import Job
from app.engine.messages import Done
from app.problems import ClientLeft, InvalidRequest
from app.schemas import ABSENT, SEED_LIMIT, GenerateRequest, GenerateResponse, Image, ProblemBody
from app.settings import Settings
from models.catalog import CATALOG, Family, Variant

router = APIRouter()

DEFAULT_STEPS = 4
ENGINE_STAGES = ("queue", "encode", "denoise", "decode")
INLINE_PIXELS = 256 * 256

REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "model": ProblemBody}
    for status, text in {
        406: "no such representation",
        413: "the body is too large",
        415: "the body is not JSON",
        422: "a field cannot be served",
        429: "too busy to meet the deadline; Retry-After says when to come back",
        500: "no picture could be made",
        503: "starting, restarting, draining or loading",
        504: "the deadline passed",
    }.items()
}
PICTURE = {"content": {media: {} for media in images.MEDIA_TYPES.values()}, "description": "the pictures, or one bare"}


async def _engine(request: Request) -> EngineClient:
    return request.app.state.engine


async def _settings(request: Request) -> Settings:
    return request.app.state.settings


@router.post("/generate", response_model=GenerateResponse, responses={200: PICTURE, **REFUSALS})
async def generate(
    body: GenerateRequest,
    request: Request,
    engine: Annotated[EngineClient, Depends(_engine)],
    settings: Annotated[Settings, Depends(_settings)],
) -> Response:
    """Draw pictures. The answer is JSON, or the bare picture where the Accept header asks for image/* (n = 1)."""
    start = time.monotonic()
    bare = choose_format(request.headers.get("accept"), body)
    family = CATALOG[engine.require_ready().family]
    variant = _variant(body, family)
    request.state.variant = variant.name
    output_format = bare or body.output_format
    jobs = _jobs(body, family, variant, engine, start + _patience(body, settings), output_format)
    drawn = await _unless_the_client_leaves(request, engine.run(jobs, _fingerprint(request, body)))
    encoding = time.monotonic()
    files = [await _file(job, done, output_format, body.quality) for job, done in zip(jobs, drawn, strict=True)]
    engine.metrics.image_encode.observe((time.monotonic() - encoding) / len(files))
    timings = _timings(drawn, time.monotonic() - encoding, time.monotonic() - start)
    if bare:
        return _picture(files[0], bare, jobs[0], drawn[0], timings)
    return _json(request, files, jobs, drawn, timings)


def _variant(body: GenerateRequest, family: Family) -> Variant:
    """The weights a request means: by name, or the UNet of its step count. Raises InvalidRequest."""
    name = body.variant or f"{body.steps or DEFAULT_STEPS}step-unet"
    variant = family.variants.get(name)
    if variant is None:
        raise InvalidRequest(f"variant must be one of {', '.join(family.variants)}", "variant")
    if body.steps and body.steps != variant.steps:
        raise InvalidRequest(f"{name} draws in {variant.steps} steps, not {body.steps}; leave steps out", "steps")
    return variant


def _patience(body: GenerateRequest, settings: Settings) -> float:
    """Seconds until the answer is of no use. Raises InvalidRequest."""
    if body.timeout > settings.max_timeout_s:
        raise InvalidRequest(f"timeout must be at most {settings.max_timeout_s:g} s on this server", "timeout")
    return body.timeout or settings.timeout_s


def _jobs(
    body: GenerateRequest,
    family: Family,
    variant: Variant,
    engine: EngineClient,
    deadline: float,
    output_format: str,
) -> list[Job]:
    """One job a picture. Raises InvalidRequest for a size the family does not draw."""
    width, height = (int(side) for side in body.size.split("x")) if body.size else (body.width, body.height)
    width, height = width or family.size.default, height or family.size.default
    for side, pixels in (("width", width), ("height", height)):
        if refusal := family.size.refusal(side, pixels):
            raise InvalidRequest(refusal, "size" if body.size else side)
    seed = secrets.randbelow(SEED_LIMIT - body.n + 1) if body.seed == ABSENT else body.seed
    jpeg = body.quality if output_format == "jpeg" else 0
    return [
        Job(engine.new_id(), body.prompt, variant.name, variant.steps, seed + k, height, width, deadline, jpeg)
        for k in range(body.n)
    ]


async def _unless_the_client_leaves(request: Request, drawing: Coroutine[Any, Any, list[Done]]) -> list[Done]:
    """Await the drawing; when the client goes first, cancel it, which takes its jobs out of the engine."""
    work = asyncio.create_task(drawing)
    gone = asyncio.create_task(_disconnect(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            request.state.client_left = True
            raise ClientLeft("the client left before the answer")
        return work.result()
    finally:
        work.cancel()
        gone.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _fingerprint(request: Request, body: GenerateRequest) -> str:
    """The same when the same client sends the same request again: how a promise of Retry-After is recognised."""
    host = request.client.host if request.client else ""
    return hashlib.sha256(f"{host} {body.model_dump_json()}".encode()).hexdigest()


async def _file(job: Job, done: Done, output_format: str, quality: int) -> bytes:
    parameters = {
        "Steps": job.steps,
        "Sampler": "Euler",
        "Schedule type": "SGM Uniform",  # what other tools call trailing timesteps
        "CFG scale": 0,
        "Seed": job.seed,
        "Size": f"{done.width}x{done.height}",
        "Model": f"sdxl-lightning-{job.variant}",
    }
    if done.is_jpeg:
        return images.mark_jpeg(done.pixels, parameters)
    if done.width * done.height <= INLINE_PIXELS:  # 0.1 ms: less than a thread costs
        return images.encode(done.pixels, done.width, done.height, output_format, quality, parameters)
    return await run_in_threadpool(
        images.encode, done.pixels, done.width, done.height, output_format, quality, parameters
    )


def _timings(drawn: Sequence[Done], image: float, total: float) -> dict[str, float]:
    """Milliseconds by stage: the slowest picture's in the engine, then all of them to files, then everything."""
    stages = {stage: max(done.seconds.get(stage, 0.0) for done in drawn) for stage in ENGINE_STAGES}
    return {name: round(seconds * 1000, 3) for name, seconds in {**stages, "image": image, "total": total}.items()}


def _picture(file: bytes, output_format: str, job: Job, done: Done, timings: dict[str, float]) -> Response:
    headers = {
        "X-Seed": str(job.seed),
        "X-Variant": job.variant,
        "X-Prompt-Truncated": str(done.truncated).lower(),
        "Server-Timing": ", ".join(f"{stage};dur={milliseconds}" for stage, milliseconds in timings.items()),
    }
    return Response(file, media_type=images.MEDIA_TYPES[output_format], headers=headers)


def _json(
    request: Request, files: Sequence[bytes], jobs: Sequence[Job], drawn: Sequence[Done], timings: dict[str, float]
) -> Response:
    answer = GenerateResponse(
        id=request.state.request_id,
        created=int(time.time()),
        variant=jobs[0].variant,
        width=drawn[0].width,
        height=drawn[0].height,
        prompt_truncated=drawn[0].truncated,
        images=[
            Image(b64_json=base64.b64encode(file).decode(), seed=job.seed)
            for file, job in zip(files, jobs, strict=True)
        ],
        timings_ms=timings,
        batch_sizes=drawn[0].batches,
    )
    return Response(answer.model_dump_json(), media_type="application/json")
