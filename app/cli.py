"""The command line: serve, generate (one prompt to a file, without a server), and models (list, fetch, verify)."""

import random
import sys
from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, CliApp, CliPositionalArg, CliSubCommand

from app.settings import EngineSettings, Settings
from models.catalog import CATALOG


class Serve(Settings):
    """Serve over HTTP until interrupted."""

    def cli_cmd(self) -> None:
        """Run the server."""
        from app import logs
        from app.api.deps import parts_of
        from app.http.server import serve
        from app.main import create_app

        logs.set_up(self.log_level)
        app = create_app(self)
        sys.exit(serve(app, self, parts_of({"app": app}).fleet))


class Generate(EngineSettings):
    """Draw one prompt into a file, without a server."""

    prompt: CliPositionalArg[str] = Field(description="what to draw")
    variant: str = Field("4step-unet", description="weights by name; see `models list`")
    seed: int | None = Field(None, ge=0, lt=2**32, description="random if absent")
    output: Path = Field(Path("picture.png"), description="a .png, .jpeg or .webp file")

    def cli_cmd(self) -> None:
        """Draw and save."""
        from app.offline import draw  # torch is imported here, and only for this command

        seed = random.randrange(2**32) if self.seed is None else self.seed
        draw(self, self.prompt, self.variant, seed, self.output)
        print(f"{self.output} (seed {seed})")


class Models(EngineSettings):
    """List the variants, fetch their files, or verify those that are here."""

    action: CliPositionalArg[Literal["list", "fetch", "verify"]]
    names: CliPositionalArg[list[str]] = Field(default_factory=list, description="variants; all if absent")

    def cli_cmd(self) -> None:
        """Do it; exits with 1 if anything is missing or wrong."""
        from app.offline import list_variants, weight_files

        family = CATALOG[self.model or "embedded"]
        names = self.names or list(family.variants)
        if unknown := [name for name in names if name not in family.variants]:
            sys.exit(f"no such variant: {', '.join(unknown)}; there are {', '.join(family.variants)}")
        if self.action == "list":
            list_variants(self, family)
        elif not weight_files(self, family, names, fetch=self.action == "fetch"):
            sys.exit(1)


class CommandLine(BaseSettings, cli_kebab_case=True, cli_prog_name="sdxl-lightning"):
    """Few-step text-to-image generation with SDXL-Lightning."""

    serve: CliSubCommand[Serve]
    generate: CliSubCommand[Generate]
    models: CliSubCommand[Models]

    def cli_cmd(self) -> None:
        """Run the subcommand."""
        CliApp.run_subcommand(self)


def main() -> None:
    """The entry point of `sdxl-lightning`."""
    CliApp.run(CommandLine)


if __name__ == "__main__":
    main()
