"""How a body is read, so that it has one meaning: JSON, and multipart/form-data as the object that JSON would be."""

import json
import logging
from collections.abc import AsyncIterable
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AliasChoices, BaseModel
from python_multipart import FormParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import Field, File, parse_options_header

from app import errors
from app.errors import Problem

SMALL = 64 << 10  # bytes; a prompt of 2,000 characters takes 12 KB at most, fully escaped 24 KB
MOST_FIELDS = 64
CONFIG = {"MAX_MEMORY_FILE_SIZE": float("inf"), "UPLOAD_ERROR_ON_BAD_CTE": True}

logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # what is wrong is answered, not logged


def loads(body: bytes) -> Any:
    """What JSON means: in UTF-8 (a byte order mark is skipped), with no key twice. A picture is one long string: a
    large body has no more values than a small one may have, which take many times their bytes. Raises
    json.JSONDecodeError, whose message says why."""
    if sum(body.count(each) for each in (b'"', b",", b"[", b"{")) > SMALL:
        raise json.JSONDecodeError("it has too many values", "", 0)
    try:
        return json.loads(body.decode("utf-8-sig"), object_pairs_hook=_once)
    except UnicodeDecodeError:
        raise json.JSONDecodeError("it is not UTF-8", "", 0) from None
    except RecursionError:
        raise json.JSONDecodeError("it is nested too deeply", "", 0) from None
    except json.JSONDecodeError:
        raise
    except ValueError as error:  # a number of thousands of digits
        raise json.JSONDecodeError(str(error).split(";")[0], "", 0) from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise json.JSONDecodeError("it holds a key twice", "", 0)
    return found


async def read_form(content_type: str, body: AsyncIterable[bytes], texts: frozenset[str]) -> dict[str, Any]:
    """The fields of a form by name; nothing of it is written to disk. A file is bytes. What is no file is a string, or,
    where its name is not in `texts`, what it means as JSON: 4, true, null. Raises Problem for what is no form, and for
    a field that is there twice."""
    fields: dict[str, Any] = {}
    is_whole = False

    def put(part: Field | File) -> None:
        name = (part.field_name or b"").decode(errors="replace")
        if name in fields:
            raise Problem(errors.INVALID, f"{name} is there twice", name)
        if len(fields) == MOST_FIELDS:
            raise Problem(errors.INVALID, f"the form has more than {MOST_FIELDS} fields")
        if isinstance(part, File):
            part.file_object.seek(0)
            fields[name] = part.file_object.read()
        else:
            fields[name] = _value(name, part.value or b"", name in texts)

    def end() -> None:
        nonlocal is_whole
        is_whole = True

    try:
        boundary = parse_options_header(content_type)[1].get(b"boundary")
        parser = FormParser("multipart/form-data", put, put, end, boundary, config=CONFIG)
        async for chunk in body:
            parser.write(chunk)
        parser.finalize()
    except FormParserError as error:
        raise Problem(errors.INVALID, f"the body is no valid form: {error}") from None
    if not is_whole:
        raise Problem(errors.INVALID, "the body is no whole form: it has no last boundary")
    return fields


def text_names(model: type[BaseModel]) -> frozenset[str]:
    """The names of a model's fields that are text, and their aliases."""
    names = set[str]()
    for name, field in model.model_fields.items():
        if _is_text(field.annotation):
            alias = field.validation_alias
            names |= {name, *(str(each) for each in (alias.choices if isinstance(alias, AliasChoices) else ()))}
    return frozenset(names)


def _is_text(annotation: Any) -> bool:
    origin = get_origin(annotation)
    if origin is Literal:
        return isinstance(get_args(annotation)[0], str)
    if origin in (Union, UnionType, Annotated):
        return any(_is_text(each) for each in get_args(annotation))
    return annotation in (str, bytes)


def _value(name: str, raw: bytes, is_text: bool) -> Any:
    try:
        text = raw.decode()
        return text if is_text else loads(raw)
    except UnicodeDecodeError:
        raise Problem(errors.INVALID, f"{name} is not UTF-8", name) from None
    except json.JSONDecodeError:
        return text  # the model says what it wants instead
