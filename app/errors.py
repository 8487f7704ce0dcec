"""Every refusal and fault, in one table. Pure: each API renders a Problem in its own shape (app.api.problems)."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Cause:
    """Why a request was not served.

    status: of HTTP. code: for programs. outcome: how the metrics count it. title: what happened. advice: what the
    client can do. detail: the sentence, where there is no better one. field: the field at fault. retry_after: seconds.
    """

    status: int
    code: str
    outcome: str
    title: str
    advice: str
    detail: str = ""
    field: str | None = None
    retry_after: int | None = None


MEDIA_TYPE = "application/problem+json"  # RFC 9457
AGAIN = "send it again after Retry-After seconds"

BAD_REQUEST = Cause(400, "bad_request", "invalid", "Bad Request", "send a valid HTTP/1.1 request")
NO_KEY = Cause(
    *(401, "missing_api_key", "invalid", "A key is needed", "send the header Authorization: Bearer KEY"),
    detail="this server draws only for those who have a key: send the header Authorization: Bearer KEY",
)
UNKNOWN_KEY = Cause(
    *(401, "invalid_api_key", "invalid", "Unknown key", "send a key of this server"),
    detail="this server does not know the key that the Authorization header shows",
)
UNKNOWN_HOST = Cause(403, "unknown_host", "invalid", "Not this server's name", "ask its operator for ALLOWED_HOSTS")
FOREIGN_ORIGIN = Cause(
    403, "foreign_origin", "invalid", "Not a page of this server", "ask its operator for ALLOWED_ORIGINS"
)
NOT_FOUND = Cause(404, "not_found", "invalid", "Not Found", "see GET /docs for what there is")
UNKNOWN_MODEL = Cause(404, "unknown_model", "invalid", "No such model", "take a name from GET /v1/models")
NOT_LOADED = Cause(
    *(404, "not_loaded", "invalid", "Not loaded here", "take a name that is resident in GET /v1/models"),
    field="variant",
)
METHOD_NOT_ALLOWED = Cause(405, "method_not_allowed", "invalid", "Method Not Allowed", "use a method that Allow names")
NOT_ACCEPTABLE = Cause(406, "not_acceptable", "invalid", "No such representation", "accept JSON or image/*")
TOO_SLOW = Cause(408, "too_slow", "invalid", "Request Timeout", "send the whole request at once")
BODY_TOO_LARGE = Cause(413, "body_too_large", "invalid", "Content Too Large", "send a smaller body")
UNSUPPORTED = Cause(415, "unsupported_media_type", "invalid", "Unsupported Media Type", "send JSON, not encoded")
INVALID = Cause(422, "invalid_request", "invalid", "The request cannot be served as it is", "fix the named field")
PICTURE_REFUSED = Cause(
    *(422, "picture_refused", "invalid", "The picture is not sent", "ask for something else, or with another seed"),
    detail="this server's check of pictures refused what was drawn",
)
OVERLOADED = Cause(429, "overloaded", "refused", "Too busy to meet the deadline", AGAIN)
RATE_LIMITED = Cause(429, "rate_limited", "refused", "Too many requests of this key", AGAIN)
HEADER_TOO_LARGE = Cause(431, "header_too_large", "invalid", "Request Header Fields Too Large", "send smaller headers")
CLIENT_LEFT = Cause(499, "client_left", "dropped", "The client left", "nobody reads this answer")
INTERNAL = Cause(
    *(500, "internal_error", "failed", "The server failed", "report it with the request's id"),
    detail="an unexpected fault; see the server's log",
)
FAILED = Cause(
    *(500, "generation_failed", "failed", "No picture could be made", "try another seed"),
    detail="the model failed on this request; its neighbours were not affected",
)
NUMERIC_FAULT = Cause(
    *(500, "generation_failed", "failed", "No picture could be made", "try another seed"),
    detail="the model drew an undefined or blank picture; try another seed",
)
UNSIGNED = Cause(
    *(500, "signing_failed", "failed", "The picture could not be signed", "report it with the request's id"),
    detail="this server sends no picture without its signature, and could not sign this one",
)
CHECK_FAILED = Cause(
    *(500, "check_failed", "failed", "The picture could not be checked", "report it with the request's id"),
    detail="this server sends no picture that was not checked, and its check failed",
)
STARTING = Cause(
    503, "not_ready", "refused", "Not ready", AGAIN, detail="the engine is starting; ask again", retry_after=5
)
DRAINING = Cause(
    *(503, "not_ready", "refused", "Not ready", "ask another instance"),
    detail="the server is shutting down; ask another instance",
    retry_after=5,
)
CROWDED = Cause(
    *(503, "too_many_connections", "refused", "Too many connections", AGAIN),
    detail="the server has as many connections as it may have; use one for several requests",
    retry_after=1,
)
SILENT = Cause(
    *(503, "not_ready", "refused", "Not ready", AGAIN),
    detail="the engine has not answered lately; ask again",
    retry_after=5,
)
BODIES = Cause(
    *(503, "too_many_bodies", "refused", "Too many large requests at once", AGAIN),
    detail="the large requests that are being served take all the memory that is set aside for them",
    retry_after=5,
)
LOADING = Cause(
    503, "not_ready", "refused", "Not ready", AGAIN, detail="the variant is being loaded; ask again", retry_after=5
)
ENGINE_DIED = Cause(
    *(503, "engine_died", "failed", "The engine restarted", AGAIN),
    detail="the engine ended while it held this request",
    retry_after=5,
)
DEADLY = Cause(
    *(500, "generation_failed", "failed", "No picture could be made", "ask for another picture"),
    detail="two engines in a row ended while they drew this picture",
)
UNAVAILABLE = Cause(
    *(503, "unavailable", "failed", "The variant cannot be served now", "ask for another variant"),
    detail="this variant's weights could not be loaded; see GET /v1/models",
    field="variant",
    retry_after=30,
)
BAD_STYLE = Cause(
    *(422, "bad_style", "invalid", "The style cannot be used", "ask for another style, or for none"),
    detail="the file of a style cannot be used",
    field="loras",
)
STYLE_GONE = Cause(
    *(503, "unavailable", "failed", "The style was replaced", AGAIN),
    detail="the file of a style was replaced or removed while it was read; ask again",
    field="loras",
    retry_after=1,
)
OUT_OF_MEMORY = Cause(
    *(503, "unavailable", "failed", "The picture cannot be drawn here", "ask for a smaller picture"),
    detail="the device has too little memory for this picture; ask for a smaller one",
    field="size",
    retry_after=30,
)
EXPIRED = Cause(
    *(504, "deadline_exceeded", "expired", "The deadline passed", "ask again, or with a longer timeout"),
    detail="the deadline passed before the picture was done; ask again, or with a longer timeout",
    field="timeout",
)

CAUSES = {name: each for name, each in list(globals().items()) if isinstance(each, Cause)}  # the engine sends the names


class Problem(Exception):
    """A request that is not served. detail: one clear sentence. field: the field at fault. retry_after: seconds."""

    def __init__(
        self, cause: Cause, detail: str | None = None, field: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(detail or cause.detail)
        self.cause = cause
        self.detail = detail or cause.detail
        self.field = field or cause.field
        self.retry_after = retry_after or cause.retry_after


def document(problem: Problem, request_id: str | None = None) -> dict[str, Any]:
    """A problem as RFC 9457 has it, with our code, field and request_id beside its own members."""
    cause = problem.cause
    body: dict[str, Any] = {"type": "about:blank", "title": cause.title, "status": cause.status, "code": cause.code}
    body["detail"] = _utf8(problem.detail)
    if problem.field is not None:
        body["field"] = _utf8(problem.field)
    if request_id is not None:
        body["request_id"] = request_id
    return body


def _utf8(text: str) -> str:
    """The same text with what UTF-8 cannot say replaced: a field's name may hold lone surrogates."""
    return text.encode(errors="replace").decode()


def of_status(status: int) -> Cause:
    """The cause that a bare HTTP status means, as the web framework raises it."""
    return next((cause for cause in CAUSES.values() if cause.status == status), INTERNAL if status >= 500 else INVALID)
