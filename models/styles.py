"""The style LoRAs of a folder, each named by its file. Imports no torch: both processes look here."""

import hashlib
import math
import os
import re
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from models.catalog import Family

NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
SUFFIX = ".safetensors"
LOOK_S = 1.0  # between two looks at the folder: clients choose the names that are not known


@dataclass(frozen=True)
class StyleFile:
    """A file of the folder. id: differs from that of any other file which had this name before or after. size: bytes.
    modified: Unix time."""

    name: str
    id: str
    size: int
    modified: float


def folder_of(family: Family, asked: Path | None) -> Path | None:
    """Where a family's styles are: in the folder that is asked for, or in its own."""
    return asked or (family.directory / "loras" if family.directory is not None else None)


def look_at(folder: Path, name: str) -> StyleFile | None:
    """The file of a style as it is now; None where there is none, or none that can be read."""
    path = folder / f"{name}{SUFFIX}"
    if not NAME.fullmatch(name) or not path.is_file() or not os.access(path, os.R_OK):
        return None
    try:
        found = path.stat()
    except OSError:
        return None  # it went meanwhile
    # Written anew in its place it has other times; moved into its place it has another inode.
    told = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    return StyleFile(name, hashlib.sha256(repr(told).encode()).hexdigest()[:16], found.st_size, found.st_mtime)


class Styles:
    """What the folder holds. It is looked at again when a name is not known, at most once in LOOK_S seconds; a file
    that is asked for by name is looked at each time. All of it asks the disk: not for an event loop."""

    def __init__(self, asked: Path | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._asked, self._clock = asked, clock
        self._known: dict[str, StyleFile] = {}
        self._looked = -math.inf
        self._lock = threading.Lock()

    def find(self, names: Collection[str], family: Family) -> dict[str, StyleFile]:
        """All that is known to be there, by name; these names as they are now."""
        folder = folder_of(family, self._asked)
        if folder is None:
            return {}
        with self._lock:
            if not self._known.keys() >= set(names):
                self._look(folder)
            for name in self._known.keys() & set(names):
                self._see(folder, name)
            return dict(self._known)

    def all(self, family: Family) -> list[StyleFile]:
        """Every style that is there, by name."""
        if (folder := folder_of(family, self._asked)) is None:
            return []
        with self._lock:
            self._look(folder)
            return sorted(self._known.values(), key=lambda each: each.name)

    def _look(self, folder: Path) -> None:
        if self._clock() - self._looked < LOOK_S:
            return
        self._looked = self._clock()
        try:
            there = {name.removesuffix(SUFFIX) for name in os.listdir(folder) if name.endswith(SUFFIX)}
        except OSError:
            there = set()  # no folder: no styles
        for name in there | self._known.keys():
            self._see(folder, name)

    def _see(self, folder: Path, name: str) -> None:
        found = look_at(folder, name)
        if found is not None:
            self._known[name] = found
        else:
            self._known.pop(name, None)
