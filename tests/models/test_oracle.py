"""Every variant retraces diffusers' own pipeline, alone and in batches whose rows stand at different steps."""

import json
import shutil
from collections.abc import Sequence

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTokenizer

from models.catalog import Weights
from models.device import Device
from models.modules import UNetFunction
from models.pipeline import Pipeline
from models.registry import Registry
from models.schedule import Schedule
from models.weights import BadWeights, WeightStore
from tests.models import oracle

PROMPTS = ("a red apple on a blue background", "yellow banana, green background", "something it has never seen", "")
VARIANTS = tuple(oracle.FAMILY.variants)
LATENTS = {"rtol": 0, "atol": 1e-4}


def draw(pipeline: Pipeline, registry: Registry, name: str, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
    """Latents after the last step."""
    return pipeline.sample(*parts(registry, name), prompts, seeds, 128, 128)


def parts(registry: Registry, name: str) -> tuple[UNetFunction, Schedule]:
    return registry.use(Weights(name)), registry.schedule(name, oracle.FAMILY.variants[name].steps[0])


@pytest.mark.parametrize("name", VARIANTS)
def test_a_picture_alone_has_diffusers_latents_and_pixels(pipeline, registry, name):
    latents = draw(pipeline, registry, name, [PROMPTS[0]], [7])
    torch.testing.assert_close(latents[0], oracle.draw(name, PROMPTS[0], 7), **LATENTS)
    pixels, valid = pipeline.draw(*parts(registry, name), [PROMPTS[0]], [7], 128, 128)
    theirs = (oracle.draw(name, PROMPTS[0], 7, "np") * 255).round().int()
    assert (pixels[0].int() - theirs).abs().max() <= 1
    assert valid.all()


@pytest.mark.parametrize("name", VARIANTS)
def test_a_batch_of_different_prompts_and_seeds_has_the_latents_of_each_alone(pipeline, registry, name):
    seeds = (7, 0, 2**32 - 1, 12345)
    latents = draw(pipeline, registry, name, PROMPTS, seeds)
    for row, prompt, seed in zip(latents, PROMPTS, seeds, strict=True):
        torch.testing.assert_close(row, oracle.draw(name, prompt, seed), **LATENTS)


@pytest.mark.parametrize("name", [name for name in VARIANTS if not name.startswith("1step")])
def test_rows_that_join_and_leave_at_different_steps_have_the_latents_of_each_alone(pipeline, registry, name):
    """Row k joins at call k and leaves when it is done, so that the batch's rows stand at different steps."""
    unet, schedule = parts(registry, name)
    steps, seeds = len(schedule.timesteps), (7, 0, 3)
    rows = [pipeline.noise(seed, 128, 128, schedule) for seed in seeds]
    conditioning = pipeline.prompts.encode(PROMPTS[:3])
    for call in range(steps + len(rows) - 1):
        at = [(k, call - k) for k in range(len(rows)) if 0 <= call - k < steps]
        moved = pipeline.denoise(
            unet,
            [schedule] * len(at),
            torch.stack([rows[k] for k, _ in at]),
            [step for _, step in at],
            [conditioning[k] for k, _ in at],
        )
        for (k, _), latents in zip(at, moved, strict=True):
            rows[k] = latents
    for latents, prompt, seed in zip(rows, PROMPTS, seeds, strict=False):
        torch.testing.assert_close(latents, oracle.draw(name, prompt, seed), **LATENTS)


def test_switching_variants_back_and_forth_leaves_no_trace(pipeline, registry):
    before = draw(pipeline, registry, "4step-lora", PROMPTS[:1], [1])
    draw(pipeline, registry, "1step-unet", PROMPTS[:1], [1])
    draw(pipeline, registry, "8step-lora", PROMPTS[:1], [1])
    torch.testing.assert_close(draw(pipeline, registry, "4step-lora", PROMPTS[:1], [1]), before, rtol=0, atol=0)


def test_a_prompt_that_is_too_long_is_reported_as_cut(pipeline):
    short, long = pipeline.prompts.encode(["a red apple", "a red apple " * 100])
    assert (short.truncated, long.truncated) == (False, True)


def test_prompts_are_cached_within_bounds(pipeline, monkeypatch):
    monkeypatch.setattr("models.prompts.CACHED", 2)
    first = pipeline.prompts.encode(["one"])[0]
    assert pipeline.prompts.encode(["one"])[0] is first
    pipeline.prompts.encode(["two", "three", "four"])
    assert pipeline.prompts.encode(["one"])[0] is not first


def test_a_picture_of_undefined_or_flat_pixels_is_found_invalid(pipeline, registry):
    good = draw(pipeline, registry, "4step-unet", PROMPTS[:1], [7])
    _, valid = pipeline.decode([good[0], torch.full_like(good[0], torch.nan)])
    assert valid.tolist() == [True, False]


def test_text_encoders_with_the_released_files_older_names_load_alike(pipeline, embedded_copy):
    path = embedded_copy / "text_encoder" / "model.safetensors"
    state = load_file(path)
    older = {f"text_model.{key.removeprefix('text_model.')}": tensor for key, tensor in state.items()}
    save_file(older | {"text_model.embeddings.position_ids": torch.arange(24)[None]}, path)
    other = Pipeline(WeightStore(oracle.FAMILY, embedded_copy), Device(), torch.float32)
    ours, theirs = (each.prompts.encode([PROMPTS[0]])[0] for each in (pipeline, other))
    torch.testing.assert_close(ours.prompt_embeds, theirs.prompt_embeds)


@pytest.mark.parametrize(
    ("added", "said"),
    [
        ({"embeddings.token_embedding.weight": torch.zeros(1717, 64)}, "a tensor twice"),
        ({"text_model.embeddings.position_ids": torch.arange(24).flip(0)[None]}, "not 0, 1, 2"),
    ],
)
def test_text_encoders_that_say_a_thing_twice_or_count_otherwise_are_refused(embedded_copy, added, said):
    path = embedded_copy / "text_encoder" / "model.safetensors"
    state = {f"text_model.{key.removeprefix('text_model.')}": tensor for key, tensor in load_file(path).items()}
    save_file(state | added, path)
    with pytest.raises(BadWeights, match=f"text_encoder: .*{said}"):
        Pipeline(WeightStore(oracle.FAMILY, embedded_copy), Device(), torch.float32)


@pytest.mark.parametrize("changed", [{"model_max_length": 10**30}, {"model_max_length": 12}, {}, None])
def test_tokenizers_read_as_much_as_the_text_encoders_whatever_their_own_folders_say(pipeline, embedded_copy, changed):
    """None: the folder as today's save_pretrained writes it."""
    for name in ("tokenizer", "tokenizer_2"):
        folder = embedded_copy / name
        path = folder / "tokenizer_config.json"
        if changed is None:
            tokenizer = CLIPTokenizer.from_pretrained(folder)
            shutil.rmtree(folder)
            tokenizer.save_pretrained(folder)
            assert {each.name for each in folder.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
            continue
        config = json.loads(path.read_text())
        del config["model_max_length"]
        path.write_text(json.dumps({**config, **changed}))
    other = Pipeline(WeightStore(oracle.FAMILY, embedded_copy), Device(), torch.float32)
    for prompt in (PROMPTS[0], "a red apple " * 100):
        ours, theirs = (each.prompts.encode([prompt])[0] for each in (pipeline, other))
        torch.testing.assert_close(ours.prompt_embeds, theirs.prompt_embeds, rtol=0, atol=0)
        assert ours.truncated == theirs.truncated
