"""GET /: the playground, a page that draws as one types. Its files are the ones listed here, read once."""

import hashlib
from pathlib import Path

from fastapi import APIRouter, Request, Response

from app import errors
from app.errors import Problem

router = APIRouter(include_in_schema=False)

APP = Path(__file__).parent.parent
VOCABULARY = APP.parent / "models" / "embedded" / "vocabulary.json"
TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
    ".json": "application/json",
}
FILES = {path.name: path.read_bytes() for path in (*sorted((APP / "web").iterdir()), VOCABULARY)}
ETAGS = {name: f'"{hashlib.sha256(data).hexdigest()[:32]}"' for name, data in FILES.items()}
HEADERS = {
    # Nothing from outside, and no code but its own files. blob: is what it drew itself.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # asked for anew each time, by its ETag
}


@router.get("/")
async def page(request: Request) -> Response:
    """The page itself."""
    return _file("index.html", request)


@router.get("/web/{name}")
async def page_file(name: str, request: Request) -> Response:
    """What it is made of."""
    if name not in FILES or name == "index.html":
        raise Problem(errors.NOT_FOUND, "there is no such file")
    return _file(name, request)


def _file(name: str, request: Request) -> Response:
    headers = {**HEADERS, "ETag": ETAGS[name]}
    if ETAGS[name] in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(FILES[name], media_type=TYPES[Path(name).suffix], headers=headers)
