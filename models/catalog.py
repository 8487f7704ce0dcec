"""What can be served: families and their variants. Ours are in catalog.toml; a user's catalog has the same form."""

import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec

HERE = Path(__file__).parent
MOST_STEPS = 64
IN_ONE_FILE = ("unet", "vae", "text_encoder", "text_encoder_2")  # the components that a checkpoint in one file holds
PredictionType = Literal["epsilon", "sample"]
Name = Annotated[str, msgspec.Meta(pattern="^[A-Za-z0-9._-]{1,64}$")]
Steps = Annotated[int, msgspec.Meta(ge=1, le=MOST_STEPS)]

T = TypeVar("T")


class BadCatalog(Exception):
    """A catalog makes no sense; the text names the file and the row."""


@dataclass(frozen=True)
class Weights:
    """What identifies a weight set everywhere: a variant's name, and the styles added to it, each with its scale."""

    variant: str
    styles: tuple[tuple[str, float], ...] = ()

    def __str__(self) -> str:
        return " + ".join([self.variant, *(f"{scale:g} {style}" for style, scale in self.styles)])


def one_of(numbers: Iterable[int]) -> str:
    """They in words: "1, 2 or 4"."""
    *others, last = map(str, sorted(numbers))
    return f"{', '.join(others)} or {last}" if others else last


class Guidance(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The classifier-free guidance scales that a variant's maker declares. 1 and less mean without."""

    default: float
    minimum: float
    maximum: float

    def __post_init__(self) -> None:
        if not 0 <= self.minimum <= self.default <= self.maximum < math.inf:
            raise ValueError("guidance must be 0 <= minimum <= default <= maximum")


class Variant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One set of distilled weights and how its maker declares it to be run, in which it cannot be mismatched.

    file: "" where it is the family's own UNet. steps: the step counts, first the one for a request that names none.
    sampler, spacing, sigmas: in diffusers' words; sigmas: None means those at the timesteps. guidance: None where it
    draws without only, as ByteDance's own do.
    """

    name: Name
    kind: Literal["unet", "lora"]
    steps: tuple[Steps, ...]
    file: str = ""
    prediction_type: PredictionType = "epsilon"
    sampler: Literal["euler", "euler_ancestral"] = "euler"
    spacing: Literal["trailing", "leading", "linspace"] = "trailing"
    sigmas: Literal["karras"] | None = None
    guidance: Guidance | None = None

    def __post_init__(self) -> None:
        if not self.steps or len(set(self.steps)) != len(self.steps):
            raise ValueError("steps must be a number, or a list of numbers that differ")
        if self.kind == "lora" and not self.file:
            raise ValueError("a lora must have a file")
        if self.file and not self.file.endswith(".safetensors"):
            raise ValueError(f"only safetensors files are read, not {self.file}")
        if self.sampler == "euler_ancestral" and (self.prediction_type != "epsilon" or self.sigmas is not None):
            raise ValueError("euler_ancestral needs prediction_type epsilon, and sigmas left out")


class Sizes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Picture sides in pixels that a family can draw."""

    default: int
    minimum: int
    maximum: int
    multiple: int

    def refusal(self, side: str, pixels: int) -> str | None:
        """A sentence that says why `pixels` cannot be the `side` ("width" or "height"), or None if it can."""
        if self.minimum <= pixels <= self.maximum and pixels % self.multiple == 0:
            return None
        if self.minimum == self.maximum:
            return f"{side} must be {self.default}, the only size this model draws, not {pixels}"
        return f"{side} must be from {self.minimum} to {self.maximum} in steps of {self.multiple}, not {pixels}"

    def nearest(self, width: int, height: int) -> tuple[int, int]:
        """The sides that can be drawn and come nearest: of the same shape, as far as the limits allow."""
        scale = min(max(1.0, self.minimum / min(width, height)), self.maximum / max(width, height))
        rounded = (round(side * scale / self.multiple) * self.multiple for side in (width, height))
        width, height = (min(max(side, self.minimum), self.maximum) for side in rounded)
        return width, height


class Repository(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A repository of the Hugging Face hub at a revision."""

    id: str
    revision: str


class Component(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of the pipeline: its folder and files; the last file holds the weights, if it has any. or_files: what a
    local folder may have instead; where it has all of them, they are what is read."""

    folder: str
    files: tuple[str, ...]
    repository: str | None = None
    or_files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """A base model and its variants: SDXL, the embedded miniature of it, or a user's own that is like one of them.

    default: the variant of a request that names neither variant nor steps. sha256: by part/file, or a file of the
    catalog. A user's own has: like, whose sizes and layout it has; lent, the components that it has from there;
    root, where its catalog lies; file, a checkpoint that holds IN_ONE_FILE, if it is one.
    preview: the colours of its latents, as models.preview.to_rgb takes them.
    """

    name: str
    size: Sizes
    preview: tuple[tuple[float, ...], ...]
    components: dict[str, Component]
    variants: dict[str, Variant]
    default: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)
    directory: Path | None = None
    like: "Family | None" = None
    lent: frozenset[str] = frozenset()
    root: Path = HERE
    file: Path | None = None

    @property
    def is_small(self) -> bool:
        """Whether it has the embedded model's size, of which all variants fit into memory."""
        return "embedded" in (self.name, self.like and self.like.name)

    def choose(self, name: str | None, steps: int | None) -> Variant | None:
        """The first variant of this name, if one is said, that draws in so many steps; the default where neither is."""
        name = self.default if name is None and steps is None else name
        named = [each for each in self.variants.values() if name in (None, each.name)]
        return next((each for each in named if steps is None or steps in each.steps), None)

    def asks_hub(self, directory: object) -> bool:
        """Whether any of it may have to come from a repository. directory: where ours have their files, if anywhere."""
        if self.like is None:
            return bool(self.repositories) and directory is None
        return bool(self.repositories) or self.like.asks_hub(directory)


class _Ours(msgspec.Struct, forbid_unknown_fields=True):
    """A [family.NAME] of catalog.toml."""

    size: Sizes
    preview: tuple[tuple[float, ...], ...]
    components: dict[str, Component]
    default: str
    variant: list[dict[str, Any]]
    repositories: dict[str, Repository] = {}
    sha256: dict[str, str] = {}
    directory: str | None = None

    def family(self, name: str, root: Path, variants: dict[str, Variant]) -> Family:
        """What the row declares."""
        directory = self.directory and root / self.directory
        parts = (self.size, self.preview, self.components, variants, self.default, self.repositories, self.sha256)
        return Family(name, *parts, directory or None)


class _Own(msgspec.Struct, forbid_unknown_fields=True):
    """A [family.NAME] of a user's catalog. Its weights: one of file, directory and repository."""

    like: str
    default: str
    variant: list[dict[str, Any]]
    file: str | None = None
    directory: str | None = None
    repository: Repository | None = None
    vae: str | None = None
    sha256: dict[str, str] = {}

    def family(self, name: str, root: Path, variants: dict[str, Variant]) -> Family:
        """What the row declares. Raises ValueError where it contradicts itself."""
        if name in CATALOG:
            raise ValueError("there is one of this name already")
        if self.like not in CATALOG:
            raise ValueError(f"like must be one of {', '.join(CATALOG)}, not {self.like}")
        if [self.file, self.directory, self.repository].count(None) != 2:
            raise ValueError("it must have one of file, directory and repository")
        if self.file and not self.file.endswith(".safetensors"):
            raise ValueError(f"only safetensors files are read, not {self.file}")
        if self.vae not in (None, self.like):
            raise ValueError(f"vae must be {self.like}, or be left out for its own")
        loras = [each.name for each in variants.values() if each.kind == "lora"]
        merges = [each.name for each in variants.values() if not each.file]
        if loras and merges:
            raise ValueError(
                f"variant {loras[0]} would distil anew what is a Lightning merge already, as variant {merges[0]} says"
            )
        like = CATALOG[self.like]
        components = like.components
        lent = {"vae"} if self.vae else set()
        if self.file:
            lent |= components.keys() - set(IN_ONE_FILE)
        if self.repository:
            components = {
                part: msgspec.structs.replace(each, folder=part, repository="own") for part, each in components.items()
            }
        return Family(
            name=name,
            size=like.size,
            preview=like.preview,
            components=components,
            variants=variants,
            default=self.default,
            repositories={"own": self.repository} if self.repository else {},
            sha256=self.sha256,
            directory=root / self.directory if self.directory else None,
            like=like,
            lent=frozenset(lent),
            root=root,
            file=root / self.file if self.file else None,
        )


def read_catalog(path: Path, text: str, form: type[_Ours] | type[_Own] = _Own) -> dict[str, Family]:
    """A catalog's families by name. path: where paths in it begin. form: of its rows. Raises BadCatalog."""
    try:
        data = tomllib.loads(text)
    except ValueError as error:
        raise BadCatalog(f"{path} is not TOML: {error}") from error
    if data.keys() != {"family"} or not isinstance(data["family"], dict):
        raise BadCatalog(f"{path}: it must have tables [family.NAME] and nothing else")
    return {
        name: _family(f"{path.name}: family {name}", name, row, path.parent, form)
        for name, row in data["family"].items()
    }


def _family(where: str, name: str, data: Any, root: Path, form: type[_Ours] | type[_Own]) -> Family:
    row, variants = _made(form, data, where), dict[str, Variant]()
    for number, each in enumerate(row.variant, start=1):
        steps = each.get("steps")
        listed = {**each, "steps": [steps]} if isinstance(steps, int) else each
        variant = _made(Variant, listed, f"{where}, variant {each.get('name', number)}")
        if variant.name in variants:
            raise BadCatalog(f"{where}: two variants are named {variant.name}")
        variants[variant.name] = variant
    if row.default not in variants:
        raise BadCatalog(f"{where}: default must be one of {', '.join(variants)}, not {row.default}")
    try:
        return row.family(name, root, variants)
    except ValueError as error:
        raise BadCatalog(f"{where}: {error}") from error


def _made(kind: type[T], row: object, where: str) -> T:
    try:
        return msgspec.convert(row, kind)
    except msgspec.ValidationError as error:
        raise BadCatalog(f"{where}: {error}") from error


def families(catalogs: Mapping[str, str]) -> dict[str, Family]:
    """All that can be served: ours, and those of users' catalogs, texts by path. Raises BadCatalog."""
    own = [read_catalog(Path(path), text) for path, text in catalogs.items()]
    return {name: family for each in (CATALOG, *own) for name, family in each.items()}


CATALOG = read_catalog(HERE / "catalog.toml", (HERE / "catalog.toml").read_text(), _Ours)
