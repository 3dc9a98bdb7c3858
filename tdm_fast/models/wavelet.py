"""Haar wavelets in two and three dimensions, with their filters in the state dict under Open-Sora Plan's names.

Channels are grouped by band: C input channels give all C of the lowest band, then all C of the next, and so on. The
3-D filters hold +-0.3536, the constant as stored in published weights, and not 1 / sqrt(8), so that a transform and
its inverse together multiply by (8 * 0.3536^2) = 1.0002.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdm_fast.models.causal_conv import CausalConv3d, TemporalStream, causal_pad, to_frames, to_video

HAAR_3D = 0.3536
HAAR_2D = 0.5
# Whether the filter of each band changes its sign along time, height, width; in the order of the bands.
BANDS_3D: dict[str, tuple[int, int, int]] = {
    "h": (0, 0, 0),
    "g": (0, 0, 1),
    "hh": (0, 1, 0),
    "gh": (0, 1, 1),
    "h_v": (1, 0, 0),
    "g_v": (1, 0, 1),
    "hh_v": (1, 1, 0),
    "gh_v": (1, 1, 1),
}
BANDS_2D: dict[str, tuple[int, int]] = {"aa": (0, 0), "ad": (1, 0), "da": (0, 1), "dd": (1, 1)}


def haar_filter(band: tuple[int, ...], constant: float) -> Tensor:
    """The filter of one band, shape `[1, 1, 2, 2]` or `[1, 1, 2, 2, 2]`: products of (1, 1) and (1, -1)."""
    kernel = torch.full((1, 1) + (2,) * len(band), constant)
    for axis, changes_sign in enumerate(band):
        if changes_sign:
            shape = [1] * kernel.ndim
            shape[2 + axis] = 2
            kernel = kernel * torch.tensor([1.0, -1.0]).view(shape)
    return kernel


def bank(filters: list[Tensor], channels: int) -> Tensor:
    """All bands' filters as one `[bands * channels, channels, 2, ...]` kernel that keeps the channels apart."""
    stacked = torch.cat(filters)  # [bands, 1, 2, ...]
    eye = torch.eye(channels, device=stacked.device, dtype=stacked.dtype)
    eye = eye.view(1, channels, channels, *([1] * (stacked.ndim - 2)))
    return (stacked.unsqueeze(1) * eye).flatten(0, 1)


class HaarWaveletTransform3D(nn.Module):
    """`[B, C, T, H, W]` to `[B, 8 C, (T + 1) / 2, H / 2, W / 2]` for odd T: the first frame is repeated in front."""

    def __init__(self) -> None:
        super().__init__()
        for name, band in BANDS_3D.items():
            conv = CausalConv3d(1, 1, 2, stride=2, bias=False)
            conv.conv.weight = nn.Parameter(haar_filter(band, HAAR_3D), requires_grad=False)
            self.add_module(f"{name}_conv", conv)

    def forward(self, x: Tensor, stream: TemporalStream | None = None) -> Tensor:
        kernel = bank([self.get_parameter(f"{name}_conv.conv.weight") for name in BANDS_3D], x.shape[1])
        return F.conv3d(causal_pad(self, x, 2, 2, stream), kernel, stride=2)


class InverseHaarWaveletTransform3D(nn.Module):
    """`[B, 8 C, T, H, W]` to `[B, C, 2 T - 1, 2 H, 2 W]`; only the video's first frame is dropped, not a chunk's."""

    def __init__(self) -> None:
        super().__init__()
        for name, band in BANDS_3D.items():
            self.register_buffer(name, haar_filter(band, HAAR_3D))

    def forward(self, coefficients: Tensor, stream: TemporalStream | None = None) -> Tensor:
        kernel = bank([self.get_buffer(name) for name in BANDS_3D], coefficients.shape[1] // 8)
        video = F.conv_transpose3d(coefficients, kernel, stride=2)
        return video[:, :, 1:] if stream is None or stream.first else video


class HaarWaveletTransform2D(nn.Module):
    """Per frame: `[B, C, T, H, W]` to `[B, 4 C, T, H / 2, W / 2]`."""

    def __init__(self) -> None:
        super().__init__()
        for name, band in BANDS_2D.items():
            self.register_buffer(name, haar_filter(band, HAAR_2D))

    def forward(self, x: Tensor, stream: TemporalStream | None = None) -> Tensor:
        kernel = bank([self.get_buffer(name) for name in BANDS_2D], x.shape[1])
        return to_video(F.conv2d(to_frames(x), kernel, stride=2), x.shape[0])


class InverseHaarWaveletTransform2D(nn.Module):
    """Per frame: `[B, 4 C, T, H, W]` to `[B, C, T, 2 H, 2 W]`."""

    def __init__(self) -> None:
        super().__init__()
        for name, band in BANDS_2D.items():
            self.register_buffer(name, haar_filter(band, HAAR_2D))

    def forward(self, coefficients: Tensor, stream: TemporalStream | None = None) -> Tensor:
        kernel = bank([self.get_buffer(name) for name in BANDS_2D], coefficients.shape[1] // 4)
        return to_video(F.conv_transpose2d(to_frames(coefficients), kernel, stride=2), coefficients.shape[0])
