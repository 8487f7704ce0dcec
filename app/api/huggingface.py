"""POST /, as the clients of Hugging Face's inference endpoints send it to the URL that they are given."""

from fastapi import APIRouter, Request, Response
from pydantic import Field, model_validator

from app.api.compat import LONGEST_PROMPT, Prompt, Seed, Tolerant, read_images
from app.api.deps import PartsDep
from app.api.draw import draw
from app.api.problems import declare, named
from app.api.schemas import File
from app.http.ledger import owner_of
from app.http.limits import PictureRoute
from app.images import MEDIA_TYPES
from app.order import Order

router = APIRouter(route_class=PictureRoute)

PICTURE = {"content": {media: {} for media in MEDIA_TYPES.values()}, "description": "the picture"}


class Inputs(Tolerant):
    """{"inputs": prompt, "parameters": {...}}, as one. Where the parameters have a prompt, inputs is a picture to draw
    over, in base64."""

    inputs: Prompt
    image: File | None = None
    strength: float | None = Field(None, gt=0, le=1)
    width: int | None = Field(None, ge=8, le=4096)
    height: int | None = Field(None, ge=8, le=4096)
    num_inference_steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = Field(None, ge=0)
    negative_prompt: str | None = Field(None, max_length=LONGEST_PROMPT)
    seed: Seed | None = Field(None, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _flat(cls, data: object) -> object:
        parameters = data.get("parameters") if isinstance(data, dict) else None
        if not isinstance(data, dict) or not isinstance(parameters, dict):
            return data
        inputs, prompt, size = data.get("inputs"), parameters.get("prompt"), parameters.get("target_size")
        over = {"inputs": inputs, "image": None} if prompt is None else {"inputs": prompt, "image": inputs}
        return {**parameters, **(size if isinstance(size, dict) else {}), **over}


@router.post("/", response_class=Response, responses={200: PICTURE, **declare(408, 413, 415, 422, 429, 500, 504)})
async def infer(body: Inputs, request: Request, parts: PartsDep) -> Response:
    """Draw one picture, or over one; the answer is the file: PNG, or JPEG or WebP where the Accept header names it."""
    accept = request.headers.get("accept", "")
    output_format = next((name for name, media in MEDIA_TYPES.items() if media in accept), "png")
    with named(steps="num_inference_steps", image="inputs"):
        image, _ = await read_images(body.image, None, (body.width, body.height), parts)
        order = Order(
            owner=owner_of(request),
            prompt=body.inputs,
            negative_prompt=body.negative_prompt or None,
            guidance=body.guidance_scale,
            steps=body.num_inference_steps,
            seed=body.seed,
            width=body.width,
            height=body.height,
            fit=parts.settings.size_policy == "nearest",
            image=image,
            strength=body.strength,
        )
        (picture,) = (await draw(order, output_format, 90, request, parts)).pictures
    headers = {"X-Seed": str(picture.job.seed), "X-Variant": picture.job.weights.variant}
    return Response(picture.file, media_type=MEDIA_TYPES[output_format], headers=headers)
