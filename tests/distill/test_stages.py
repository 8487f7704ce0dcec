"""Every stage end to end at toy size, and what comes out read back by diffusers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file

from distill import data, distill, model, sheets


@pytest.fixture(scope="module")
def pipe(runs) -> StableDiffusionXLPipeline:
    pipe = StableDiffusionXLPipeline.from_pretrained(runs / "embedded")
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("steps", model.STEPS)
def test_a_step_file_is_a_strict_unet_state_dict_and_was_trained(runs, steps):
    base = UNet2DConditionModel.from_pretrained(runs / "embedded" / "unet")
    unet = UNet2DConditionModel.from_config(base.config)
    unet.load_state_dict(load_file(model.unet_file(runs / "embedded", steps)))
    assert any(not torch.equal(a, b) for a, b in zip(base.parameters(), unet.parameters(), strict=True))


@pytest.mark.parametrize("steps", [8, 4, 2])
def test_diffusers_loads_a_lora_and_fuses_what_our_merge_gives(runs, steps):
    pipe = StableDiffusionXLPipeline.from_pretrained(runs / "embedded")
    pipe.load_lora_weights(model.lora_file(runs / "embedded", steps))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    ours = pipe.unet.state_dict()
    for name, value in by_hand(runs, steps).items():
        torch.testing.assert_close(ours[name], value, atol=1e-6, rtol=1e-5)


def by_hand(runs: Path, steps: int) -> dict[str, torch.Tensor]:
    """W + alpha / rank * up @ down, from the files alone."""
    weights = UNet2DConditionModel.from_pretrained(runs / "embedded" / "unet").state_dict()
    low = {key: value.float() for key, value in load_file(model.lora_file(runs / "embedded", steps)).items()}
    for name in [
        name for name in weights if f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}.alpha" in low
    ]:
        key = f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"
        up, down, alpha = (low[f"{key}.{part}"] for part in ("lora_up.weight", "lora_down.weight", "alpha"))
        delta = (alpha / len(down)) * up.flatten(1) @ down.flatten(1)
        weights[name] = weights[name] + delta.view_as(weights[name])
    return weights


@pytest.mark.parametrize(("steps", "predicts"), [(4, "epsilon"), (1, "sample")])
def test_our_sampler_draws_what_diffusers_draws(runs, pipe, steps, predicts):
    made = model.load_base(runs / "embedded")
    made.unet = model.load_unet(made.unet, model.unet_file(runs / "embedded", steps))
    pipe.unet = made.unet
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, prediction_type=predicts)
    prompt = "a red apple on a blue background"
    with torch.no_grad():
        ours = sheets.clean_latents(made, [prompt], sheets.noise_for(1, 5), steps, predicts=predicts, exact=True)
        theirs = pipe(
            prompt,
            num_inference_steps=steps,
            guidance_scale=0,
            generator=torch.Generator().manual_seed(5),
            output_type="latent",
        ).images
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


def test_a_second_run_goes_on_from_the_checkpoints_and_writes_the_same(runs, plan):
    before = load_file(model.unet_file(runs / "embedded", 1))
    distill.main(runs, plan)
    after = load_file(model.unet_file(runs / "embedded", 1))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_vocabulary_beside_the_model_is_the_codes(runs):
    written = json.loads((runs / "embedded" / "vocabulary.json").read_text())
    assert written == json.loads(json.dumps(model.vocabulary()))
    assert {"name": "red apple", "codepoint": "1F34E"} in written["objects"]
    assert written["backgrounds"]["blue"] == data.BACKGROUNDS["blue"]


def test_the_shipped_vocabulary_agrees_with_the_code():
    shipped = Path(model.__file__).parents[1] / "models" / "embedded" / "vocabulary.json"
    assert json.loads(shipped.read_text()) == json.loads(json.dumps(model.vocabulary()))


def test_the_ablation_gets_as_many_updates(runs, plan):
    for steps, counts in plan.adversarial:
        lines = (runs / "distill_mse" / f"{steps}-mse.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["step"] == counts.updates
