"""The wire format of our own API: what may be asked, and what is answered. null means the same as absent."""

from typing import Annotated, Literal, Self

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictBytes,
    StrictFloat,
    StrictInt,
    StrictStr,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from app.order import MOST_STYLES, PROMPT_LIMIT, SEED_LIMIT, is_blank

OutputFormat = Literal["png", "jpeg", "webp"]
File = Annotated[  # bytes: a form's
    StrictStr | StrictBytes, WithJsonSchema({"type": "string", "contentEncoding": "base64"})
]


class Lora(BaseModel):
    """A style and how much of it."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: StrictStr = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$", description="as GET /v1/loras lists it")
    scale: StrictFloat = Field(1.0, ge=-2, le=2, description="how much of it, in steps of 0.01")


class GenerateRequest(BaseModel):
    """A picture, or up to 8 of them, from a prompt."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        json_schema_extra={"examples": [{"prompt": "a red apple on a blue background", "steps": 4, "seed": 7}]},
    )

    prompt: StrictStr = Field(min_length=1, max_length=PROMPT_LIMIT, description="what to draw")
    steps: StrictInt | None = Field(
        None,
        ge=1,
        validation_alias=AliasChoices("steps", "num_inference_steps"),
        description="1, 2, 4 or 8 (4 if absent); alone, it means the UNet variant",
        json_schema_extra={"enum": [1, 2, 4, 8, None]},
    )
    variant: StrictStr | None = Field(
        None,
        validation_alias=AliasChoices("variant", "model"),
        max_length=64,
        description="weights by name, as GET /v1/models lists them, e.g. 4step-lora",
    )
    loras: list[Lora] | None = Field(None, max_length=MOST_STYLES, description="styles on top, each named once")
    n: StrictInt = Field(1, ge=1, le=8, description="number of pictures; picture k has seed + k")
    seed: StrictInt | None = Field(None, ge=0, lt=SEED_LIMIT, description="random if absent")
    width: StrictInt | None = Field(None, ge=8, le=4096, description="pixels; the image's or the model's if absent")
    height: StrictInt | None = Field(None, ge=8, le=4096, description="pixels; the image's or the model's if absent")
    size: StrictStr | None = Field(
        None, pattern=r"^[1-9][0-9]{0,3}x[1-9][0-9]{0,3}$", description="WIDTHxHEIGHT, instead of both"
    )
    guidance_scale: StrictFloat | None = Field(
        None, ge=0, description="within the variant's range, see GET /v1/models; 0 and 1 mean without"
    )
    negative_prompt: StrictStr | None = Field(
        None, max_length=PROMPT_LIMIT, description="what to move away from, where guidance_scale is above 1"
    )
    image: File | None = Field(None, description="a PNG, JPEG or WebP of the drawn size to draw over, in base64")
    mask: File | None = Field(None, description="the same for a mask of the image: white is drawn anew, black stays")
    strength: StrictFloat | None = Field(
        None,
        gt=0,
        le=1,
        description="how much of the image is drawn over; rounded down to where the variant can begin. 0.75 if absent, "
        "with a mask 1",
    )
    output_format: OutputFormat = Field("png", description="png is lossless")
    quality: StrictInt = Field(90, ge=1, le=100, description="of jpeg and webp")
    stream: StrictBool = Field(
        False, description="server-sent events: the place in the queue, previews, and the same JSON as `result`"
    )
    timeout: StrictFloat | None = Field(
        None, gt=0, description="seconds after which the answer is of no use; 30 if absent"
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        known = {name: value for name, value in data.items() if value is not None or name not in NAMES}
        for name in known.keys() - NAMES:
            raise refusal(name.encode(errors="replace").decode(), "there is no such field")  # with lone surrogates, too
        return known

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if is_blank(self.prompt):
            raise refusal("prompt", "must have a character that can be seen")
        if self.size and (self.width or self.height):
            raise refusal("size", "cannot be given together with width or height")
        return self


NAMES = {*GenerateRequest.model_fields, "num_inference_steps", "model"}


def refusal(field: str, text: str) -> PydanticCustomError:
    """What a model's validator raises: the sentence, and the field that it is about."""
    return PydanticCustomError("refused", "{text}", {"field": field, "text": text})


class Image(BaseModel):
    """One picture."""

    b64_json: str
    seed: int
    flagged: bool = Field(False, description="by the operator's check of pictures")


class GenerateResponse(BaseModel):
    """The pictures, and how they came about. strength: the one used, where an image was drawn over. timings_ms: by
    stage, the slowest picture's. batch_sizes: rows in each denoising step of the first picture."""

    id: str
    created: int
    variant: str
    width: int
    height: int
    strength: float | None = None
    prompt_tokens: int
    prompt_truncated: bool
    images: list[Image]
    timings_ms: dict[str, float]
    batch_sizes: list[int]


class ModelCard(BaseModel):
    """A variant in OpenAI's list format, with ours beside it. steps: what may be asked for, first what is drawn where
    nothing is; None, as sampler, for the model as a whole. guidance: default, minimum and maximum; None for none.
    sizes: of both sides, pixels: default, minimum, maximum and multiple. reason: why it failed, where it did."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    steps: list[int] | None
    sampler: str | None
    guidance: dict[str, float] | None
    sizes: dict[str, int]
    state: str
    resident_bytes: int
    reason: str | None = None


class ModelList(BaseModel):
    """OpenAI's list of models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class LoraCard(BaseModel):
    """A style in OpenAI's list format: created is when its file was written, size is in bytes."""

    id: str
    object: Literal["lora"] = "lora"
    created: int
    size: int


class LoraList(BaseModel):
    """In the shape of OpenAI's list of models."""

    object: Literal["list"] = "list"
    data: list[LoraCard]


class Live(BaseModel):
    """The answer of /live."""

    status: Literal["live"]


class ReadyBody(BaseModel):
    """The answer of /ready. resident: variants whose weights are in memory. compiled: all code is at its fastest.
    engines: how many serve."""

    status: Literal["ready"]
    family: str
    device: str
    dtype: str
    resident: list[str]
    compiled: bool
    engines: int


class ProblemBody(BaseModel):
    """RFC 9457 problem+json."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    field: str | None = None
    request_id: str | None = None


class OpenAIFault(BaseModel):
    """What OpenAI's SDKs read of an error."""

    message: str
    type: str
    param: str | None
    code: str


class OpenAIError(BaseModel):
    """An error in OpenAI's shape."""

    error: OpenAIFault
