"""Settings that are several values with commas between, and what such a value must look like."""

import re
from collections.abc import Iterable

ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/?#@\s]+")  # as a browser spells it
HOST = re.compile(r"\*|(\*\.)?[^*/:?#@\s]+")
MATCHING = {"allowed_origins": (ORIGIN, "https://example.com"), "allowed_hosts": (HOST, "example.com")}


def listed(text: str | None) -> list[str]:
    """What stands between commas."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def pairs(text: str) -> dict[str, str]:
    """NAME=VALUE; an absent value is empty."""
    return {name.strip(): value.strip() for name, _, value in (each.partition("=") for each in listed(text))}


def check_matching(name: str, text: str | None) -> None:
    """Raises ValueError for a value of ALLOWED_ORIGINS or ALLOWED_HOSTS that no browser would ever send."""
    pattern, example = MATCHING[name]
    if wrong := next((each for each in listed(text) if not pattern.fullmatch(each)), None):
        raise ValueError(f"{wrong} would match nothing; write {example}")


def check_aliases(text: str, variants: Iterable[str]) -> None:
    """Raises ValueError for one of MODEL_ALIASES that means no variant."""
    if wrong := [name for name, variant in pairs(text).items() if not name or variant not in ("", *variants)]:
        raise ValueError(f"{wrong[0]!r} means none of {', '.join(sorted({*variants}))}")
