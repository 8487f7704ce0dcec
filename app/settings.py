"""All settings, from environment variables or flags of the same names; the README's table lists them."""

import logging
import tempfile
from functools import cached_property
from pathlib import Path
from typing import Literal

import msgspec
from pydantic import Field, ValidationInfo, field_validator

from app import keys
from app.check import load
from app.engine.cores import usable_cores
from app.engine.gpus import visible_gpus
from app.engine.messages import EngineConfig
from app.lists import check_aliases, check_matching, listed, pairs
from app.variables import Variables
from models.catalog import BadCatalog, Family, families

GIB = 2**30
ANY_STEPS = "sdxl-lightning"  # the name of the model as a whole: which variant draws, follows from the steps

log = logging.getLogger("app.settings")


class EngineSettings(Variables):
    """What a run of the model needs, with or without a server."""

    catalog: Path | None = Field(
        None, description="a TOML file with families of your own, as docs/models.example.toml; MODEL names one"
    )
    model: str | None = Field(
        None,
        validate_default=True,
        description="the model family, sdxl, embedded or one of the catalog's; by default sdxl if CUDA and its weights "
        "are there, else embedded",
    )
    model_dir: Path | None = Field(None, description="a local directory with the family's files, instead of the hub")
    lora_dir: Path | None = Field(
        None,
        description="a folder of style LoRAs, each .safetensors file one by its name; by default loras/ in the model's "
        "own directory",
    )
    device: Literal["cpu", "cuda"] | None = Field(None, description="by default cuda if there is one, else cpu")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="by default float16 on CUDA; on a CPU bfloat16 where it has it in hardware, else float32"
    )
    threads: int | None = Field(
        None, ge=1, le=1024, description="threads on a CPU; by default all cores that this process may use"
    )
    max_batch: int | None = Field(
        None, ge=1, le=32, description="largest batch to measure; by default 16 on a CPU, 8 on CUDA"
    )
    preload: str | None = Field(
        None,
        description="variants in memory before the first request, by name, with commas between; by default all of the "
        "embedded model's, of SDXL the 4-step UNet",
    )
    device_budget_gib: float | None = Field(
        None, gt=0, description="GPU memory for weight sets, GiB; by default what the card has to spare"
    )
    host_budget_gib: float = Field(16.0, gt=0, description="host memory for weight sets, GiB (pinned on CUDA)")
    compile: bool = Field(
        True, description="compile in the background: the embedded model on a CPU, the UNet and the decoder on CUDA"
    )
    fp8: bool = Field(
        False, description="the UNet's large linear layers in fp8 (CUDA, compute capability 8.9 or higher)"
    )
    cache_dir: Path = Field(
        Path("~/.cache/sdxl-lightning-server"), description="where compiled code is kept; safe to delete"
    )

    @field_validator("cache_dir", mode="before")
    @classmethod
    def _not_the_working_directory(cls, value: object) -> object:
        if not str(value):
            raise ValueError("must name a directory")
        return value

    @field_validator("model")
    @classmethod
    def _is_in_a_catalog(cls, value: str | None, info: ValidationInfo) -> str | None:
        catalogs = _texts(info.data.get("catalog"))
        known = families(catalogs)
        if value not in (known if catalogs else [None, *known]):
            raise ValueError(f"it must be one of {', '.join(known)}")
        return value

    @field_validator("model_dir", "lora_dir", "catalog")
    @classmethod
    def _home(cls, value: Path | None) -> Path | None:
        try:
            return value and value.expanduser()
        except RuntimeError as error:  # no HOME, and a uid without a name; or no such user
            raise ValueError(f"~ stands for nothing here: {error}") from error

    @cached_property
    def _catalogs(self) -> dict[str, str]:
        return _texts(self.catalog)

    @property
    def families(self) -> dict[str, Family]:
        """All that could be served, by name. Raises models.catalog.BadCatalog."""
        return families(self._catalogs)

    def engine_config(self) -> EngineConfig:
        """The part that the engine process is told."""
        try:
            cache = self.cache_dir.expanduser()
        except RuntimeError:
            cache = Path(tempfile.mkdtemp(prefix="sdxl-lightning-"))
            log.warning("no home directory: compiled code is kept in %s, for this run only; set CACHE_DIR", cache)
        return EngineConfig(
            model=self.model,
            catalogs=self._catalogs,
            directory=str(self.model_dir.resolve()) if self.model_dir else None,
            device=self.device,
            dtype=self.dtype,
            threads=self.threads,
            max_batch=self.max_batch,
            preload=listed(self.preload) or None,
            device_budget=int(self.device_budget_gib * GIB) if self.device_budget_gib else None,
            host_budget=int(self.host_budget_gib * GIB),
            compile=self.compile,
            fp8=self.fp8,
            cache=str(cache),
            styles=str(self.lora_dir.resolve()) if self.lora_dir else None,
        )


def _texts(catalog: Path | None) -> dict[str, str]:
    """A catalog's text by its path. Raises BadCatalog."""
    try:
        return {str(catalog.resolve()): catalog.read_text()} if catalog else {}
    except (OSError, ValueError) as error:
        raise BadCatalog(f"CATALOG={catalog}: {getattr(error, 'strerror', error)}") from error


class Settings(EngineSettings):
    """The server's settings."""

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for all of IPv4, :: for all of IPv6 only")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    admin_port: int | None = Field(
        None, ge=1, le=65535, description="a port on 127.0.0.1 for /metrics, which then is on no other"
    )
    api_keys_file: Path | None = Field(
        None, description="who may draw: a file that `sdxl-lightning keys new NAME` writes; by default everybody"
    )
    allowed_hosts: str | None = Field(
        None,
        description="names that the Host header may have, with commas between, *.example.com too; by default any where "
        "HOST is reached from other machines, else only localhost; IP addresses always",
    )
    allowed_origins: str | None = Field(
        None, description="web pages of other origins that may use this server (CORS), with commas between, or *"
    )
    root_path: str = Field(
        "", pattern=r"^(/[\w.~-]+)*$", description="the path under which a proxy shows this server, e.g. /sdxl"
    )
    queue_limit: int = Field(256, ge=1, le=100_000, description="pictures accepted and not finished; more get a 429")
    timeout_s: float = Field(30.0, gt=0, le=3600, description="a request's deadline where it names none, seconds")
    max_timeout_s: float = Field(300.0, gt=0, le=3600, description="the longest deadline a request may name, seconds")
    max_pixels: int = Field(8 * 1536 * 1536, ge=64, description="n x width x height of one request at the most")
    max_body_mib: float = Field(20.0, ge=0.0625, le=1024, description="a request with pictures in it, MiB")
    max_bodies_mib: float = Field(200.0, ge=1, description="all such requests that are received or served, MiB")
    min_upload_kb_s: float = Field(100.0, gt=0, description="the slowest that such a request may arrive, kB/s")
    size_policy: Literal["nearest", "strict"] = Field(
        "nearest",
        description="what the OpenAI, A1111 and Hugging Face routes do with a size that the model cannot draw: take "
        "the nearest that it can, and say so, or refuse it, as /generate does",
    )
    model_aliases: str = Field(
        "dall-e-2,dall-e-3,gpt-image-1,gpt-image-1.5,default",
        description="model names that clients insist on, with commas between: each means sdxl-lightning, whose variant "
        "follows from the steps; NAME=VARIANT binds it to one",
    )
    drain_s: float = Field(60.0, ge=0, le=3600, description="how long SIGTERM waits for accepted requests, seconds")
    max_connections: int = Field(4096, ge=8, le=1_000_000, description="open at once; for more, idle ones are closed")
    send_timeout_s: float = Field(
        60.0, gt=0, le=3600, description="how long an answer may wait to be read by its client, seconds"
    )
    start_timeout_s: float = Field(
        600.0, gt=0, le=86400, description="an engine that is not ready after this is killed; to download takes longer"
    )
    load_on_demand: bool = Field(True, description="load, or fetch, the weights that a request names; else refuse it")
    devices: str | None = Field(
        None,
        description="GPUs with an engine each: numbers as nvidia-smi has them, or UUIDs (also MIG's), with commas "
        "between; or all",
    )
    engines: int | None = Field(
        None, ge=1, le=64, description="engines on a CPU, which share its threads; each holds the weights for itself"
    )
    c2pa_cert: Path | None = Field(
        None, description="sign pictures (C2PA): a PEM file of the certificate, then of those that vouch for it"
    )
    c2pa_key: Path | None = Field(None, validate_default=True, description="the certificate's private key, a PEM file")
    check: str | None = Field(
        None, description="a check of pictures, module:function, which flags or refuses them (docs/marking.md)"
    )
    check_timeout_s: float = Field(5.0, gt=0, le=3600, description="how long the check may take of a picture, seconds")
    check_fails: Literal["closed", "open"] = Field(
        "closed", description="what happens to a picture where the check fails: it is not sent, or it is"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe log line written")

    @field_validator("c2pa_key")
    @classmethod
    def _can_sign(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        from app.marking import Signer  # Pillow and c2pa, which other commands do without

        certificate = info.data.get("c2pa_cert")
        if (value is None) != (certificate is None):
            raise ValueError("C2PA_CERT and C2PA_KEY go together")
        if value and certificate:
            Signer(certificate, value)
        return value

    @field_validator("check")
    @classmethod
    def _is_function(cls, value: str | None) -> str | None:
        if value is not None:
            load(value)
        return value

    @field_validator("log_level", mode="before")
    @classmethod
    def _any_case(cls, value: object) -> object:
        return value.lower() if isinstance(value, str) else value

    @field_validator("api_keys_file")
    @classmethod
    def _has_keys(cls, value: Path | None) -> Path | None:
        if value is not None:
            keys.read(value)
        return value

    @field_validator("allowed_origins", "allowed_hosts")
    @classmethod
    def _could_match(cls, value: str | None, info: ValidationInfo) -> str | None:
        check_matching(str(info.field_name), value)
        return value

    @field_validator("model_aliases")
    @classmethod
    def _mean_something(cls, value: str, info: ValidationInfo) -> str:
        known = families(_texts(info.data.get("catalog"))).values()
        check_aliases(value, {name for family in known for name in family.variants})
        return value

    @field_validator("host")
    @classmethod
    def _without_brackets(cls, value: str) -> str:
        return value.strip("[]")

    @field_validator("devices")
    @classmethod
    def _each_once(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None:
            return None
        if info.data.get("device") == "cpu":
            raise ValueError("names GPUs, but DEVICE is cpu; leave one of them out")
        gpus = visible_gpus() if value == "all" else [name.strip() for name in value.split(",")]
        if not all(gpus) or len({*gpus}) < len(gpus):
            raise ValueError("must name each GPU once, with commas between")
        return ",".join(gpus)

    @field_validator("engines")
    @classmethod
    def _on_a_cpu(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("devices") is not None:
            raise ValueError("is for a CPU, while DEVICES has one engine per GPU; leave one of them out")
        if value is not None and info.data.get("device") not in (None, "cpu"):
            raise ValueError("is for a CPU, but DEVICE is cuda; name GPUs by DEVICES")
        return value

    def engine_configs(self) -> list[EngineConfig]:
        """What each engine is told. The CPU's threads and the host's memory are divided."""
        whole = self.engine_config()
        if self.devices is None and self.engines is None:
            return [whole]
        gpus = self.devices.split(",") if self.devices else [None] * (self.engines or 1)
        threads, count = self.threads or usable_cores(), len(gpus)
        return [
            msgspec.structs.replace(
                whole,
                device="cpu" if gpu is None else "cuda",
                threads=max(1, threads // count + (number < threads % count)),
                host_budget=whole.host_budget // count,
                name=gpu or str(number),
                gpu=gpu,
            )
            for number, gpu in enumerate(gpus)
        ]

    @cached_property
    def aliases(self) -> dict[str, str]:
        """What each of the model_aliases means."""
        return {name: variant or ANY_STEPS for name, variant in pairs(self.model_aliases).items()}

    def engine_config(self) -> EngineConfig:
        """With what only a server has."""
        return msgspec.structs.replace(
            super().engine_config(), log_level=self.log_level, start_timeout=self.start_timeout_s
        )

    @field_validator("max_bodies_mib", "max_timeout_s")
    @classmethod
    def _covers_one(cls, value: float, info: ValidationInfo) -> float:
        one = {"max_bodies_mib": "max_body_mib", "max_timeout_s": "timeout_s"}[info.field_name or ""]
        if value < info.data.get(one, 0):
            raise ValueError(f"must not be below {one.upper()}")
        return value
