"""A progress bar where a person watches, plain lines where nobody does."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(items: Sequence[T], title: str) -> Iterator[T]:
    """The items, one by one."""
    if not sys.stderr.isatty():
        print(f"... {title}", file=sys.stderr, flush=True)
    bar: Iterable[T] = tqdm(items, desc=title, leave=False, disable=None)
    yield from bar
