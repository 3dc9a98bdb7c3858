"""The normals that the kernels make: float64's Box-Muller on the same words, their distribution, no draw twice."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import scipy.stats
import torch
from torch import Tensor

from tdm_fast import ops
from tdm_fast.philox import Purpose, randn
from tdm_fast.schedule import Schedule

FLOW = Schedule.flow(shift=3.0)


def noise_of(batch: int, size: int, **draw: Any) -> Tensor:
    """The noise that renoise makes, bare: zeros stay zeros, and beta is sigma, 1 at flow's last timestep."""
    last, clean = torch.full((batch,), 999), torch.full((batch,), -1)
    assert float(FLOW.sigma[999]) == 1.0
    zeros = torch.zeros(1, 1).expand(batch, size)
    options: dict[str, Any] = {"schedule": FLOW, "t_gen": last, "t_mid": clean, "t": last, "backend": "cpp"}
    return ops.renoise(zeros, zeros, **options, **{"seed": 1, "iteration": 2, **draw})[0]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 127, 513, 4099])
def test_within_1e6_of_float64(size: int) -> None:
    draw = {"seed": (1 << 62) + 3, "iteration": (1 << 32) - 1, "stream": 3, "sample_offset": (1 << 32) - 2}
    exact = randn(3, (size,), purpose=Purpose.RENOISE, dtype=torch.float64, **draw)
    assert (noise_of(3, size, **draw) - exact).abs().max() < 1e-6
    as_tensors = {name: torch.tensor(draw[name]) for name in ("seed", "iteration")}
    assert torch.equal(noise_of(3, size, **{**draw, **as_tensors}), noise_of(3, size, **draw))


def test_ten_million() -> None:
    """Against float64 on the same words, to the last of them; then moments, tails and Kolmogorov-Smirnov."""
    count = 10_000_000
    normals = noise_of(10, count // 10).flatten()
    largest = 0.0
    for sample in range(10):
        exact = randn(
            1, (count // 10,), seed=1, iteration=2, purpose=Purpose.RENOISE, sample_offset=sample, dtype=torch.float64
        )
        largest = max(largest, float((normals[sample * count // 10 :][: count // 10] - exact).abs().max()))
    assert largest < 1e-6
    values = normals.double()
    # Standard deviations of the moments of `count` normals; 4 of them are passed with probability 1 - 6e-5.
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((values**power).mean()) - expected) < 4 * math.sqrt(variance / count)
    for bound in (3.0, 4.0, 5.0):
        tail = 2 * scipy.stats.norm.sf(bound) * count
        assert abs(float((values.abs() > bound).sum()) - tail) < 4 * math.sqrt(tail) + 1
    assert scipy.stats.kstest(values.numpy(), "norm").pvalue > 1e-3
    pairs = values.reshape(-1, 4)
    correlation = torch.corrcoef(pairs.T) - torch.eye(4)
    assert float(correlation.abs().max()) < 4 / math.sqrt(len(pairs))


def test_no_two_draws_overlap() -> None:
    """Streams, iterations, seeds and samples: no two have a block's four numbers in common, as shared words would."""
    draws: list[dict[str, Any]] = [{}, {"stream": 1}, {"stream": 2}, {"iteration": 3}, {"seed": 2}]
    draws += [{"seed": 1 + (1 << 32)}, {"sample_offset": 9}]
    rows = torch.cat([noise_of(3, 4096, **draw) for draw in draws]).reshape(-1, 4)
    assert len(rows.unique(dim=0)) == len(rows)
    words = torch.cat([randn(3, (4096,), seed=1, iteration=2, purpose=purpose) for purpose in Purpose]).reshape(-1, 4)
    assert len(words.unique(dim=0)) == len(words)


def test_splits_of_the_batch_agree() -> None:
    whole = noise_of(7, 1001)
    for cuts in itertools.combinations(range(8), 2):
        part = noise_of(cuts[1] - cuts[0], 1001, sample_offset=cuts[0])
        assert torch.equal(part, whole[cuts[0] : cuts[1]])
    assert torch.equal(noise_of(7, 900), whole[:, :900])
