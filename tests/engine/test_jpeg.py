"""JPEG files made on the device, here by Pillow in the place of nvJPEG: the rows that asked for one, and no other."""

import io
import time

import numpy as np
import pytest
import torch
from PIL import Image

from app import images
from app.engine.costs import Costs
from app.engine.jobs import Job
from app.engine.loop import Loop
from app.engine.messages import Done, Submit, frame
from app.routes.generate import _file
from models import jpeg
from models.catalog import CATALOG
from models.pipeline import Pipeline
from models.registry import Registry, Tier
from models.weights import WeightStore
from tests.engine.test_loop import Sent, serve

STORE = WeightStore(CATALOG["embedded"])
COSTS = Costs(step={1: 0.01, 4: 0.01}, decode={1: 0.01, 4: 0.02}, encode=0.0, pixels=128 * 128)


def by_pillow(pixels: torch.Tensor, quality: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "jpeg", quality=quality)
    return file.getvalue()


def test_rows_that_ask_for_jpeg_are_files_and_their_neighbours_are_pixels():
    pipeline, registry = (
        Pipeline(STORE, "cpu", torch.float32),
        Registry(STORE, "cpu", torch.float32, [Tier("cpu", 1 << 40)]),
    )
    registry.load("1step-unet")
    pipeline.jpeg = by_pillow
    sent = Sent()
    loop = Loop(pipeline, registry, COSTS, sent.append)
    wanted = {0: 0, 1: 95, 2: 0, 3: 30}
    deadline = time.monotonic() + 60
    loop.post(Submit([Job(id, "a robot", "1step-unet", 1, 7, 128, 128, deadline, wanted[id]) for id in wanted]))
    serve(loop, sent, 4)
    done = {message.id: message for message in sent if isinstance(message, Done)}
    assert {id: message.is_jpeg for id, message in done.items()} == {0: False, 1: True, 2: False, 3: True}
    pixels = np.frombuffer(done[0].pixels, np.uint8).reshape(128, 128, 3).astype(int)
    for id, error in ((1, 4), (3, 12)):
        assert abs(np.asarray(Image.open(io.BytesIO(done[id].pixels))).astype(int) - pixels).mean() < error
    assert len(done[3].pixels) < len(done[1].pixels) < pixels.size / 4
    assert len(frame(done[3])) < 128 * 128


@pytest.mark.parametrize("header", [True, False])
async def test_a_file_from_the_engine_is_answered_with_the_metadata_of_any_other(header):
    picture = np.linspace(0, 255, 64 * 64 * 3).reshape(64, 64, 3).astype(np.uint8)
    plain = by_pillow(torch.from_numpy(picture), 90)
    if not header:
        plain = plain[:2] + plain[4 + int.from_bytes(plain[4:6], "big") :]  # without JFIF's segment
    job = Job(1, "a robot", "1step-unet", 1, 7, 64, 64, 0.0, 90)
    ours = await _file(job, Done(1, 64, 64, plain, True, {}, [], False), "jpeg", 90)
    theirs = await _file(job, Done(1, 64, 64, picture.tobytes(), False, {}, [], False), "jpeg", 90)
    one, other = Image.open(io.BytesIO(ours)), Image.open(io.BytesIO(theirs))
    assert one.info["comment"] == other.info["comment"]
    assert b"Seed: 7" in one.info["comment"]
    assert one.info["xmp"] == other.info["xmp"] == images.XMP.encode()
    assert np.array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_torchvision_or_a_gpu_there_is_no_such_encoder():
    assert jpeg.on_gpu() is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nvjpeg_draws_the_picture_that_was_there():
    encode = jpeg.on_gpu()
    if encode is None:
        pytest.skip("no torchvision with nvJPEG")
    ramp = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
    picture = torch.stack([ramp, ramp.T, ramp.flip(1)], dim=2)
    with torch.cuda.stream(torch.cuda.Stream()):
        files = [encode(picture.cuda(), 95) for _ in range(20)]
    for file in files:
        assert abs(np.asarray(Image.open(io.BytesIO(file))).astype(int) - picture.numpy()).mean() < 3
