"""The command line: serve, generate (one prompt to a file, without a server), models (list, fetch, verify), keys (new),
and verify (which marks a file has)."""

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from PIL import Image
from pydantic import Field, ValidationError, field_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, CliApp, CliPositionalArg, CliSubCommand, SettingsError

from app import logs, uploads
from app.engine.process import QUIET
from app.errors import Problem
from app.images import MEDIA_TYPES
from app.keys import NAME, add
from app.order import PROMPT_LIMIT, SEED_LIMIT, Order, is_blank
from app.settings import EngineSettings, Settings
from app.variables import PREFIX, Variables
from models.catalog import BadCatalog


class Serve(Settings):
    """Serve over HTTP until interrupted."""

    def cli_cmd(self) -> None:
        """Run the server."""
        from app.api.deps import parts_of
        from app.http.server import serve
        from app.main import create_admin, create_app

        logs.set_up(self.log_level)
        app = create_app(self)
        parts = parts_of({"app": app})
        sys.exit(serve(app, self, parts.fleet, create_admin(parts)))


class Generate(EngineSettings):
    """Draw one prompt into a file, without a server."""

    prompt: CliPositionalArg[str] = Field(max_length=PROMPT_LIMIT, description="what to draw")
    variant: str | None = Field(None, description="weights by name; see `models list`")
    steps: int | None = Field(None, ge=1, description="alone, it means the UNet of its step count; 4 if absent")
    guidance_scale: float | None = Field(None, ge=0, description="within the variant's range; 0 and 1 mean without")
    negative_prompt: str | None = Field(None, max_length=PROMPT_LIMIT, description="what to move away from")
    width: int | None = Field(None, description="pixels; the model's own size if absent")
    height: int | None = Field(None, description="pixels; the model's own size if absent")
    lora: list[str] = Field(default_factory=list, description="NAME or NAME:SCALE, a style on top; may be repeated")
    image: Path | None = Field(None, description="a PNG, JPEG or WebP file to draw over")
    mask: Path | None = Field(None, description="the same for a mask of the image: white is drawn anew, black stays")
    strength: float | None = Field(None, gt=0, le=1, description="how much is redrawn; 0.75 if absent, with a mask 1")
    seed: int | None = Field(None, ge=0, lt=SEED_LIMIT, description="random if absent")
    output: Path = Field(Path("picture.png"), description="a .png, .jpeg or .webp file")

    @field_validator("prompt", mode="before")
    @classmethod
    def _is_text(cls, prompt: str) -> str:
        try:
            if any("\udc80" <= char <= "\udcff" for char in prompt):
                prompt = os.fsencode(prompt).decode()  # where the locale knows ASCII only
        except UnicodeError:
            raise ValueError("the prompt is not UTF-8") from None
        if is_blank(prompt):
            raise ValueError("the prompt must have a character that can be seen")
        return prompt

    def cli_cmd(self) -> None:
        """Draw and save."""
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        kind = self._kind()
        order = Order(
            owner="",
            prompt=self.prompt,
            variant=self.variant,
            styles=tuple(map(_style, self.lora)),
            negative_prompt=self.negative_prompt,
            guidance=self.guidance_scale,
            steps=self.steps,
            seed=self.seed,
            width=self.width,
            height=self.height,
            image=_read(self.image, uploads.picture, "image"),
            mask=_read(self.mask, uploads.stencil, "mask"),
            strength=self.strength,
        )
        from app.offline import draw  # torch is imported here, and only for this command

        print(f"{self.output} (seed {draw(self, order, self.output, kind)})")

    def _kind(self) -> str:
        """The format of the output. Exits with a sentence where it cannot be written."""
        kind = self.output.suffix.lower().removeprefix(".").replace("jpg", "jpeg")
        if kind not in MEDIA_TYPES:
            sys.exit(f"{self.output}: the name must end in .png, .jpeg or .webp")
        if self.output.is_dir() or not os.access(self.output if self.output.exists() else self.output.parent, os.W_OK):
            sys.exit(f"{self.output} cannot be written: its folder must be there, and writable")
        return kind


def _style(text: str) -> tuple[str, float]:
    name, _, scale = text.partition(":")
    try:
        return name, float(scale or 1)
    except ValueError:
        sys.exit(f"--lora {text}: the scale must be a number")


def _read(path: Path | None, decode: Callable[[Image.Image], uploads.Bitmap], name: str) -> uploads.Bitmap | None:
    """A picture file's pixels. Exits with a sentence where there are none."""
    try:
        return None if path is None else decode(uploads.open_file(path.read_bytes(), name))
    except OSError as error:
        sys.exit(f"{path} cannot be read: {error.strerror}")
    except Problem as error:
        sys.exit(f"{path}: {error}")


class Models(EngineSettings):
    """List the variants, fetch their files, or verify those that are here."""

    action: CliPositionalArg[Literal["list", "fetch", "verify"]]
    names: CliPositionalArg[list[str]] = Field(default_factory=list, description="variants; all if absent")

    def cli_cmd(self) -> None:
        """Do it; exits with 1 if anything is missing or wrong."""
        from app.files import list_variants, weight_files

        family = self.families[self.model or "embedded"]
        names = self.names or list(family.variants)
        if unknown := [name for name in names if name not in family.variants]:
            sys.exit(f"no such variant: {', '.join(unknown)}; there are {', '.join(family.variants)}")
        if self.action == "list":
            list_variants(self, family)
        elif not weight_files(self, family, names, fetch=self.action == "fetch"):
            sys.exit(1)


class Keys(Variables):
    """Make a key for API_KEYS_FILE, and print it: the file holds only its hash."""

    action: CliPositionalArg[Literal["new"]]
    name: CliPositionalArg[str] = Field(pattern=NAME, description="whose key it is, for the log and the metrics")
    api_keys_file: Path = Field(description="the file to append to; it is made if it is not there")
    rpm: int | None = Field(None, ge=1, le=1_000_000, description="requests a minute; by default any number")
    in_flight: int | None = Field(
        None, ge=1, le=1_000_000, description="pictures accepted and not finished; kept in the file, not enforced yet"
    )

    def cli_cmd(self) -> None:
        """Make it; exits with 1 if the file cannot take it."""
        try:
            print(add(self.api_keys_file, self.name, self.rpm, self.in_flight))
        except ValueError as error:
            sys.exit(str(error))


class Verify(Variables):
    """Say which marks of AI a picture file has: IPTC's, and a signature (C2PA), valid or not, trusted or not."""

    file: CliPositionalArg[Path]
    trust: Path | None = Field(None, description="certificates of those you trust, a PEM file")

    def cli_cmd(self) -> None:
        """Print a line per kind; exits with 1 where there is no mark, or a broken one."""
        from app.marking import verify

        try:
            lines, is_right = verify(self.file, self.trust)
        except ValueError as error:
            sys.exit(str(error))
        print(*lines, sep="\n")
        if not is_right:
            sys.exit(1)


class CommandLine(
    BaseSettings, cli_kebab_case=True, cli_prog_name="sdxl-lightning", cli_parse_none_str="\0"
):  # "null" is a prompt like others
    """Few-step text-to-image generation with SDXL-Lightning."""

    serve: CliSubCommand[Serve]
    generate: CliSubCommand[Generate]
    models: CliSubCommand[Models]
    keys: CliSubCommand[Keys]
    verify: CliSubCommand[Verify]

    def cli_cmd(self) -> None:
        """Run the subcommand."""
        CliApp.run_subcommand(self)


def main() -> None:
    """The entry point of `sdxl-lightning`."""
    logs.keep_descriptors()
    with contextlib.suppress(AttributeError, OSError):  # where it is closed, or cannot be asked
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        CliApp.run(CommandLine)
    except ValidationError as error:
        print(*map(_sentence, error.errors()), sep="\n", file=sys.stderr)
        sys.exit(2)
    except BadCatalog as error:
        sys.exit(str(error))
    except SettingsError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def _sentence(error: ErrorDetails) -> str:
    """What is wrong with a setting: its variable or flag as it was given, the value, and what is possible."""
    field = str(error["loc"][-1])
    variables = (f"{PREFIX}{field}".upper(), field.upper())
    given, flag = str(error["input"]), f"--{field.replace('_', '-')}"
    if error["type"] == "missing":
        return f"{flag}: it is required"
    name = next((each for each in variables if given and os.environ.get(each, "").lower() == given.lower()), flag)
    return f"{name}={given[:200]!r}: {error['msg'].removeprefix('Value error, ')}"


if __name__ == "__main__":
    main()
