"""Every refusal and fault as RFC 9457 problem+json: what came, what is possible, what to do. One class a cause."""

from http import HTTPStatus
from typing import ClassVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

CODES = {
    404: "not_found",
    405: "method_not_allowed",
    408: "too_slow",
    413: "body_too_large",
    415: "unsupported_media_type",
}


class Problem(Exception):
    """A cause with its HTTP status. detail: one clear sentence. field: the name of the field at fault.
    retry_after: whole seconds."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    title: ClassVar[str] = "The server failed"

    def __init__(self, detail: str, field: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(detail)
        self.detail, self.field, self.retry_after = detail, field, retry_after


class InvalidRequest(Problem):
    """A field that cannot be served."""

    status, code, title = 422, "invalid_request", "The request cannot be served as it is"


class UnknownModel(Problem):
    """A model's name that the catalog does not have."""

    status, code, title = 404, "unknown_model", "No such model"


class NotAcceptable(Problem):
    """The Accept header asks for what this request cannot give."""

    status, code, title = 406, "not_acceptable", "No such representation"


class Overloaded(Problem):
    """Refused at the door: the queue is full, or too long for the deadline."""

    status, code, title = 429, "overloaded", "Too busy to meet the deadline"


class NotReady(Problem):
    """The engine is starting, restarting, draining, or loading the variant."""

    status, code, title = 503, "not_ready", "Not ready"


class EngineDied(Problem):
    """The engine process ended while it held this request."""

    status, code, title = 503, "engine_died", "The engine restarted"


class Unavailable(Problem):
    """The variant's weights are missing or broken, or the picture does not fit into memory."""

    status, code, title = 503, "unavailable", "The variant cannot be served now"


class Expired(Problem):
    """The deadline passed."""

    status, code, title = 504, "deadline_exceeded", "The deadline passed"


class ClientLeft(Problem):
    """Nobody reads this answer."""

    status, code, title = 499, "client_left", "The client left"


class Faulty(Problem):
    """The model failed on this request, or drew a blank."""

    status, code, title = 500, "generation_failed", "No picture could be made"


def expired() -> Expired:
    """The deadline passed, wherever that was noticed."""
    return Expired("the deadline passed before the picture was done; ask again, or with a longer timeout", "timeout")


def from_engine(code: str, detail: str) -> Problem:
    """The problem behind an engine's Failed message. Paths and traces stay in the log; names of variants may pass."""
    match code:
        case "expired":
            return expired()
        case "loading":
            return NotReady(f"{detail} is being loaded; ask again", retry_after=5)
        case "variant_unavailable":
            return Unavailable("this variant's weights could not be loaded; see GET /v1/models", "variant", 30)
        case "out_of_memory":
            return Unavailable("the device has too little memory for this picture; ask for a smaller one", "size", 30)
        case "numeric_fault":
            return Faulty("the model drew an undefined or blank picture; try another seed")
        case _:
            return Faulty("the model failed on this request; its neighbours were not affected")


def install(app: FastAPI) -> None:
    """Turn every exception a request can meet into a problem."""
    app.add_exception_handler(Problem, _problem)
    app.add_exception_handler(RequestValidationError, _validation)
    app.add_exception_handler(HTTPException, _http)


def respond(
    request: Request,
    status: int,
    code: str,
    title: str,
    detail: str,
    field: str | None = None,
    retry_after: int | None = None,
) -> JSONResponse:
    """A problem+json response."""
    request.scope.setdefault("state", {})["code"] = code  # for the ledger
    body: dict[str, object] = {"type": "about:blank", "title": title, "status": status, "code": code}
    body["detail"] = _utf8(detail)
    if field is not None:
        body["field"] = _utf8(field)
    if request_id := request.scope.get("state", {}).get("request_id"):
        body["request_id"] = request_id
    headers = {"Retry-After": str(retry_after)} if retry_after is not None else {}
    return JSONResponse(body, status, headers, media_type="application/problem+json")


def _utf8(text: str) -> str:
    """The same text with what UTF-8 cannot say replaced: a field's name may hold lone surrogates."""
    return text.encode(errors="replace").decode()


async def _problem(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Problem)
    return respond(request, error.status, error.code, error.title, error.detail, error.field, error.retry_after)


async def _validation(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    named = next((str(part) for part in first["loc"][1:] if isinstance(part, str)), None)
    field = first.get("ctx", {}).get("field", named)
    message = str(first["msg"])
    if first["type"] == "json_invalid":
        field, message = None, "the body is not valid JSON"
    detail = f"{field}: {message}" if field else message
    return respond(request, InvalidRequest.status, InvalidRequest.code, InvalidRequest.title, detail, field)


async def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    code = CODES.get(error.status_code, "http_error")
    response = respond(request, error.status_code, code, HTTPStatus(error.status_code).phrase, str(error.detail))
    response.headers.update(error.headers or {})
    return response


def unexpected(request: Request) -> JSONResponse:
    """The answer to a fault nobody foresaw."""
    return respond(request, Problem.status, Problem.code, Problem.title, "an unexpected fault; see the server's log")
