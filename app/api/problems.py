"""How each API shows a Problem. Ours is RFC 9457 problem+json: what came, what is possible, what to do."""

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from app import errors
from app.api.schemas import OpenAIError, ProblemBody
from app.errors import MEDIA_TYPE, Problem, document
from app.http.limits import Refused

PROBLEM = (MEDIA_TYPE, ProblemBody.model_json_schema())
OPENAI_ERROR = ("application/json", OpenAIError.model_json_schema())
OPENAI_CODES = {
    **dict.fromkeys((errors.UNKNOWN_MODEL, errors.NOT_LOADED), "model_not_found"),
    errors.PICTURE_REFUSED: "content_policy_violation",
}
LONGEST_WAIT_S = 60  # OpenAI's npm client takes a longer Retry-After for none, and repeats at once


def respond(request: Request, problem: Problem) -> JSONResponse:
    """The answer to a request that is not served, in the shape of the API that it was sent to: by the path as the
    router sees it, so that it holds under any prefix, and before a route is found."""
    state = request.scope.setdefault("state", {})
    state["problem"] = problem  # for the ledger
    headers = {"Retry-After": str(problem.retry_after)} if problem.retry_after is not None else {}
    path = request.scope["path"].removeprefix(request.scope.get("root_path", ""))
    status, request_id = problem.cause.status, state.get("request_id")
    if path.startswith("/v1/"):
        if not _helps_to_repeat(problem, state):
            headers["x-should-retry"] = "false"
        return JSONResponse(openai_error(problem), 400 if status == 422 else status, headers)
    if path == "/" and status == 503:
        status = 429  # Hugging Face's JavaScript client repeats after a 503 at once, for ever
    return JSONResponse({**document(problem, request_id), "status": status}, status, headers, media_type=MEDIA_TYPE)


def openai_error(problem: Problem) -> dict[str, Any]:
    """A problem as OpenAI's SDKs read it."""
    status, told = problem.cause.status, document(problem)
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {
        "error": {
            "message": told["detail"],
            "type": "rate_limit_error" if status == 429 else kind,
            "param": told.get("field"),
            "code": OPENAI_CODES.get(problem.cause, told["code"]),
        }
    }


def _helps_to_repeat(problem: Problem, state: MutableMapping[str, Any]) -> bool:
    """Whether the same request may be served later. OpenAI's SDKs repeat after any 5xx, unless told otherwise."""
    if problem.cause.status == 504 or (problem.retry_after or 0) > LONGEST_WAIT_S:
        return False
    return problem.cause.status != 500 or not state.get("seeded")


def declare(*statuses: int, shape: tuple[str, dict[str, Any]] = PROBLEM) -> dict[int | str, dict[str, Any]]:
    """What a route's OpenAPI says of these statuses, from the one table of causes."""
    declared: dict[int | str, dict[str, Any]] = {}
    media_type, schema = shape
    for status in statuses:
        causes = [cause for cause in errors.CAUSES.values() if cause.status == status]
        text = "; ".join(dict.fromkeys(f"{cause.title}: {cause.advice}" for cause in causes))
        declared[status] = {"description": text, "content": {media_type: {"schema": schema}}}
        if any(cause.retry_after for cause in causes) or status == 429:
            declared[status]["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "description": "seconds"}}
    return declared


@contextmanager
def named(**names: str) -> Iterator[None]:
    """Report faults under the API's own names for an Order's fields."""
    try:
        yield
    except Problem as problem:
        problem.field = names.get(problem.field or "", problem.field)
        raise


def install(app: FastAPI) -> None:
    """Turn every exception a request can meet into a problem."""
    app.add_exception_handler(Problem, _problem)
    app.add_exception_handler(RequestValidationError, _validation)
    app.add_exception_handler(HTTPException, _http)


async def _problem(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Problem)
    return respond(request, error)


async def _validation(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    field = next((str(part) for part in first["loc"][1:] if isinstance(part, str)), None)
    field = first.get("ctx", {}).get("field", field)
    message = str(first["msg"])
    if first["type"] == "json_invalid":
        field, message = None, f"the body is not valid JSON: {first['ctx']['error']}"
    return respond(request, Problem(errors.INVALID, f"{field}: {message}" if field else message, field))


async def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if isinstance(error, Refused):
        return respond(request, error.problem)
    response = respond(request, Problem(errors.of_status(error.status_code), str(error.detail)))
    response.headers.update(error.headers or {})
    return response
