"""How good are generated tiny-shapes clips: an attribute classifier, and a Fréchet distance between its features."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from tdm_fast.tiny_shapes import CARDINALITIES, NUM_FRAMES, RESOLUTION


class Evaluation(NamedTuple):
    """The evaluator's answer: features `[B, F]`, a tensor of logits `[B, n]` per attribute, start `[B, 2]`."""

    features: Tensor
    logits: tuple[Tensor, ...]
    start: Tensor


class ShapesEvaluator(ModelMixin, ConfigMixin):
    """Classifies size, colour, shape and direction of a clip `[B, 3, 17, 64, 64]`, and regresses where it starts.

    The regression keeps the position in the features: a generator that puts every shape in the same place then pays
    for it in Fréchet distance although each of its clips is classified correctly.
    """

    @register_to_config
    def __init__(self, width: int = 16, feature_dim: int = 32) -> None:
        super().__init__()
        widths = (3, width, 2 * width, 4 * width, 4 * width)
        kernels = ((1, 5, 5), (1, 3, 3), (3, 3, 3), (3, 3, 3))
        strides = ((2, 2, 2), (1, 2, 2), (2, 2, 2), (1, 2, 2))
        layers: list[nn.Module] = []
        for (fan_in, fan_out), kernel, stride in zip(pairwise(widths), kernels, strides, strict=True):
            padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
            layers += [nn.Conv3d(fan_in, fan_out, kernel, stride, padding), nn.GroupNorm(4, fan_out), nn.GELU()]
        self.convolutions = nn.Sequential(*layers)
        self.project = nn.Linear(4 * width * 5 * 4 * 4, feature_dim)
        # Without weights of its own it only standardises: a Fréchet distance in units of the real clips' deviation.
        self.standardise = nn.BatchNorm1d(feature_dim, affine=False)
        self.heads = nn.ModuleList(nn.Linear(feature_dim, n) for n in CARDINALITIES)
        self.start = nn.Linear(feature_dim, 2)

    def forward(self, videos: Tensor) -> Evaluation:
        """Videos `[B, 3, 17, 64, 64]` in [-1, 1]; start is in pixels divided by the resolution.

        Raises ValueError for videos of another size.
        """
        if videos.ndim != 5 or videos.shape[1:] != (3, NUM_FRAMES, RESOLUTION, RESOLUTION):
            raise ValueError(
                f"videos has shape {list(videos.shape)}; the evaluator of tiny-shapes takes"
                f" [B, 3, {NUM_FRAMES}, {RESOLUTION}, {RESOLUTION}]"
            )
        features = self.standardise(self.project(self.convolutions(videos).flatten(1)))
        hidden = F.gelu(features)
        return Evaluation(features, tuple(head(hidden) for head in self.heads), self.start(hidden))

    def loss(self, videos: Tensor, attributes: Tensor, start: Tensor) -> Tensor:
        """Cross-entropies of the attributes int64 `[B, 4]` plus the squared error of the start `[B, 2]` in pixels."""
        evaluation = self(videos)
        loss = 20 * F.mse_loss(evaluation.start, start / RESOLUTION)
        for logits, target in zip(evaluation.logits, attributes.unbind(1), strict=True):
            loss = loss + F.cross_entropy(logits, target)
        return loss


def all_correct(logits: tuple[Tensor, ...], attributes: Tensor) -> Tensor:
    """Bool `[B]`: every attribute of the clip is the one asked for (attributes int64 `[B, 4]`)."""
    return torch.stack([row.argmax(1) for row in logits], dim=1).eq(attributes).all(dim=1)


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean `[F]` and covariance `[F, F]` of features `[N, F]`, in float64."""
    features = features.double()
    return features.mean(0), torch.cov(features.T)


def frechet_distance(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
    """Squared Fréchet distance of two Gaussians given as (mean, covariance): |m1-m2|² + tr(C1 + C2 - 2 (C1 C2)^½).

    The definition used by FID (arXiv 1706.08500), with the trace of the root taken from the symmetric
    C1^½ C2 C1^½, so that rank-deficient covariances stay real.
    """
    (mean1, cov1), (mean2, cov2) = first, second
    values, vectors = torch.linalg.eigh(cov1)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp_min(0).sqrt().sum()
    return float((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross)


def frechet_interval(
    features: Tensor, reference: tuple[Tensor, Tensor], *, resamples: int = 200, seed: int = 0
) -> tuple[float, float, float]:
    """Fréchet distance of features `[N, F]` to reference moments, with its 95 % bootstrap interval: (value, low, high).

    Resampling with replacement thins the sample, which shifts every bootstrap value upwards; the interval is the
    spread of the bootstrap values about their own mean, put around the value itself.
    """
    value = frechet_distance(moments(features), reference)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.empty(resamples, dtype=torch.float64)
    for i in range(resamples):
        chosen = torch.randint(len(features), (len(features),), generator=generator)
        draws[i] = frechet_distance(moments(features[chosen]), reference)
    low, high = torch.quantile(draws - draws.mean(), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return value, max(value + low, 0.0), value + high
