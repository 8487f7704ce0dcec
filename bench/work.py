"""What the clients ask for: prompts from the whole vocabulary, an even mix of step counts, a seed for each request."""

import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from distill.data import caption

WEIGHTS = Path(__file__).parents[1] / "models" / "embedded"
EVEN_MIX = (1, 2, 4, 8)  # steps
FOUR = (4,)


@dataclass(frozen=True)
class Work:
    """One request: a picture by the UNet variant of `steps`."""

    prompt: str
    steps: int
    seed: int

    def body(self, **more: object) -> bytes:
        """The JSON that every contender is sent; `more` are fields on top."""
        return json.dumps({**asdict(self), **more}).encode()


@cache
def prompts() -> tuple[str, ...]:
    """Every object on every background, as the model's vocabulary lists them."""
    vocabulary = json.loads((WEIGHTS / "vocabulary.json").read_text())
    return tuple(
        caption(thing["name"], ground) for thing in vocabulary["objects"] for ground in vocabulary["backgrounds"]
    )


def stream(name: str, mix: tuple[int, ...]) -> Iterator[Work]:
    """Requests without end, the same for the same name: every len(mix) of them hold each step count once, shuffled."""
    rng = random.Random(name)
    while True:
        for steps in rng.sample(mix, len(mix)):
            yield Work(rng.choice(prompts()), steps, rng.randrange(2**32))
