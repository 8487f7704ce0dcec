"""The measures, against cases where the answer is known."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

from distill import data, evaluate, judge, model


def test_the_frechet_distance_by_hand():
    """Two Gaussians along one axis: |m1 - m2|^2 + (s1 - s2)^2, summed over two independent features."""
    base = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
    base = (base - base.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(base.T.cov())).T  # exactly N(0, 1) moments
    assert judge.frechet(base, base) == pytest.approx(0, abs=1e-6)
    assert judge.frechet(base, 3 * base + 2) == pytest.approx(2 * (2**2 + (3 - 1) ** 2), rel=1e-4)


def test_a_comparison_is_paired_so_that_what_two_rows_share_does_not_widen_it():
    real = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    drawn = torch.randn(500, 2, generator=torch.Generator().manual_seed(1))
    assert evaluate.compare(drawn, drawn, real) == {"difference": 0.0, "interval_95": [0.0, 0.0]}
    shifted = evaluate.compare(drawn + 1, drawn, real)
    low, high = shifted["interval_95"]
    assert low < shifted["difference"] < high
    assert low > 0
    assert shifted["difference"] == pytest.approx(2, abs=0.5)  # 1 in each of the two features, squared


def test_real_renders_lie_at_their_own_distance_and_other_objects_further():
    pairs = data.pairs(held_out=True)[: evaluate.SEEDS]
    who = judge.Judge().eval().requires_grad_(False)
    real = evaluate.Renders(who, pairs)
    again = data.draw_batch(pairs, random.Random(3))
    others = data.draw_batch(data.pairs(held_out=True)[50 : 50 + evaluate.SEEDS], random.Random(3))
    assert real.nearest(real.pixels, evaluate.flat(again)) < 0.05 < real.nearest(real.pixels, evaluate.flat(others))
    seen, far = (real.nearest(real.features, judge.look(who, pictures)[0]) for pictures in (again, others))
    assert seen < far / 2


def test_pictures_that_are_all_alike_have_no_diversity():
    one = data.draw_batch([(0, "blue")], random.Random(0))
    assert evaluate.diversity(np.repeat(one, evaluate.SEEDS, axis=0)) == 0


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_the_leading_ablation_never_visits_the_last_timestep(steps):
    times = evaluate.leading(steps)
    assert len(times) == steps + 1
    assert times[0] == -1
    assert times[1] == 1
    assert times[-1] < 999


def test_every_row_of_the_table_is_measured(runs, tmp_path):
    evaluate.main(runs, tmp_path, count=8, judging=1)
    found = json.loads((tmp_path / "evaluation.json").read_text())
    rows, text = found["rows"], (tmp_path / "evaluation.md").read_text()
    assert {(row["model"], row["steps"]) for row in rows} == {(row.model, row.steps) for row in evaluate.ROWS}
    assert all(row["n"] == 8 for row in rows)
    assert all(f"| {row['model']} | {row['steps']} |" in text for row in rows)
    assert len(found["comparisons"]) == len(evaluate.claims())


def test_a_lora_row_is_the_merged_lora(runs):
    made = model.load_base(runs / "embedded")
    ours = evaluate.with_lora(made.unet, model.lora_file(runs / "embedded", 4))
    assert any(not torch.equal(a, b) for a, b in zip(ours.parameters(), made.unet.parameters(), strict=True))
