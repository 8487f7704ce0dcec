"""The file of keys: who may ask, and how much. It holds hashes, so whoever reads it learns no key."""

import hashlib
import os
import secrets
import tomllib
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field, ValidationError

MOST = 1000  # keys: each request is compared with all of them, and each is a series in the metrics
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
PREFIX = "sdxl_"  # so that tools which search for leaked secrets can know one

Count = Annotated[int, Field(ge=1, le=1_000_000)]


class Key(BaseModel, frozen=True, extra="forbid"):
    """One client. sha256: of its key, in hex. rpm: requests that draw, a minute. in_flight: pictures accepted and not
    finished. None: no limit."""

    name: str = Field(pattern=NAME)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    rpm: Count | None = None
    in_flight: Count | None = None


class _File(BaseModel, extra="forbid"):
    key: list[Key] = Field(default=[], max_length=MOST)


def read(path: Path) -> tuple[Key, ...]:
    """The keys of a file. Raises ValueError with a sentence."""
    try:
        keys = _File.model_validate(tomllib.loads(path.read_text(encoding="utf-8"))).key
    except OSError as error:
        raise ValueError(f"the file of keys cannot be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"the file of keys is wrong at {where}: {first['msg']}") from None
    except ValueError as error:  # TOML's, or no UTF-8
        raise ValueError(f"the file of keys is no TOML: {error}") from None
    for what in ("name", "sha256"):
        if len({getattr(key, what) for key in keys}) < len(keys):
            raise ValueError(f"two keys in the file have the same {what}")
    return tuple(keys)


def add(path: Path, name: str, rpm: int | None, in_flight: int | None) -> str:
    """A new key, whose hash is appended to the file. Raises ValueError with a sentence."""
    taken = [key.name for key in read(path)] if path.exists() else []
    if name in taken:
        raise ValueError(f"there is a key {name!r} already; take its lines out of {path} first")
    if len(taken) >= MOST:
        raise ValueError(f"{path} holds {MOST} keys already, the most there may be")
    secret = PREFIX + secrets.token_urlsafe(32)
    limits = {"rpm": rpm, "in_flight": in_flight}
    lines = ["", "[[key]]", f'name = "{name}"', f'sha256 = "{digest(secret)}"']
    lines += [f"{limit} = {value}" for limit, value in limits.items() if value is not None]
    try:
        with open(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "w", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from None
    return secret


def digest(secret: str) -> str:
    """SHA-256 in hex. A key is 256 random bits, which no slow hash could make harder to guess."""
    return hashlib.sha256(secret.encode()).hexdigest()
