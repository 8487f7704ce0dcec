"""Find, fetch and verify weight files. Only this file touches the disk or the hub, and only safetensors leave it."""

import hashlib
import json
import stat
from pathlib import Path
from typing import Any

import safetensors.torch
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError
from torch import Tensor

from models.catalog import Component, Family, Repository

HEADER_LIMIT = 8 << 20  # bytes; SDXL's UNet header takes 0.2 MB. A larger one is an attack, not a model.
TENSOR_LIMIT = 20_000  # SDXL's LoRA files hold 2,364


class MissingWeights(Exception):
    """A file is on neither disk, cache nor hub; the text says which, and how to get it."""


class BadWeights(Exception):
    """A file is there but cannot be trusted or does not fit; the text says why."""


class WeightStore:
    """The files of one family: in a local directory, in the Hugging Face cache, or downloaded on demand.

    directory: holds the family's folders (text_encoder/, vae/, ...) and the Lightning files at its root, with or
    without the ".fp16" in their names. None: the family's own directory, or the hub.
    """

    def __init__(self, family: Family, directory: Path | None = None) -> None:
        self.family = family
        self.directory = directory or family.directory

    def component_file(self, part: str, index: int = -1, download: bool = True) -> Path:
        """The path of one file of a component (by default its last, the weights). Raises MissingWeights."""
        component = self.family.components[part]
        return self._find(component, component.files[index], local_folder=part, download=download)

    def component_folder(self, part: str, download: bool = True) -> Path:
        """The folder that holds all files of a component. Raises MissingWeights."""
        paths = [self.component_file(part, index, download) for index in range(len(self.family.components[part].files))]
        return paths[0].parent

    def variant_file(self, name: str, download: bool = True) -> Path:
        """The path of a variant's file. Raises MissingWeights."""
        variant = self.family.variants[name]
        return self._find(Component("", (variant.file,), "lightning"), variant.file, local_folder="", download=download)

    def config(self, part: str) -> dict[str, Any]:
        """A component's config.json (or scheduler_config.json). Raises MissingWeights, BadWeights."""
        path = self.component_file(part, 0)
        try:
            found: dict[str, Any] = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise BadWeights(f"{part}/{path.name} is not readable JSON: {error}") from error
        if not isinstance(found, dict):  # diffusers takes a string for a repository, and asks the hub
            raise BadWeights(f"{part}/{path.name} holds no JSON object")
        return found

    def is_complete(self) -> bool:
        """Whether every file of the base and at least one variant is here without a download."""
        try:
            for part in self.family.components:
                self.component_folder(part, download=False)
        except MissingWeights:
            return False
        return bool(self.variants_here())

    def variants_here(self) -> list[str]:
        """Names of the variants whose files are here without a download."""
        here = []
        for name in self.family.variants:
            try:
                self.variant_file(name, download=False)
            except MissingWeights:
                continue
            here.append(name)
        return here

    def verify(self, name: str, download: bool = False) -> None:
        """Check a variant's file against its published SHA-256 (where there is one) and read its header.
        Raises MissingWeights, BadWeights."""
        path = self.variant_file(name, download)
        check_header(path)
        self._check_digest(path)

    def _check_digest(self, path: Path) -> None:
        expected = self.family.sha256.get(path.name)
        if expected and _sha256(path) != expected:
            raise BadWeights(f"{path.name}: its SHA-256 is not the published one; delete it and fetch it again")

    def _find(self, component: Component, file: str, local_folder: str, download: bool) -> Path:
        if self.directory is not None:
            return self._find_locally(self.directory, Path(local_folder) / file)
        assert component.repository is not None, "a family has repositories, or a directory of its own"
        repository = self.family.repositories[component.repository]
        name = f"{component.folder}/{file}" if component.folder else file
        cached = try_to_load_from_cache(repository.id, name, revision=repository.revision)
        if isinstance(cached, str):
            return Path(cached)
        if not download:
            raise MissingWeights(self._advice(name, repository))
        try:
            path = Path(hf_hub_download(repository.id, name, revision=repository.revision))  # shows a progress bar
        except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
            if constants.HF_HUB_OFFLINE:
                raise MissingWeights(f"{self._advice(name, repository)} HF_HUB_OFFLINE forbids a download.") from error
            cause = _cause(error)
            raise MissingWeights(f"{name} of {repository.id} cannot be downloaded: {cause}") from error
        try:
            self._check_digest(path)  # once, as it comes: what is in the cache is taken as it is
        except BadWeights:
            path.resolve().unlink()  # the cache's names are links
            path.unlink(missing_ok=True)
            raise
        return path

    def _find_locally(self, directory: Path, file: Path) -> Path:
        for name in (file.name, file.name.replace(".fp16.", ".")):
            path = directory / file.with_name(name)
            if path.is_file():
                return path
        raise MissingWeights(
            f"{file} of {self.family.name} is not in {directory}. "
            "Put the file there, or set MODEL_DIR to a directory that has it."
        )

    def _advice(self, name: str, repository: Repository) -> str:
        return (
            f"{name} of {repository.id} is not in the Hugging Face cache. "
            f"Run `sdxl-lightning models fetch` where there is a network, or set MODEL_DIR to a directory that has it."
        )


def read(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """All tensors of a safetensors file, by name, on a device. Raises BadWeights for anything else."""
    check_header(path)
    try:
        return safetensors.torch.load_file(path, device=device)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise BadWeights(f"{path.name} is not a whole safetensors file: {error}") from error


def check_header(path: Path) -> None:
    """Refuse what is no plain safetensors file before a parser sees it. Raises BadWeights."""
    if path.suffix != ".safetensors":
        raise BadWeights(f"{path.name}: only safetensors files are read")
    status = path.stat()  # follows links: the Hugging Face cache is made of them
    if not stat.S_ISREG(status.st_mode):
        raise BadWeights(f"{path.name} is not a regular file")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(HEADER_LIMIT, status.st_size - 8):
            raise BadWeights(f"{path.name} is truncated or not a safetensors file (header of {length} bytes)")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise BadWeights(f"{path.name}: its header is not JSON") from error
    if not isinstance(header, dict) or len(header) > TENSOR_LIMIT:
        raise BadWeights(f"{path.name}: its header is no table of at most {TENSOR_LIMIT} tensors")


def check_fit(expected: dict[str, Tensor], state: dict[str, Tensor], name: str) -> None:
    """Raises BadWeights, naming `name`, unless `state` has the expected tensors by name and shape."""
    wanted, found = ({key: tuple(value.shape) for key, value in each.items()} for each in (expected, state))
    if wanted != found:
        wrong = sorted(set(wanted.items()) ^ set(found.items()))[:3]
        raise BadWeights(f"{name}: its tensors do not fit this model, first {wrong}")


def _cause(error: BaseException) -> str:
    """What the hub, the network or the disk said, of all that was raised on its way here."""
    while not isinstance(error, HfHubHTTPError) and (deeper := error.__cause__ or error.__context__) is not None:
        error = deeper
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return f"{error.response.url.host} answered {error.response.status_code} {error.response.reason_phrase}"
    return str(error) or type(error).__name__


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
