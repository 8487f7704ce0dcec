"""Where compiled code is kept: it is run as we run, so it is read only where nobody else can write."""

import logging
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)


def private(directory: Path) -> Path:
    """This directory, made where it is not there yet; or a fresh one for this run where others could have written."""
    try:
        directory = directory.resolve()
        for path in (*reversed(directory.parents), directory):
            path.mkdir(mode=0o700, exist_ok=True)
        reason = next(_doubts(directory), None)
    except OSError as error:
        reason = f"{error.strerror}"
    if reason is None:
        return directory
    fresh = Path(tempfile.mkdtemp(prefix="sdxl-lightning-"))
    log.warning("compiled code is neither read from nor kept in %s: %s. %s serves this run", directory, reason, fresh)
    return fresh


def _doubts(directory: Path) -> Iterator[str]:
    """Why somebody but us and root could have written what is in it, or could put something in its place."""
    for path in (directory, *directory.parents):
        found = path.lstat()
        if found.st_uid not in _trusted():
            yield f"{path} belongs to user {found.st_uid}"
        # In a sticky folder, like /tmp, only its owner moves what is ours.
        if found.st_mode & 0o022 and (path == directory or not found.st_mode & stat.S_ISVTX):
            yield f"others may write to {path}; chmod go-w it"
    for folder, folders, files in os.walk(directory):
        for name in (*folders, *files):
            found = os.lstat(os.path.join(folder, name))
            if found.st_uid not in _trusted() or stat.S_ISLNK(found.st_mode):
                yield f"{name} in {folder} is a link, or belongs to user {found.st_uid}"


def _trusted() -> tuple[int, int]:
    return os.geteuid(), 0
