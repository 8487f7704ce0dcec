"""What an Accept header asks for: JSON, or a bare picture in one of our formats."""

from app import errors
from app.api.schemas import GenerateRequest
from app.errors import Problem
from app.images import MEDIA_TYPES

JSON = ("application/json", "application/*", "*/*")


def choose_format(accept: str | None, body: GenerateRequest) -> str | None:
    """The format of a bare picture, or None for JSON. Raises Problem (RFC 9110, 12.5.1)."""
    wanted = _parse(accept or "*/*")
    json_quality = max((wanted.get(media, 0.0) for media in JSON), default=0.0)
    pictures = {name: wanted.get(media, wanted.get("image/*", 0.0)) for name, media in MEDIA_TYPES.items()}
    best = max(pictures.values())
    explicit_json = wanted.get("application/json", 0.0)
    wants_format = "output_format" in body.model_fields_set and pictures[body.output_format] < best
    if best <= 0 or best < explicit_json or (json_quality > 0 and (body.n > 1 or wants_format)):
        if json_quality <= 0:
            raise Problem(errors.NOT_ACCEPTABLE, "ask for application/json or image/*", "accept")
        return None
    if body.n > 1:
        raise Problem(errors.NOT_ACCEPTABLE, "a bare picture needs n = 1; ask for application/json to get several", "n")
    if wants_format:
        detail = f"the Accept header excludes output_format {body.output_format!r}"
        raise Problem(errors.NOT_ACCEPTABLE, detail, "output_format")
    if pictures[body.output_format] == best:
        return body.output_format
    return next(name for name, quality in pictures.items() if quality == best)


def check_stream(accept: str | None) -> None:
    """Raises Problem where events are not what may be answered. JSON may stand for them: `stream` asks for them."""
    wanted = _parse(accept or "*/*")
    if not any(wanted.get(media, 0.0) > 0 for media in ("text/event-stream", "text/*", *JSON)):
        raise Problem(errors.NOT_ACCEPTABLE, "a stream is text/event-stream: accept it, or leave stream out", "stream")


def _parse(accept: str) -> dict[str, float]:
    """Media ranges by name with their quality, 0 to 1; what cannot be read counts as quality 0."""
    ranges = {}
    for part in accept.split(","):
        media, *parameters = (piece.strip().lower() for piece in part.split(";"))
        quality = next((value[2:] for value in parameters if value.startswith("q=")), "1")
        try:
            ranges[media] = min(1.0, max(0.0, float(quality)))
        except ValueError:
            ranges[media] = 0.0
    return ranges
