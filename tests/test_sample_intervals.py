"""Which steps and timesteps can be drawn, and how often: brute force from the words of the method."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import scipy.stats
import torch

from tdm_fast.ops import fake_score_loss, sample_intervals
from tdm_fast.ops.sample_intervals import check_intervals, trajectory_nodes
from tdm_fast.schedule import Schedule

SCHEDULES = {
    "epsilon": Schedule.ddpm(prediction_type="epsilon"),
    "v_prediction": Schedule.ddpm(prediction_type="v_prediction", rescale_betas_zero_snr=True),
    "sample": Schedule.ddpm(prediction_type="sample"),
    "flow": Schedule.flow(shift=3.0),
}
NODES = (999, 856, 665, 399)


def reachable(
    num_steps: int, total_steps: int, separate: bool, randmid: bool, nodes: tuple[int, ...] | None = None
) -> list[tuple[int, int, list[tuple[int, range]]]]:
    """(k, t_gen, [(t_mid, range of t) ...]) by the words of the method, one k after the other."""
    table = []
    for k in range(1, num_steps + 1):
        if nodes is None:
            t_gen = k * total_steps // num_steps - 1
            lower = t_gen - total_steps // num_steps + 1
        else:
            t_gen = nodes[num_steps - k]
            lower = 0 if k == 1 else nodes[num_steps - k + 1] + 1
        mids = range(lower, t_gen - 20) if randmid else [lower]
        high = t_gen - 10 if separate else total_steps - 10
        table.append((k, t_gen, [(t_mid, range(max(20, t_mid), high)) for t_mid in mids]))
    return table


INTERVAL_CASES = [
    *product([(1, 900, None), (2, 900, None), (4, 900, None), (4, 1000, NODES)], [True, False], [True, False])
]


@pytest.mark.parametrize(("steps", "separate", "randmid"), INTERVAL_CASES)
def test_intervals_reach_every_value_allowed_and_no_other(
    steps: tuple[int, int, tuple[int, ...] | None], separate: bool, randmid: bool
) -> None:
    num_steps, total_steps, nodes = steps
    options: dict[str, Any] = {"separate": separate, "randmid": randmid, "nodes": nodes}
    options |= {"num_steps": num_steps, "total_steps": total_steps}
    k, t_gen, t_mid, t = sample_intervals(60_000, seed=3, iteration=8, **options)
    assert all(values.shape == (60_000,) and values.dtype == torch.int64 for values in (k, t_gen, t_mid, t))
    table = reachable(num_steps, total_steps, separate, randmid, nodes)
    assert set(k.tolist()) == set(range(1, num_steps + 1))
    for step, node, intervals in table:
        chosen = k == step
        assert set(t_gen[chosen].tolist()) == {node}
        mids = set(t_mid[chosen].tolist())
        # 15,000 draws or more per step leave none of at most 880 values out (chance below 1e-4).
        assert mids == {mid for mid, _ in intervals}
        allowed = dict(intervals)
        assert all(value in allowed[mid] for mid, value in zip(t_mid[chosen].tolist(), t[chosen].tolist(), strict=True))
        if not randmid:
            assert set(t[chosen].tolist()) == set(intervals[0][1])


def test_intervals_are_uniform_and_independent() -> None:
    k, _, t_mid, t = sample_intervals(200_000, num_steps=4, total_steps=900, seed=1, iteration=0, randmid=True)
    assert scipy.stats.chisquare(torch.bincount(k)[1:].numpy()).pvalue > 1e-3
    second = k == 2
    mids = torch.bincount(t_mid[second] - 225)
    assert len(mids) == 449 - 20 - 225
    assert scipy.stats.chisquare(mids.numpy()).pvalue > 1e-3
    # Given t_mid, t is uniform on its range: its relative place is, up to the grid of at least 10 values.
    low, high = t_mid[second].clamp(min=20), 449 - 10
    wide = high - low > 150
    place = ((t[second] - low).double() + 0.5) / (high - low)
    counts = torch.histc(place[wide], bins=10, min=0, max=1)
    assert scipy.stats.chisquare(counts.numpy()).pvalue > 1e-3
    joint = torch.stack([torch.bincount(t[k == step] % 5, minlength=5) for step in (1, 2, 3, 4)])
    assert scipy.stats.chi2_contingency(joint.numpy()).pvalue > 1e-3


def test_intervals_do_not_depend_on_the_batch_split() -> None:
    options: dict[str, Any] = {"num_steps": 4, "total_steps": 900, "seed": 5, "stream": 1, "randmid": True}
    whole = torch.stack(sample_intervals(7, iteration=12, **options))
    parts = [sample_intervals(size, iteration=12, sample_offset=first, **options) for size, first in ((3, 0), (4, 3))]
    assert torch.equal(whole, torch.cat([torch.stack(part) for part in parts], dim=1))
    options["seed"] = torch.tensor(5)
    assert torch.equal(whole, torch.stack(sample_intervals(7, iteration=torch.tensor(12), **options)))
    options["stream"] = 0
    assert not torch.equal(whole, torch.stack(sample_intervals(7, iteration=12, **options)))
    assert [values.shape for values in sample_intervals(0, iteration=12, **options)] == [(0,)] * 4


def test_trajectory_nodes() -> None:
    assert trajectory_nodes(4, 900) == [899, 674, 449, 224]
    assert trajectory_nodes(1, 900) == [899]
    for num_steps, total_steps in ((4, 902), (0, 900), (4, 0), (7, 4)):
        with pytest.raises(ValueError, match=f"num_steps is {num_steps}.*total_steps.*{total_steps}"):
            trajectory_nodes(num_steps, total_steps)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"total_steps": 902}, r"900 or 904 would do"),
        ({"total_steps": 120}, r"\(120, 4\).*timestep 29 has no timestep left in \[20, 19\)"),
        ({"total_steps": 80, "randmid": True}, r"timestep 79 has no room for a random t_mid"),
        ({"nodes": (999, 856, 856, 399), "total_steps": 1000}, r"must descend"),
        ({"nodes": (999, 856, 665, -1), "total_steps": 1000}, r"must descend"),
        ({"nodes": ()}, r"must descend"),
        ({"nodes": (999, 500), "total_steps": 1000}, r"num_steps must be 2"),
        ({"nodes": NODES}, r"total_steps is 900.*must be 1000"),
        ({"margin": -1}, r"margin is -1"),
        ({"mid_gap": 0, "margin": 10, "randmid": True}, r"no timestep left"),
    ],
)
def test_intervals_that_cannot_work_are_refused(change: dict[str, Any], message: str) -> None:
    options = {"num_steps": 4, "total_steps": 900, **change}
    with pytest.raises(ValueError, match=message):
        check_intervals(**options)
    with pytest.raises(ValueError, match=message):
        sample_intervals(2, seed=0, iteration=0, **options)


def test_check_intervals_looks_at_the_schedule() -> None:
    assert check_intervals(4, 1000, nodes=NODES, schedule=SCHEDULES["v_prediction"]) == list(NODES)
    with pytest.raises(ValueError, match="no signal"):
        check_intervals(4, 1000, separate=False, margin=0, schedule=SCHEDULES["v_prediction"])
    with pytest.raises(ValueError, match="total_steps is 2000, but the schedule has 1000"):
        check_intervals(4, 2000, schedule=SCHEDULES["flow"])


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_the_fake_loss_has_weight_at_every_timestep_that_can_be_drawn(schedule: Schedule) -> None:
    latents = torch.zeros(1, 2)
    for steps, separate, randmid in INTERVAL_CASES:
        num_steps, total_steps, nodes = steps
        table = reachable(num_steps, total_steps, separate, randmid, nodes)
        drawable = sorted({t for _, _, intervals in table for _, values in intervals for t in values})
        assert bool((schedule.snr[drawable] > 0).all())
        for t in (drawable[0], drawable[-1]):
            loss = fake_score_loss(latents + 1, latents, snr=schedule.snr[[t]], log_weight=torch.tensor([-5.0]))
            assert float(loss) > 0
        check_intervals(num_steps, total_steps, separate=separate, randmid=randmid, nodes=nodes, schedule=schedule)
