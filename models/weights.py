"""Find, fetch and verify weight files. Only this file and hub.py touch the disk, and only safetensors leave it."""

import hashlib
import json
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors import SafetensorError
from torch import Tensor

from models import hub, single_file
from models.catalog import Component, Family, Repository

HEADER_LIMIT = 8 << 20  # bytes; SDXL's UNet header takes 0.2 MB. A larger one is an attack, not a model.
POSITION_IDS = "text_model.embeddings.position_ids"  # a constant, in int64, in older exports of CLIP
TENSOR_LIMIT = 20_000  # SDXL's LoRA files hold 2,364


class MissingWeights(Exception):
    """A file is on neither disk, cache nor hub; the text says which, and how to get it."""


class BadWeights(Exception):
    """A file is there but cannot be trusted or does not fit; the text says why."""


class WeightStore:
    """The files of one family: in a local directory, in the Hugging Face cache, or downloaded on demand.

    directory: holds the family's folders (text_encoder/, vae/, ...) and the Lightning files at its root, with or
    without the ".fp16" in their names. None: the family's own directory, or the hub. Of a user's own family it holds
    what that has from the family it is like, whose store is `like`.
    """

    def __init__(self, family: Family, directory: Path | None = None) -> None:
        self.family = family
        self.directory = family.directory if family.like else directory or family.directory
        self.like = WeightStore(family.like, directory) if family.like else self

    def read(self, part: str, place: str = "cpu", dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """All tensors of a component, by diffusers' names; as read() does. Raises MissingWeights, BadWeights."""
        if not self._is_in_file(part):
            try:
                return read(self.component_file(part), place, dtype)
            except BadWeights as error:
                raise BadWeights(f"{part}/{error}") from error
        path = self._own_file()
        state = read(path, place, dtype, single_file.PREFIXES[part])
        try:
            return single_file.convert(part, state, self.config(part))
        except (ValueError, KeyError, IndexError) as error:
            raise BadWeights(f"{path.name}: its {part} is not SDXL's: {error}") from error

    def component_file(self, part: str, index: int = -1, download: bool = True) -> Path:
        """The path of one file of a component (by default its last, the weights). Raises MissingWeights."""
        component = self.family.components[part]
        if part in self.family.lent or (self._is_in_file(part) and component.files[index] != component.files[-1]):
            return self.like.component_file(part, index, download)
        if self._is_in_file(part):
            return self._own_file()
        return self._find(component, component.files[index], local_folder=part, download=download)

    def component_folder(self, part: str, download: bool = True) -> Path:
        """The folder that holds all files of a component. Raises MissingWeights."""
        return next(iter(self._component_paths(part, download).values())).parent

    def _component_paths(self, part: str, download: bool) -> dict[str, Path]:
        """Where each file of a component is, by its name in the catalog."""
        if part in self.family.lent:
            return self.like._component_paths(part, download)
        component = self.family.components[part]
        other = [self.directory / part / file for file in component.or_files] if self.directory else []
        if other and all(path.is_file() for path in other):
            return dict(zip(component.or_files, other, strict=True))
        return {file: self._find(component, file, part, download) for file in component.files}

    def variant_file(self, name: str, download: bool = True) -> Path:
        """The path of a variant's file. Raises MissingWeights."""
        file = self.family.variants[name].file
        return self._holder(file)._lightning_file(file, download) if file else self.component_file("unet", -1, download)

    def _holder(self, file: str) -> "WeightStore":
        """The store that has a variant's file: ours is beside its catalog; else it may be one of the release."""
        known = {variant.file for variant in self.like.family.variants.values()}
        return self.like if file in known and not (self.family.root / file).is_file() else self

    def _lightning_file(self, file: str, download: bool) -> Path:
        if self.family.like is not None:
            return self._find_locally(self.family.root, Path(file))
        return self._find(Component("", (file,), "lightning"), file, local_folder="", download=download)

    def _is_in_file(self, part: str) -> bool:
        """Whether a component is in the family's checkpoint of one file."""
        return self.family.file is not None and part not in self.family.lent

    def _own_file(self) -> Path:
        """A checkpoint of one file, whose header says that it is one. Raises MissingWeights, BadWeights."""
        assert self.family.file is not None
        path = self._find_locally(self.family.root, self.family.file)
        parts = [part for part in self.family.components if self._is_in_file(part)]
        if reason := single_file.refusal(check_header(path), parts):
            raise BadWeights(f"family {self.family.name}: {path.name} cannot be served: {reason}")
        return path

    def config(self, part: str) -> dict[str, Any]:
        """A component's config.json. Raises MissingWeights, BadWeights."""
        path = self.component_file(part, 0)
        return _read_config(path, f"{part}/{path.name}")

    @property
    def zeros_for_empty_prompt(self) -> bool:
        """Whether an absent negative prompt is zeros, not the encoded empty prompt: what the model's directory says, or
        diffusers' default."""
        if self.family.file:
            return self.like.zeros_for_empty_prompt
        path = self.directory and self.directory / "model_index.json"
        if path is None or not path.is_file():
            return True
        zeros = _read_config(path, path.name).get("force_zeros_for_empty_prompt", True)
        if not isinstance(zeros, bool):
            raise BadWeights(f"{path.name}: force_zeros_for_empty_prompt must be true or false, not {zeros!r}")
        return zeros

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
            except (MissingWeights, BadWeights):
                continue
            here.append(name)
        return here

    def verify(self, name: str, download: bool = False) -> str:
        """Look at the whole of every file of a component or variant. Returns "right", or that it is present where no
        digest is known. Raises MissingWeights, BadWeights."""
        family = self.family
        if name in family.lent:
            return self.like.verify(name, download)
        if name in family.variants:
            path, file = self.variant_file(name, download), family.variants[name].file
            return self._holder(file)._verify({file: path}) if file else "the family's own unet"
        if self._is_in_file(name):
            self.like._verify({f"{name}/config.json": self.component_file(name, 0, download)})
            path = self._own_file()
            return self._verify({path.name: path}) if name == "unet" else f"in {path.name}"
        return self._verify({f"{name}/{file}": path for file, path in self._component_paths(name, download).items()})

    def _verify(self, paths: dict[str, Path]) -> str:
        """The same of files by their names in sha256."""
        for key, path in paths.items():
            if path.suffix == ".safetensors":
                check_header(path)
                with _opened(path):
                    pass  # its parser refuses a file that the header does not cover exactly
            self._check_digest(key, path)
        unknown = [key for key in paths if key not in self.family.sha256]
        return f"present, not verified: no digest is known of {', '.join(unknown)}" if unknown else "right"

    def _check_digest(self, key: str, path: Path) -> None:
        expected = self.family.sha256.get(key)
        if expected and _sha256(path) != expected:
            raise BadWeights(f"{key}: its SHA-256 is not the published one; delete it and fetch it again")

    def _find(self, component: Component, file: str, local_folder: str, download: bool) -> Path:
        if self.directory is not None:
            return self._find_locally(self.directory, Path(local_folder) / file)
        assert component.repository is not None, "a family has repositories, or a directory of its own"
        repository = self.family.repositories[component.repository]
        name = f"{component.folder}/{file}" if component.folder else file
        if (path := hub.cached(repository, name)) is not None:
            return path
        if not download:
            raise MissingWeights(self._advice(name, repository))
        try:
            path = hub.download(repository, name)
        except hub.Offline as error:
            raise MissingWeights(f"{self._advice(name, repository)} HF_HUB_OFFLINE forbids a download.") from error
        except hub.NotDownloaded as error:
            raise MissingWeights(f"{name} of {repository.id} cannot be downloaded: {error}") from error
        try:
            # Once, as it comes: what is in the cache is taken as it is.
            self._check_digest(f"{local_folder}/{file}".lstrip("/"), path)
        except BadWeights:
            path.resolve().unlink()  # the cache's names are links
            path.unlink(missing_ok=True)
            raise
        return path

    def _find_locally(self, directory: Path, file: Path) -> Path:
        for name in hub.names(file.name):
            path = directory / file.with_name(name)
            if path.is_file():
                return path
        advice = "" if self.family.like else " Put the file there, or set MODEL_DIR to a directory that has it."
        raise MissingWeights(f"{file} of {self.family.name} is not in {directory}.{advice}")

    def _advice(self, name: str, repository: Repository) -> str:
        return (
            f"{name} of {repository.id} is not in the Hugging Face cache. "
            f"Run `sdxl-lightning models fetch` where there is a network, or set MODEL_DIR to a directory that has it."
        )


def _read_config(path: Path, name: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadWeights(f"{name} is not readable JSON: {error}") from error
    if not isinstance(found, dict):  # diffusers takes a string for a repository, and asks the hub
        raise BadWeights(f"{name} holds no JSON object")
    return found


def read(path: Path, device: str = "cpu", dtype: torch.dtype | None = None, prefix: str = "") -> dict[str, Tensor]:
    """Copies of a safetensors file's tensors whose names have a prefix, on a device: what becomes of the file changes
    nothing. dtype: the file's own if None. Raises BadWeights for anything else, and for tensors that are no weights."""
    check_header(path)
    state = {}
    with _opened(path, device) as file:
        for key in file.keys():  # noqa: SIM118 - it is no dictionary
            if not key.startswith(prefix):
                continue
            tensor = file.get_tensor(key)
            if not tensor.is_floating_point() and key.removeprefix(prefix) != POSITION_IDS:
                raise BadWeights(f"{path.name}: {key} is {tensor.dtype}, which is not floating point")
            state[key] = tensor.to(dtype or tensor.dtype, copy=device == "cpu")  # elsewhere get_tensor made the copy
            if not is_finite(state[key]):
                raise BadWeights(f"{path.name}: {key} has NaN, Inf, or what {state[key].dtype} cannot hold")
    return state


@contextmanager
def _opened(path: Path, device: str = "cpu") -> Iterator[Any]:
    """A file in safetensors' own reader. Raises BadWeights for what that refuses, here or within."""
    try:
        with safetensors.safe_open(path, "pt", device=device) as file:
            yield file
    except torch.OutOfMemoryError:
        raise  # nothing is wrong with the file
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise BadWeights(f"{path.name} is not a whole safetensors file: {error}") from error


def is_finite(tensor: Tensor) -> bool:
    """Whether no number of it is NaN or Inf."""
    if not tensor.numel():
        return True
    ends = (tensor.float() if tensor.itemsize == 1 else tensor).aminmax()  # NaN if one is; 40 times as fast as isfinite
    return bool(ends.min.isfinite() & ends.max.isfinite())


def check_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file. What is no plain one is refused before a parser sees it: raises BadWeights."""
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
    return header


def check_fit(expected: dict[str, Tensor], state: dict[str, Tensor], name: str) -> None:
    """Raises BadWeights, naming `name`, unless `state` has the expected tensors by name and shape."""
    wanted, found = ({key: tuple(value.shape) for key, value in each.items()} for each in (expected, state))
    if wanted != found:
        wrong = sorted(set(wanted.items()) ^ set(found.items()))[:3]
        raise BadWeights(f"{name}: its tensors do not fit this model, first {wrong}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
