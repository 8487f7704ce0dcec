"""What single techniques are worth: the same calls without them, to be read beside the stages."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from bench.gpu.ours import Ours
from bench.gpu.timing import VARIANT, milliseconds
from bench.work import prompts
from models.gpu.prepare import DECODED


def without(ours: Ours, pixels: int, batches: tuple[int, ...], found: dict[str, dict[int, float]]) -> None:
    """Milliseconds by technique left out, and batch, into `found`."""

    def note(title: str, batch: int, call: Callable[[], object]) -> None:
        found.setdefault(title, {})[batch] = milliseconds(call, ours.synchronize)

    for batch in batches:
        asked = list(prompts()[:batch])
        rows = ours.start(VARIANT, asked, range(batch), pixels)
        encoded = [
            (latents, ours.pipeline.encode([prompt])[0]) for (latents, _), prompt in zip(rows, asked, strict=True)
        ]
        at = [0] * batch
        note("step, keys and values of the prompt made in each", batch, lambda: ours.step(VARIANT, encoded, at))  # noqa: B023
        with _without_graphs(ours):
            note("step, no graph", batch, lambda: ours.step(VARIANT, rows, at))  # noqa: B023
            if batch in DECODED:
                note("decode, no graph", batch, lambda: ours.decode(rows))  # noqa: B023
            note("text, no graph", batch, lambda: ours.encode_anew(asked))  # noqa: B023


@contextmanager
def _without_graphs(ours: Ours) -> Iterator[None]:
    pipeline: Any = ours.pipeline
    text, decoder, steps = pipeline.text, pipeline.decoder, dict(pipeline.steps)
    pipeline.text, pipeline.decoder = text.function, decoder.function
    pipeline.steps.clear()
    try:
        yield
    finally:
        pipeline.text, pipeline.decoder = text, decoder
        pipeline.steps.update(steps)
