"""Where settings come from: flags, and environment variables of the same names."""

from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

PREFIX = "SDXL_"  # SDXL_MODEL wins over MODEL, which may be another program's


class Variables(BaseSettings):
    """Settings from flags and variables."""

    model_config = SettingsConfigDict(cli_kebab_case=True, env_ignore_empty=True, allow_inf_nan=False)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        *others: object,
        **named: object,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then variables with the prefix, then plain ones."""
        return (
            init_settings,
            EnvSettingsSource(settings_cls, env_prefix=PREFIX, env_ignore_empty=True),
            EnvSettingsSource(settings_cls, env_ignore_empty=True),
        )
