"""Haar wavelets and interpolation in time, against sums written out in NumPy."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tdm_fast.models.wavelet import (
    HaarWaveletTransform2D,
    HaarWaveletTransform3D,
    InverseHaarWaveletTransform2D,
    InverseHaarWaveletTransform3D,
)
from tdm_fast.models.wfvae_layers import Spatial2xTime2x3DUpsample

# The constant of the state dict: 0.3536 in single precision.
HAAR = float(torch.tensor(0.3536))


def make_video(frames: int, height: int, width: int, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.randn(batch, 3, frames, height, width, generator=generator, dtype=torch.float64)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def test_forward_haar_3d_matches_sums() -> None:
    x = make_video(5, 4, 6, batch=2)
    got = HaarWaveletTransform3D().double()(x).numpy()
    padded = np.concatenate([x.numpy()[:, :, :1], x.numpy()], axis=2)  # causal: frame 0 twice
    for band in range(8):
        expected = np.zeros((2, 3, 3, 2, 3))
        for i, j, k in np.ndindex(2, 2, 2):
            # The band's bits, highest first, say along which of (t, h, w) the second sample is subtracted.
            sign = (-1) ** (i * (band >> 2 & 1) + j * (band >> 1 & 1) + k * (band & 1))
            expected += HAAR * sign * padded[:, :, i::2, j::2, k::2]
        np.testing.assert_allclose(got[:, 3 * band : 3 * band + 3], expected, rtol=0, atol=1e-14)


def test_haar_3d_inverse_is_perfect_up_to_the_constant() -> None:
    x = make_video(7, 4, 6, batch=2)
    back = InverseHaarWaveletTransform3D().double()(HaarWaveletTransform3D().double()(x))
    assert_close(back, x * (8 * HAAR**2), 1e-14)
    assert math.isclose(8 * HAAR**2, 1.00026, abs_tol=1e-5)


def test_haar_2d_is_orthonormal() -> None:
    x = make_video(3, 4, 6, batch=2)
    coefficients = HaarWaveletTransform2D().double()(x)
    frame = x[0, 1, 2]
    a, b, c, d = frame[2, 4], frame[2, 5], frame[3, 4], frame[3, 5]
    expected = torch.stack([a + b + c + d, a + b - c - d, a - b + c - d, a - b - c + d]) / 2
    assert_close(coefficients[0, 1::3, 2, 1, 2], expected, 1e-14)
    assert_close(coefficients.square().sum(), x.square().sum())
    assert_close(InverseHaarWaveletTransform2D().double()(coefficients), x, 1e-14)


@pytest.mark.parametrize("mode", ["nearest", "trilinear"])
@pytest.mark.parametrize("frames", [1, 2, 5])
def test_time_doubles_for_all_frames_but_the_first(mode: str, frames: int) -> None:
    layer = Spatial2xTime2x3DUpsample(1, mode).double()
    with torch.no_grad():
        layer.conv.conv.weight.zero_()[0, 0, 2, 1, 1] = 1  # the identity
        layer.conv.conv.bias.zero_()
    values = torch.randn(frames, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = layer(values.view(1, 1, -1, 1, 1))
    rest = values[1:].numpy()
    places = (np.arange(2 * len(rest)) - 0.5) / 2 if mode == "trilinear" else np.arange(2 * len(rest)) // 2
    doubled = np.interp(places, np.arange(len(rest)), rest) if len(rest) else rest
    assert_close(got[0, 0, :, 1, 1], torch.tensor([values[0].item(), *doubled], dtype=torch.float64), 1e-14)
