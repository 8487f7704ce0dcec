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

    def note(title: str, batch: int, function: Callable[..., object], *arguments: object) -> None:
        took = milliseconds(lambda: function(*arguments), ours.synchronize)
        found.setdefault(title, {})[batch] = took

    for batch in batches:
        asked = list(prompts()[:batch])
        rows = ours.start(VARIANT, asked, range(batch), pixels)
        encoded = [
            (latents, ours.pipeline.prompts.encode([prompt])[0])
            for (latents, _), prompt in zip(rows, asked, strict=True)
        ]
        at = [0] * batch
        note("step, keys and values of the prompt made in each", batch, ours.step, VARIANT, encoded, at)
        with _without_graphs(ours):
            note("step, no graph", batch, ours.step, VARIANT, rows, at)
            if batch in DECODED:
                note("decode, no graph", batch, ours.decode, rows)
            note("text, no graph", batch, ours.encode_anew, asked)


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
