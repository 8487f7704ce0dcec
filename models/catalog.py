"""What can be served: families and their variants, read from catalog.toml and checked at import."""

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

HERE = Path(__file__).parent
PredictionType = Literal["epsilon", "sample"]


@dataclass(frozen=True)
class Style:
    """A style LoRA and how much of it. file: which file of that name, as models.styles tells them apart: a replaced
    one is another style, for which nothing that was made of the old one is used."""

    name: str
    scale: float
    file: str = ""


@dataclass(frozen=True)
class Weights:
    """What identifies a weight set everywhere: a variant's name, and the styles added to it, by their names."""

    variant: str
    styles: tuple[Style, ...] = ()

    @property
    def is_styled(self) -> bool:
        """Whether styles are added."""
        return bool(self.styles)

    def __str__(self) -> str:
        return " + ".join([self.variant, *(f"{style.scale:g} {style.name}" for style in self.styles)])


@dataclass(frozen=True)
class Guidance:
    """The classifier-free guidance scales that a variant's maker declares. 1 and less mean without."""

    default: float
    minimum: float
    maximum: float


@dataclass(frozen=True)
class Variant:
    """One set of distilled weights, with its step count and what its UNet predicts: neither can be mismatched.
    guidance: None where it draws without only, as ByteDance's own do."""

    name: str
    file: str
    kind: Literal["unet", "lora"]
    steps: int
    prediction_type: PredictionType
    guidance: Guidance | None = None

    def __post_init__(self) -> None:
        if self.steps not in (1, 2, 4, 8):
            raise ValueError(f"variant {self.name}: steps must be 1, 2, 4 or 8 (the trained grids), not {self.steps}")
        if self.kind not in ("unet", "lora") or self.prediction_type not in ("epsilon", "sample"):
            raise ValueError(f"variant {self.name}: unknown kind {self.kind!r} or prediction {self.prediction_type!r}")
        if not self.file.endswith(".safetensors"):
            raise ValueError(f"variant {self.name}: only safetensors files are read, not {self.file}")


@dataclass(frozen=True)
class Sizes:
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


@dataclass(frozen=True)
class Repository:
    """A repository of the Hugging Face hub at a revision."""

    id: str
    revision: str


@dataclass(frozen=True)
class Component:
    """A part of the pipeline: its folder and files; the last file holds the weights, if it has any. or_files: what a
    local folder may have instead; where it has all of them, they are what is read."""

    folder: str
    files: tuple[str, ...]
    repository: str | None = None
    or_files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """A base model and its variants: SDXL, or the embedded miniature of it."""

    name: str
    size: Sizes
    components: dict[str, Component]
    variants: dict[str, Variant]
    repositories: dict[str, Repository] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)
    directory: Path | None = None


def read_catalog(path: Path = HERE / "catalog.toml") -> dict[str, Family]:
    """Families by name. Raises ValueError or TypeError, naming the row, where the file makes no sense."""
    data = tomllib.loads(path.read_text())
    variants = {row["name"]: Variant(**row) for row in data["variant"]}
    if len(variants) != len(data["variant"]):
        raise ValueError(f"{path.name}: two variants share a name")
    return {name: _family(name, row, variants, path.parent) for name, row in data["family"].items()}


def _family(name: str, row: dict[str, Any], variants: dict[str, Variant], root: Path) -> Family:
    return Family(
        name=name,
        size=Sizes(**row["size"]),
        components={
            part: Component(
                value["folder"], tuple(value["files"]), value.get("repository"), tuple(value.get("or_files", ()))
            )
            for part, value in row["components"].items()
        },
        variants=variants,
        repositories={key: Repository(**value) for key, value in row.get("repositories", {}).items()},
        sha256=row.get("sha256", {}),  # by part/file, or a variant's file
        directory=root / row["directory"] if "directory" in row else None,
    )


CATALOG = read_catalog()
