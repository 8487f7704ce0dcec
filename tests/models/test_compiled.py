"""Code compiled ahead of time draws what the modules draw, for any batch and every weight set bound to it."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from models import compiled
from models.aoti import Broken
from models.catalog import CATALOG, Weights
from models.device import Device, Tier
from models.pipeline import Pipeline
from models.registry import Registry
from models.weights import WeightStore

STORE = WeightStore(CATALOG["embedded"])
VARIANTS = ("1step-unet", "4step-unet", "4step-lora")
PROMPTS = ["a red apple on a blue background", "a robot", "pizza, green background"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> compiled.Recipe:
    """Built as a server builds it: by a process of its own, in about a minute."""
    recipe = compiled.Recipe(STORE, torch.float32, tmp_path_factory.mktemp("cache"))
    assert compiled.can_build(recipe.cache), "install g++"
    assert not recipe.is_built()
    build = compiled.start_build(recipe)
    _, errors = build.communicate(timeout=500)
    assert build.returncode == 0, errors.decode()[-2000:]
    assert recipe.is_built()
    return recipe


def test_compiled_steps_equal_eager_ones_at_any_batch_and_for_any_weights(recipe):
    pipeline = Pipeline(STORE, Device(), torch.float32)
    eager, fast = (Registry(STORE, Device(), torch.float32, [Tier("cpu", 1 << 40)]) for _ in range(2))
    fast.use_compiled(compiled.load_unet(recipe))
    for name in VARIANTS:
        eager.load(Weights(name))
        fast.load(Weights(name))
    for batch in (1, 3, 16, compiled.LARGEST_BATCH):
        for name in VARIANTS:
            schedule = eager.schedule(name, STORE.family.variants[name].steps)
            rows = pipeline.encode([PROMPTS[k % 3] for k in range(batch)])
            latents = torch.stack([pipeline.noise(seed, 128, 128, schedule) for seed in range(batch)])
            steps = [row % len(schedule.timesteps) for row in range(batch)]
            unets = (registry.use(Weights(name)) for registry in (fast, eager))
            ours, theirs = (pipeline.denoise(unet, schedule, latents, steps, rows) for unet in unets)
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_compiled_text_encoders_equal_eager_ones(recipe):
    eager, fast = Pipeline(STORE, Device(), torch.float32), Pipeline(STORE, Device(), torch.float32)
    fast.text = compiled.load_text(recipe)
    for ours, theirs in zip(fast.encode(PROMPTS), eager.encode(PROMPTS), strict=True):
        torch.testing.assert_close(ours.prompt_embeds, theirs.prompt_embeds, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.pooled, theirs.pooled, rtol=1e-4, atol=1e-4)


def test_the_compiled_decoder_draws_what_the_eager_one_draws(recipe):
    eager, fast = Pipeline(STORE, Device(), torch.float32), Pipeline(STORE, Device(), torch.float32)
    fast.decoder = compiled.load_decoder(recipe)
    for batch in (1, 5):
        latents = torch.randn(batch, 4, 16, 16, generator=torch.Generator().manual_seed(batch))
        latents[0] = torch.nan
        (ours, valid), (theirs, _) = fast.decode(list(latents)), eager.decode(list(latents))
        assert valid.tolist() == [False] + [True] * (batch - 1)
        assert all((a.int() - b.int()).abs().max() <= 1 for a, b in zip(ours[1:], theirs[1:], strict=True))


def test_two_threads_compute_at_the_same_time_and_each_gets_its_own_result(recipe):
    """torch's own loader would hold the interpreter's lock (pytorch issue 197516)."""
    decode = compiled.load_decoder(recipe, callers=2)
    latents = [torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(8)]
    alone = [decode(each)[0] for each in latents]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda each: decode(each)[0], latents))
    assert all(torch.equal(one, two) for one, two in zip(alone, together, strict=True))

    ticks, going = 0, threading.Thread(target=lambda: [decode(each) for each in latents])
    going.start()
    while going.is_alive():
        ticks += 1  # where the lock is held, one tick a call
    assert ticks > 100 * len(latents)


def test_weights_and_files_that_do_not_fit_are_refused(recipe, tmp_path: Path):
    registry = Registry(STORE, Device(), torch.float32, [Tier("cpu", 1 << 40)])
    registry.load(Weights("4step-unet"))
    weight_set = dict(registry.weight_set(Weights("4step-unet")))
    del weight_set["conv_in.weight"]
    with pytest.raises(Broken, match=r"conv_in\.weight"):
        compiled.load_unet(recipe)(weight_set)
    elsewhere = compiled.Recipe(STORE, torch.float32, tmp_path)
    for cut in (5000, -100):
        elsewhere.library("text").write_bytes(recipe.library("text").read_bytes()[:cut])
        with pytest.raises(Broken, match="damaged"):
            compiled.load_text(elsewhere)


def test_compiled_code_is_rebuilt_when_what_it_was_made_from_changes(tmp_path: Path, embedded_copy: Path):
    ours = compiled.Recipe(STORE, torch.float32, tmp_path)
    copy = compiled.Recipe(WeightStore(STORE.family, embedded_copy), torch.float32, tmp_path)
    assert ours.library("text") == copy.library("text")
    assert ours.library("unet") != compiled.Recipe(STORE, torch.bfloat16, tmp_path).library("unet")
    path = embedded_copy / "text_encoder" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert ours.library("text") != copy.library("text")
