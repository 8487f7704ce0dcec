"""How each API shows a Problem. Ours is RFC 9457 problem+json: what came, what is possible, what to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from app import errors
from app.api.schemas import ProblemBody
from app.errors import MEDIA_TYPE, Problem, document
from app.http.limits import Refused

SCHEMA = ProblemBody.model_json_schema()


def respond(request: Request, problem: Problem) -> JSONResponse:
    """The answer to a request that is not served."""
    state = request.scope.setdefault("state", {})
    state["problem"] = problem  # for the ledger
    headers = {"Retry-After": str(problem.retry_after)} if problem.retry_after is not None else {}
    body = document(problem, state.get("request_id"))
    return JSONResponse(body, problem.cause.status, headers, media_type=MEDIA_TYPE)


def declare(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What a route's OpenAPI says of these statuses, from the one table of causes."""
    declared: dict[int | str, dict[str, Any]] = {}
    for status in statuses:
        causes = [cause for cause in errors.CAUSES.values() if cause.status == status]
        text = "; ".join(dict.fromkeys(f"{cause.title}: {cause.advice}" for cause in causes))
        declared[status] = {"description": text, "content": {MEDIA_TYPE: {"schema": SCHEMA}}}
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
