"""Guidance and long prompts, against diffusers' pipeline and compel."""

import pytest
import torch
from compel import Compel, ReturnedEmbeddingsType
from compel.embeddings_provider import SplitLongTextMode
from torch import Tensor

from models.catalog import Weights
from models.device import Device
from models.pipeline import Pipeline
from models.prompts import Conditioning
from models.weights import WeightStore
from tests.models import oracle

APPLE, CAT = "a red apple on a blue background", "a cat on a yellow background"
LONG = " ".join(
    f"{color} {thing}," for thing in ("apple", "banana", "cat", "robot") for color in ("red", "blue", "green")
)
LATENTS = {"rtol": 0, "atol": 1e-4}
VARIANTS = ("1step-unet", "4step-unet", "2step-lora")


@pytest.fixture(scope="module")
def compel() -> Compel:
    theirs = oracle.diffusers_pipeline("4step-unet")
    return Compel(
        tokenizer=[theirs.tokenizer, theirs.tokenizer_2],
        text_encoder=[theirs.text_encoder, theirs.text_encoder_2],
        returned_embeddings_type=ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED,
        requires_pooled=[False, True],
        truncate_long_prompts=False,
        split_long_text_mode=SplitLongTextMode.BRUTAL,
    )


def guided(pipeline: Pipeline, prompt: str, negative: str | None, guidance: float) -> Conditioning:
    (row,) = pipeline.prompts.encode([prompt])
    return pipeline.prompts.guide(row, None if negative is None else pipeline.prompts.encode([negative])[0], guidance)


def diffusers_latents(name: str, seed: int, guidance: float, **prompts: object) -> Tensor:
    steps = oracle.FAMILY.variants[name].steps[0]
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = oracle.diffusers_pipeline(name)(
        num_inference_steps=steps, guidance_scale=guidance, generator=generator, output_type="latent", **prompts
    )
    return drawn.images[0]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("negative", "guidance"), [(None, 1.5), ("", 2.0), (CAT, 3.0), ("red", 1.01)])
def test_a_guided_picture_has_diffusers_latents(pipeline, registry, name, negative, guidance):
    parts = registry.use(Weights(name)), registry.schedule(name, oracle.FAMILY.variants[name].steps[0])
    ours = pipeline.sample(*parts, [APPLE], [7], 128, 128, negative, guidance)[0]
    theirs = diffusers_latents(name, 7, guidance, prompt=APPLE, negative_prompt=negative)
    torch.testing.assert_close(ours, theirs, **LATENTS)


def test_an_absent_negative_prompt_is_the_empty_one_where_the_model_says_so(pipeline, embedded_copy):
    index = embedded_copy / "model_index.json"
    index.write_text(
        index.read_text().replace('"force_zeros_for_empty_prompt": true', '"force_zeros_for_empty_prompt": false')
    )
    other = Pipeline(WeightStore(oracle.FAMILY, embedded_copy), Device(), torch.float32)
    absent, empty = (guided(other, APPLE, negative, 2.0).away for negative in (None, ""))
    torch.testing.assert_close(absent.prompt_embeds, empty.prompt_embeds, rtol=0, atol=0)
    assert not guided(pipeline, APPLE, None, 2.0).away.prompt_embeds.any()


def test_guided_and_unguided_rows_share_calls_and_have_the_latents_of_each_alone(pipeline, registry):
    unet, schedule = registry.use(Weights("4step-unet")), registry.schedule("4step-unet", 4)
    (plain,) = pipeline.prompts.encode([CAT])
    rows = [plain, guided(pipeline, APPLE, None, 2.0), plain, guided(pipeline, CAT, "yellow", 1.5)]
    latents = torch.stack([pipeline.noise(seed, 128, 128, schedule) for seed in (1, 2, 3, 4)])
    alone = [row[None] for row in latents]
    for step in range(4):
        latents = pipeline.denoise(unet, [schedule] * 4, latents, [step] * 4, rows)
        alone = [pipeline.denoise(unet, [schedule], x, [step], [row]) for x, row in zip(alone, rows, strict=True)]
    torch.testing.assert_close(latents, torch.cat(alone), **LATENTS)
    theirs = diffusers_latents("4step-unet", 4, 1.5, prompt=CAT, negative_prompt="yellow")
    torch.testing.assert_close(latents[3], theirs, **LATENTS)


@pytest.mark.parametrize("words", [1, 8, 9, 20, 22, 23, 36])
def test_prompts_of_up_to_three_chunks_have_compels_embeddings(pipeline, compel, words):
    prompt = " ".join(LONG.replace(",", "").split()[:words] + LONG.split()[: max(0, words - 24)])
    (ours,) = pipeline.prompts.encode([prompt])
    embeds, pooled = compel(prompt)
    torch.testing.assert_close(ours.prompt_embeds, embeds[0], **LATENTS)
    torch.testing.assert_close(ours.pooled, pooled[0], **LATENTS)
    assert ours.tokens == len(oracle.diffusers_pipeline("4step-unet").tokenizer(prompt).input_ids) - 2
    assert not ours.truncated


def test_what_is_behind_the_third_chunk_is_cut_and_told(pipeline):
    ours, shorter = pipeline.prompts.encode([f"{LONG} {LONG}", f"{LONG} a red apple"])
    assert (ours.truncated, shorter.truncated) == (True, False)
    assert (len(ours.prompt_embeds), len(shorter.prompt_embeds)) == (3 * 24, 2 * 24)


@pytest.mark.parametrize(("prompt", "negative"), [(LONG, "green"), ("a red apple", LONG), (LONG, None), (LONG, "")])
def test_long_guided_prompts_have_diffusers_latents_of_compels_embeddings(pipeline, registry, compel, prompt, negative):
    embeds, pooled = compel(prompt)
    away, away_pooled = (torch.zeros_like(embeds), torch.zeros_like(pooled)) if negative is None else compel(negative)
    embeds, away = compel.pad_conditioning_tensors_to_same_length([embeds, away], compel("")[0])
    given = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    given |= {"negative_prompt_embeds": away, "negative_pooled_prompt_embeds": away_pooled}
    parts = registry.use(Weights("4step-unet")), registry.schedule("4step-unet", 4)
    ours = pipeline.sample(*parts, [prompt], [7], 128, 128, negative, 2.0)[0]
    torch.testing.assert_close(ours, diffusers_latents("4step-unet", 7, 2.0, **given), **LATENTS)
