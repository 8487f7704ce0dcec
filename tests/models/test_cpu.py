"""OpenVINO's graphs compute what the modules compute, for any weights, and every row as if it were alone."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from app.engine.load import Model, open_model
from app.settings import EngineSettings
from models.catalog import CATALOG, Style, Weights
from models.cpu import networks
from models.cpu.graphs import split
from models.device import Device, Tier
from models.pipeline import Pipeline
from models.registry import Registry
from models.styles import Styles
from models.weights import WeightStore
from tests.conftest import ROOT
from tests.models import loras

STORE = WeightStore(CATALOG["embedded"])
VARIANTS = ("1step-unet", "4step-unet", "4step-lora")
PROMPTS = ["a red apple on a blue background", "a robot", "pizza, green background"]


def opened(dtype: str, **settings: object) -> Model:
    """As a server opens it, for two calls at a time."""
    preload = ",".join(VARIANTS)
    return open_model(
        EngineSettings(
            model="embedded", device="cpu", dtype=dtype, threads=2, preload=preload, **settings
        ).engine_config()
    )


@pytest.fixture(scope="module")
def exact() -> Model:
    """In float32, with all batch sizes."""
    model = opened("float32")
    for name in VARIANTS:
        step(
            model, name, model.pipeline.prompts.encode(PROMPTS[:1]), [0]
        )  # asked for once: then larger batches are wanted
    model.device.finish(model.registry)
    return model


@pytest.fixture(scope="module")
def served() -> Model:
    """In bfloat16, whatever the CPU has for it, with the batch size that is there at first."""
    return opened("bfloat16")


@pytest.fixture(scope="module")
def eager() -> tuple[Pipeline, Registry]:
    """The modules."""
    registry = Registry(STORE, Device(), torch.float32, [Tier("cpu", 1 << 40)])
    for name in VARIANTS:
        registry.load(Weights(name))
    return Pipeline(STORE, Device(), torch.float32), registry


def step(model: Model | tuple[Pipeline, Registry], name: str | Weights, conditioning, seeds: list[int]) -> torch.Tensor:
    """Latents after a step, each row at its own step of the schedule."""
    pipeline, registry = (model.pipeline, model.registry) if isinstance(model, Model) else model
    wanted = Weights(name) if isinstance(name, str) else name
    schedule = registry.schedule(wanted.variant, STORE.family.variants[wanted.variant].steps[0])
    latents = torch.stack([pipeline.noise(seed, 128, 128, schedule) for seed in seeds])
    steps = [seed % len(schedule.timesteps) for seed in seeds]
    return pipeline.denoise(registry.use(wanted), [schedule] * len(steps), latents, steps, conditioning)


def test_text_encoders_equal_the_modules(exact, eager):
    for ours, theirs in zip(exact.pipeline.prompts.encode(PROMPTS), eager[0].prompts.encode(PROMPTS), strict=True):
        torch.testing.assert_close(ours.prompt_embeds, theirs.prompt_embeds, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.pooled, theirs.pooled, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_steps_equal_the_modules_for_any_batch_and_weights(exact, eager, name, rows):
    conditioning = eager[0].prompts.encode([PROMPTS[row % 3] for row in range(rows)])
    ours, theirs = (step(model, name, conditioning, list(range(rows))) for model in (exact, eager))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert torch.equal(step(exact, name, conditioning, list(range(rows))), ours)  # by the other worker's graph


def test_the_decoder_draws_what_the_module_draws_and_finds_what_is_undefined_or_flat(exact, eager):
    latents = torch.randn(5, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    latents[1], latents[2, 0, 3, 3] = torch.nan, torch.inf
    (ours, valid), (theirs, _) = exact.pipeline.decode(list(latents)), eager[0].decode(list(latents))
    assert valid.tolist() == [True, False, False, True, True]
    assert (ours[valid].int() - theirs[valid].int()).abs().max() <= 1
    weights = {key: torch.zeros_like(tensor) for key, tensor in eager[0].vae.vae.state_dict().items()}
    weights["decoder.conv_out.bias"][:] = torch.tensor([0.8, -0.8, 0.1])  # an even red
    plain = eager[0].vae.in_float32()
    plain.vae.load_state_dict(weights)
    assert plain(latents[:1])[1].tolist() == [False]
    flat = exact.device._graph(lambda batch: networks.decoder(weights, STORE.config("vae"), torch.float32, 16, batch))
    assert flat(latents[:1])[1].tolist() == [0.0]


def test_the_encoder_sees_what_the_module_sees_and_always_the_same_bytes(exact, served, eager):
    pictures = torch.randint(0, 256, (4, 128, 128, 3), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    for picture in pictures:
        ours, theirs = exact.pipeline.look(picture), eager[0].look(picture)
        torch.testing.assert_close(ours.mean, theirs.mean, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.std, theirs.std, rtol=1e-4, atol=1e-4)
    alone = [served.pipeline.look(picture) for picture in pictures]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(served.pipeline.look, pictures))
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one.mean, other.mean)
        assert torch.equal(one.std, other.std)


def test_a_row_has_the_same_bytes_alone_in_any_batch_in_any_thread_and_from_the_first_second_on(served):
    """The same request gives the same picture, to the byte."""
    prompts, seeds = [PROMPTS[row % 3] for row in range(7)], list(range(7))
    first = step(
        served, "4step-unet", served.pipeline.prompts.encode(prompts), seeds
    )  # row by row: nothing else is there yet
    served.pipeline.prompts.forget()
    served.device.finish(served.registry)
    encoded = served.pipeline.prompts.encode(prompts)  # 4 + 1 + 1 + 1
    assert torch.equal(step(served, "4step-unet", encoded, seeds), first)
    backwards = step(served, "4step-unet", encoded[::-1], seeds[::-1])
    assert torch.equal(backwards.flip(0), first)
    with ThreadPoolExecutor(2) as pool:
        alone = list(pool.map(lambda row: step(served, "4step-unet", [encoded[row]], [row]), seeds))
        pixels = list(pool.map(lambda latents: served.pipeline.decode([latents])[0], first))
    assert torch.equal(torch.cat(alone), first)
    assert torch.equal(torch.cat(pixels), served.pipeline.decode(list(first))[0])


def test_another_process_draws_the_same_bytes(served):
    code = (
        "from tests.models.test_cpu import *; model = opened('bfloat16'); "
        "print(float(step(model, '1step-unet', model.pipeline.prompts.encode(PROMPTS[:1]), [7]).double().sum()))"
    )
    theirs = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    ours = step(served, "1step-unet", served.pipeline.prompts.encode(PROMPTS[:1]), [7])
    assert float(theirs.split()[-1]) == float(ours.double().sum())


def test_two_threads_compute_at_the_same_time(served):
    """A call lets go of the interpreter's lock."""
    latents = list(torch.randn(40, 4, 16, 16, generator=torch.Generator().manual_seed(2)))
    served.pipeline.decode(latents[:1])
    ticks, going = 0, threading.Thread(target=lambda: served.pipeline.decode(latents))
    going.start()
    while going.is_alive():
        ticks += 1  # where the lock is held, one tick a call
    assert ticks > 100 * len(latents)


def test_styled_sets_share_graphs_and_each_row_is_computed_as_alone(eager, tmp_path):
    """In float32 as the modules compute it; in bfloat16 to the bit in any batch, and beside other styles."""
    for seed, name in enumerate("ab"):
        loras.write(tmp_path, name, loras.kohya(loras.factors({"unet": loras.layers("unet")}, seed)))
    files = Styles(tmp_path).find("ab", STORE.family)
    styled = [Weights("4step-unet", (Style(name, 1.0, files[name].id),)) for name in "ab"]
    modules = Registry(STORE, Device(), torch.float32, [Tier("cpu", 1 << 40)], styles=tmp_path)
    for dtype in ("float32", "bfloat16"):
        model = opened(dtype, lora_dir=tmp_path)
        conditioning = model.pipeline.prompts.encode([PROMPTS[row % 3] for row in range(5)])
        for wanted in styled:
            model.registry.load(wanted)
            modules.load(wanted)
        alone = {
            wanted: torch.cat([step(model, wanted, [conditioning[row]], [row]) for row in range(5)])
            for wanted in styled
        }
        model.device.finish(model.registry)
        for wanted in (*styled, *styled):
            assert torch.equal(step(model, wanted, conditioning, list(range(5))), alone[wanted])
        if dtype == "float32":
            for wanted in styled:
                theirs = step((eager[0], modules), wanted, conditioning, list(range(5)))
                torch.testing.assert_close(alone[wanted], theirs, rtol=1e-4, atol=1e-4)


def test_a_weight_set_that_lacks_a_tensor_is_refused_by_its_name(exact):
    weights = dict(exact.registry.weight_set(Weights("4step-unet")))
    del weights["mid_block.resnets.0.conv1.weight"]
    with pytest.raises(KeyError, match=r"mid_block\.resnets\.0\.conv1\.weight"):
        networks.unet(weights, STORE.config("unet"), torch.float32, 16, 24, 1)


@pytest.mark.parametrize("change", [{"act_fn": "mish"}, {"upcast_attention": True}, {"class_embed_type": "timestep"}])
def test_a_network_of_another_kind_runs_as_modules(change):
    unet, vae = {**STORE.config("unet"), **change}, STORE.config("vae")
    text = [STORE.config("text_encoder"), STORE.config("text_encoder_2")]
    assert networks.can_be_built(STORE.config("unet"), vae, text)
    assert not networks.can_be_built(unet, vae, text)


def test_rows_are_split_into_the_sizes_there_are():
    assert split(7, [1, 4]) == [4, 1, 1, 1]
    assert split(3, [1]) == [1, 1, 1]


def test_nothing_is_reported_to_anybody():
    """OpenVINO's tools tell their makers of conversions unless they are kept from it: no socket leaves this machine."""
    code = """
import socket
def refused(self, address, *rest):
    raise SystemExit(f"a connection to {address}")
socket.socket.connect = socket.socket.connect_ex = refused
socket.getaddrinfo = refused
from tests.models.test_cpu import *
model = opened("float32")
step(model, "4step-unet", model.pipeline.prompts.encode(PROMPTS), [0, 1, 2])
import openvino
openvino.convert_model(torch.nn.Linear(2, 2), example_input=torch.zeros(1, 2))
assert sys.modules["openvino_telemetry"] is None
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
