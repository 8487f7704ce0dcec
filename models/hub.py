"""The Hugging Face hub: what of a repository is in the cache, and what can be downloaded into it."""

from pathlib import Path

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
)

from models.catalog import Repository


class NotDownloaded(Exception):
    """A file did not come; the text says why."""


class Offline(NotDownloaded):
    """HF_HUB_OFFLINE forbids a download."""


def names(file: str) -> list[str]:
    """What a file may be called: without the ".fp16" where it is the only one of its kind."""
    return list(dict.fromkeys((file, file.replace(".fp16.", "."))))


def cached(repository: Repository, file: str) -> Path | None:
    """A file in the cache."""
    found = [try_to_load_from_cache(repository.id, name, revision=repository.revision) for name in names(file)]
    return next((Path(path) for path in found if isinstance(path, str)), None)


def download(repository: Repository, file: str) -> Path:
    """A file, with a progress bar. Raises NotDownloaded."""
    causes: list[Exception] = []
    for name in names(file):
        try:
            return Path(hf_hub_download(repository.id, name, revision=repository.revision))
        except RemoteEntryNotFoundError as error:
            causes.append(error)
        except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
            raise (Offline if constants.HF_HUB_OFFLINE else NotDownloaded)(_cause(error)) from error
    raise NotDownloaded(_cause(causes[0])) from causes[0]


def _cause(error: BaseException) -> str:
    """What the hub, the network or the disk said, of all that was raised on its way here."""
    while not isinstance(error, HfHubHTTPError) and (deeper := error.__cause__ or error.__context__) is not None:
        error = deeper
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return f"{error.response.url.host} answered {error.response.status_code} {error.response.reason_phrase}"
    return str(error) or type(error).__name__
