"""`models`: what weight files there are, without a model."""

from collections.abc import Callable

from app.settings import EngineSettings
from models.catalog import Family, one_of
from models.weights import BadWeights, MissingWeights, WeightStore


def list_variants(settings: EngineSettings, family: Family) -> None:
    """Print every variant, its steps, and whether its file is here."""
    here = WeightStore(family, settings.model_dir).variants_here()
    for variant in family.variants.values():
        where = "here" if variant.name in here else "not here"
        print(f"{variant.name}  {one_of(variant.steps)} steps  {where}  {variant.file or 'its own UNet'}")


def weight_files(settings: EngineSettings, family: Family, names: list[str], fetch: bool) -> bool:
    """Fetch (where asked) and verify the base and the named variants; prints a line each. False if any is not right."""
    store = WeightStore(family, settings.model_dir)
    right = True
    for name in (*family.components, *names):
        right &= _report(name, lambda: store.verify(name, download=fetch))  # noqa: B023
    return right


def _report(name: str, check: Callable[[], str]) -> bool:
    try:
        print(f"{name}: {check()}")
    except (MissingWeights, BadWeights, OSError) as error:
        print(f"{name}: {error}")
        return False
    return True
