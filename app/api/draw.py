"""From an Order to pictures, for every API: run it, leave with its client, and make files of what was drawn."""

import asyncio
import time
from binascii import b2a_base64
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from app import errors, images, uploads
from app.api.deps import Parts
from app.engine.jobs import Job
from app.engine.messages import Done, Preview
from app.engine.queue import Accepted, Event
from app.errors import Problem
from app.marking import Signer
from app.order import PROMPT_LIMIT, Limits, Order, resolve
from app.traces import Trace
from models.catalog import Family, Variant

ENGINE_STAGES = ("queue", "encode", "denoise", "decode")
INLINE_PIXELS = 256 * 256
INLINE_BYTES = 256 << 10  # as base64: 0.2 ms

T = TypeVar("T")


@dataclass(frozen=True)
class Picture:
    """One picture file and what drew it."""

    file: bytes
    variant: Variant
    job: Job
    done: Done


@dataclass(frozen=True)
class Drawn:
    """An order's pictures. prompt_truncated: its end was not read. timings_ms: by stage, the slowest picture's in the
    engine, then all to files, then all."""

    pictures: list[Picture]
    prompt_truncated: bool
    timings_ms: dict[str, float]


async def draw(order: Order, output_format: str, quality: int, request: Request, parts: Parts) -> Drawn:
    """Draw an order and make its files. Raises Problem; when the client leaves first, its jobs leave the engine."""
    start = time.monotonic()
    jobs, done = await _unless_the_client_leaves(request, _drawn(order, request, parts))
    return await finish(order, jobs, done, output_format, quality, start, request, parts)


async def finish(
    order: Order,
    jobs: Sequence[Job],
    done: Sequence[Done],
    output_format: str,
    quality: int,
    start: float,
    request: Request,
    parts: Parts,
) -> Drawn:
    """Make the files of what was drawn. start: when the order came, on the monotonic clock."""
    encoding = time.monotonic()
    family: Family = request.state.family  # as it was then: by now we may drain
    variant = family.variants[jobs[0].weights.variant]
    files = [await make_file(variant, *each, output_format, quality, parts) for each in zip(jobs, done, strict=True)]
    end = time.monotonic()
    parts.metrics.image_encode.observe((end - encoding) / len(files))
    trace: Trace | None = getattr(request.state, "trace", None)
    if trace is not None:
        trace.pictures(done)
        trace.add("file", encoding, end - encoding)
    pictures = [Picture(file, variant, job, each) for file, job, each in zip(files, jobs, done, strict=True)]
    is_cut = done[0].truncated or len(order.prompt) > PROMPT_LIMIT
    return Drawn(pictures, is_cut, _timings(done, end - encoding, end - start))


async def watch(order: Order, request: Request, parts: Parts, wants_steps: bool = True) -> AsyncGenerator[Event]:
    """What becomes of an order: Accepted; Waiting and Stepped where that is wanted; Preview where the order wants it;
    and Done for each picture. Raises Problem. Close this iterator to take the jobs out of the engine."""
    settings = parts.settings
    limits = Limits(settings.timeout_s, settings.max_timeout_s, settings.max_pixels)
    family, now = parts.family, time.monotonic()
    request.state.family = family
    styles = await run_in_threadpool(parts.styles.find, dict(order.styles), family) if order.styles else {}
    jobs = resolve(order, family, limits, now, styles)
    request.state.variant = jobs[0].weights.variant
    if not settings.load_on_demand:
        _require_resident(jobs[0].weights.variant, parts)
    trace: Trace | None = getattr(request.state, "trace", None)
    if trace is not None:
        jobs = [msgspec.structs.replace(job, trace=trace.traceparent) for job in jobs]
    if parts.check is not None:
        jobs = [msgspec.structs.replace(job, previews=False) for job in jobs]  # nobody checks those
    async with aclosing(parts.fleet.watch(jobs, request.state.who, wants_steps, order.source)) as events:
        async for event in events:
            yield await _checked(event, order, request, parts) if isinstance(event, Done) else event


async def _checked(done: Done, order: Order, request: Request, parts: Parts) -> Done:
    """What was drawn with what the order keeps of its image, and what the operator's check says of that. Raises Problem
    where it is not sent."""
    if order.image is not None and order.mask is not None:
        pixels = await run_in_threadpool(uploads.keep, done.pixels, order.image, order.mask)
        done = msgspec.structs.replace(done, pixels=pixels)
    if parts.check is not None:
        flagged = await parts.check.is_flagged(done.pixels, done.width, done.height, order.prompt)
        request.state.flagged = flagged or getattr(request.state, "flagged", False)
        done = msgspec.structs.replace(done, flagged=flagged)
    return done


def _require_resident(variant: str, parts: Parts) -> None:
    report = parts.fleet.report
    resident = [each.name for each in report.variants if each.state == "resident"] if report else []
    if variant not in resident:
        detail = f"{variant} is not loaded, and nothing is loaded on demand here; loaded: {', '.join(resident)}"
        raise Problem(errors.NOT_LOADED, detail)


async def as_base64(files: Sequence[bytes], prefix: str = "") -> list[msgspec.Raw]:
    """Each file as a JSON string. Off the event loop where they are large, so that nobody else waits for it."""

    def encode() -> list[msgspec.Raw]:
        start = f'"{prefix}'.encode()
        return [msgspec.Raw(b'%b%b"' % (start, b2a_base64(file, newline=False))) for file in files]

    return encode() if sum(map(len, files)) < INLINE_BYTES else await run_in_threadpool(encode)


def as_json(content: Any) -> Response:
    """An answer that is encoded once; it may hold what as_base64() gives."""
    return Response(msgspec.json.encode(content), media_type="application/json")


async def _drawn(order: Order, request: Request, parts: Parts) -> tuple[tuple[Job, ...], list[Done]]:
    """An order's jobs, and what the engine drew for each."""
    jobs: tuple[Job, ...] = ()
    done: dict[int, Done] = {}
    async with aclosing(watch(order, request, parts, wants_steps=False)) as events:
        async for event in events:
            match event:
                case Accepted():
                    jobs = event.jobs
                case Done(id):
                    done[id] = event
    return jobs, [done[job.id] for job in jobs]


async def _unless_the_client_leaves(request: Request, drawing: Coroutine[Any, Any, T]) -> T:
    """Await the drawing; when the client goes first, cancel it, which takes its jobs out of the engine."""
    work = asyncio.create_task(drawing)
    gone = asyncio.create_task(_disconnect(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            request.state.client_left = True
            raise Problem(errors.CLIENT_LEFT)
        return work.result()
    finally:
        work.cancel()
        gone.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def parameters(variant: Variant, job: Job, done: Done) -> dict[str, Any]:
    """What drew a picture, in the words of other tools."""
    found = {
        "Steps": job.steps,
        "Sampler": images.SAMPLERS[variant.sampler],
        "Schedule type": images.SCHEDULES[variant.sigmas or variant.spacing],
        "CFG scale": job.guidance if job.guidance > 1 else 0,
        "Seed": job.seed,
        "Size": f"{done.width}x{done.height}",
        "Model": f"sdxl-lightning-{job.weights.variant}",
        **images.styles(job.weights),
    }
    if job.strength is not None:
        found["Denoising strength"] = job.strength
    return found


async def make_file(variant: Variant, job: Job, done: Done, output_format: str, quality: int, parts: Parts) -> bytes:
    """A picture file of what was drawn. Raises Problem where it cannot be signed."""
    picture = (done.pixels, done.width, done.height, output_format, quality, parameters(variant, job, done))
    return await _file(picture, parts.signer)


async def preview_file(preview: Preview, output_format: str, quality: int, parts: Parts) -> bytes:
    """A picture file of a preview, marked as every other."""
    told = {"Preview": f"step {preview.step}"}
    picture = (preview.pixels, preview.width, preview.height, output_format, quality, told)
    return await _file(picture, parts.signer)


async def _file(picture: tuple[bytes, int, int, str, int, dict[str, Any]], signer: Signer | None) -> bytes:
    _, width, height, output_format, *_ = picture

    def make() -> bytes:
        file = images.encode(*picture)
        return file if signer is None else signer.sign(file, images.MEDIA_TYPES[output_format])

    if signer is None and width * height <= INLINE_PIXELS:  # 0.1 ms: less than a thread costs
        return make()
    return await run_in_threadpool(make)


def flag(done: Done) -> dict[str, bool]:
    """What a JSON answer says of a picture that the operator's check flagged."""
    return {"flagged": True} if done.flagged else {}


def _timings(done: Sequence[Done], image: float, total: float) -> dict[str, float]:
    stages = {stage: max(each.seconds.get(stage, 0.0) for each in done) for stage in ENGINE_STAGES}
    return {name: round(seconds * 1000, 3) for name, seconds in {**stages, "image": image, "total": total}.items()}
