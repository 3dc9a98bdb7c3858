"""The Fréchet distance against scipy in float64, its interval, and the evaluation network's contract."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from tdm_fast import tiny_shapes
from tdm_fast.evaluator import (
    ShapesEvaluator,
    all_correct,
    frechet_distance,
    frechet_interval,
    moments,
)


def gaussian(features: int, seed: int, rank: int | None = None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(features, rank or features, generator=generator, dtype=torch.float64)
    return torch.randn(features, generator=generator, dtype=torch.float64), factor @ factor.T


def plainly(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
    """The distance as arXiv 1706.08500 writes it, with scipy's root of the product."""
    (m1, c1), (m2, c2) = [(m.numpy(), c.numpy()) for m, c in (first, second)]
    root = sqrtm(c1 @ c2)
    return float(np.sum((m1 - m2) ** 2) + np.trace(c1 + c2 - 2 * np.real(root)))


@pytest.mark.parametrize("features", [1, 2, 32])
def test_the_distance_is_scipys(features: int) -> None:
    for seed in range(3):
        first, second = gaussian(features, seed), gaussian(features, seed + 10)
        assert frechet_distance(first, second) == pytest.approx(plainly(first, second), rel=1e-9)
        assert frechet_distance(second, first) == pytest.approx(frechet_distance(first, second), rel=1e-9)


def test_the_distance_in_one_dimension_is_known() -> None:
    first = (torch.tensor([1.0]).double(), torch.tensor([[4.0]]).double())
    second = (torch.tensor([-2.0]).double(), torch.tensor([[9.0]]).double())
    assert frechet_distance(first, second) == pytest.approx((1 + 2) ** 2 + (2 - 3) ** 2, rel=1e-12)


@pytest.mark.parametrize("rank", [None, 3])
def test_equal_moments_have_no_distance(rank: int | None) -> None:
    same = gaussian(16, 0, rank)
    scale = float(same[1].trace())
    # The root of an eigenvalue that should be 0 is the root of its rounding error.
    assert abs(frechet_distance(same, same)) < scale * (1e-12 if rank is None else 1e-6)


def test_a_mean_that_moves_costs_its_square() -> None:
    mean, covariance = gaussian(8, 1)
    moved = mean + torch.full_like(mean, 0.5)
    assert frechet_distance((mean, covariance), (moved, covariance)) == pytest.approx(8 * 0.25, rel=1e-9)


def test_moments_are_numpys_in_float64() -> None:
    features = torch.randn(37, 5, generator=torch.Generator().manual_seed(0)) + 1000
    mean, covariance = moments(features)
    assert mean.dtype == covariance.dtype == torch.float64
    np.testing.assert_allclose(mean, features.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(features.double().numpy().T), rtol=1e-9)


def test_the_interval_holds_the_value_and_shrinks_with_the_sample() -> None:
    generator = torch.Generator().manual_seed(0)
    reference = moments(torch.randn(5000, 8, generator=generator))
    features = torch.randn(1024, 8, generator=generator) * 1.2 + 0.1
    widths = []
    for count in (64, 1024):
        value, low, high = frechet_interval(features[:count], reference, resamples=100)
        assert value == frechet_distance(moments(features[:count]), reference)
        assert 0 <= low < value < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 2
    assert frechet_interval(features[:64], reference) == frechet_interval(features[:64], reference)


def test_all_correct_wants_every_attribute() -> None:
    attributes = torch.tensor([[0, 1, 2, 3], [1, 5, 0, 0]])
    right = tuple(
        torch.nn.functional.one_hot(attributes[:, i], n).float() for i, n in enumerate(tiny_shapes.CARDINALITIES)
    )
    assert all_correct(right, attributes).tolist() == [True, True]
    for i in range(4):
        wrong = [logits.clone() for logits in right]
        wrong[i][1] = wrong[i][1].roll(1)
        assert all_correct(tuple(wrong), attributes).tolist() == [True, False]


def test_the_network_judges_each_clip_by_itself() -> None:
    torch.manual_seed(0)
    evaluator = ShapesEvaluator(width=4, feature_dim=6).eval()
    videos, attributes, start = tiny_shapes.sample_clips(3, seed=0)
    with torch.no_grad():
        together, alone = evaluator(videos), evaluator(videos[1:2])
    assert together.features.shape == (3, 6) and together.start.shape == (3, 2)
    assert [logits.shape for logits in together.logits] == [(3, n) for n in tiny_shapes.CARDINALITIES]
    torch.testing.assert_close(together.features[1:2], alone.features, rtol=1e-4, atol=1e-5)
    evaluator.train().loss(videos, attributes, start).backward()
    assert all(parameter.grad is not None for parameter in evaluator.parameters())


@pytest.mark.parametrize("shape", [(1, 3, 16, 64, 64), (1, 17, 3, 64, 64), (3, 17, 64, 64), (1, 3, 17, 32, 32)])
def test_clips_of_another_size_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"videos has shape .* takes \[B, 3, 17, 64, 64\]"):
        ShapesEvaluator(width=4, feature_dim=4)(torch.zeros(shape))
