"""What a GPU is given before it serves: the fastest attention, and graphs in place of the pipeline's functions."""

from functools import partial

from models.gpu.attention import use_fastest_attention, without_masks
from models.gpu.graphs import BUCKETS, Graphed, Recorder, by_calling, on_gpu
from models.modules import TextEncoders, UNet
from models.pipeline import Pipeline, advance

STEPS_PRIORITY = -1  # of the CUDA stream that steps and encodes share; it goes before 0, the decodes'
DECODED = BUCKETS[:3]  # a decode at 1024 px fills the GPU from one row on, and each row more takes about 2 GB
SEEN_OFTEN, NEVER = 20, 1 << 62  # calls of a shape, after the warm-up, that make it worth a recording


def prepare(pipeline: Pipeline, unet: UNet) -> dict[str, float]:
    """Choose the attention kernel, and give the pipeline graphs, which the warm-up's measurements record. Returns the
    kernels' milliseconds per step."""
    measured = use_fastest_attention(pipeline.dtype)
    assert isinstance(pipeline.text, TextEncoders)
    for encoder in (pipeline.text.first, pipeline.text.second):
        without_masks(encoder)
    use_graphs(pipeline, unet, on_gpu(STEPS_PRIORITY), on_gpu(0), on_gpu(STEPS_PRIORITY))
    return measured


def use_graphs(
    pipeline: Pipeline,
    unet: UNet,
    text: Recorder = by_calling,
    decoder: Recorder = by_calling,
    steps: Recorder = by_calling,
) -> None:
    """Replace the pipeline's functions by graphs of them, each with its recorder."""
    pipeline.text = Graphed(pipeline.text, text)
    pipeline.decoder = Graphed(pipeline.decoder, decoder, DECODED)
    pipeline.steps[unet] = Graphed(partial(advance, unet), steps)


def graphs(pipeline: Pipeline) -> list[Graphed]:
    """All that the pipeline has, the decoder first."""
    functions: list[object] = [pipeline.decoder, *pipeline.steps.values(), pipeline.text]
    return [each for each in functions if isinstance(each, Graphed)]


def record_from(pipeline: Pipeline, often: int) -> None:
    """From now on record only shapes that are asked for so often: clients choose the sizes of pictures."""
    for graphed in graphs(pipeline):
        graphed.often = often
