"""Layers of CausalVAE that WF-VAE does not have, and which layer each name in a config means.

Every layer takes and gives `[B, C, T, H, W]`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdm_fast.models.causal_conv import CausalConv3d, FrameConv2d, TemporalStream, causal_pad, double_space
from tdm_fast.models.wfvae_layers import (
    Downsample,
    FrameAttention,
    ResnetBlock2D,
    ResnetBlock3D,
    Spatial2xTime2x3DDownsample,
    Spatial2xTime2x3DUpsample,
    Upsample,
)


class MixedFrameAttention(FrameAttention):
    """`AttnBlock3D` in configs: attention of the first models, which cuts `[C, T, H, W]` into T pieces where it lies.

    A piece is a frame only if T = 1; otherwise it is C / T channels of all frames. Weights trained so need it so.
    """

    def forward(self, x: Tensor, stream: TemporalStream | None = None) -> Tensor:
        batch, channels, frames, height, width = x.shape
        h = self.norm(x)
        # [B, C, T, H, W] -> [B, T, C, H * W] without moving a number, then positions before channels.
        q, k, v = (
            layer(h).reshape(batch, frames, channels, height * width).transpose(2, 3)
            for layer in (self.q, self.k, self.v)
        )
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h.transpose(2, 3).reshape(x.shape))


class SpatialDownsample2x(nn.Module):
    """As `Downsample`, its kernel stored as a 3-D one."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, (1, 3, 3), stride=(1, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class SpatialUpsample2x(nn.Module):
    """As `Upsample`, its kernel stored as a 3-D one."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, (1, 3, 3), padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(double_space(x, "nearest"))


class Spatial2x3DDownsample(nn.Module):
    """Halves height and width: causal 3 x 3 x 3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, stride=(1, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Spatial2x3DUpsample(nn.Module):
    """Doubles height and width: bilinear, then a causal 3 x 3 x 3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(double_space(x, "bilinear"))


class TimeDownsample2x(nn.Module):
    """Halves time (T to (T + 1) / 2): the mean of a frame and the two before it."""

    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return halve_time(causal_pad(self, x, 3, 2, None))


class TimeUpsample2x(nn.Module):
    """Doubles time for all frames but the first (T to 2 T - 1), by linear interpolation."""

    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return double_time(x)


class TimeDownsampleRes2x(nn.Module):
    """Halves time: `TimeDownsample2x` and a 3 x 3 x 3 convolution, mixed by a learned sigmoid."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, channels, 3, stride=(2, 1, 1), padding=(0, 1, 1))
        self.mix_factor = nn.Parameter(torch.tensor([2.0]))

    def forward(self, x: Tensor) -> Tensor:
        x = causal_pad(self, x, 3, 2, None)
        return mixed(self.conv(x), halve_time(x), self.mix_factor)


class TimeUpsampleRes2x(nn.Module):
    """Doubles time: `TimeUpsample2x`, and a causal convolution of it, mixed by a learned sigmoid."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, padding=1)
        self.mix_factor = nn.Parameter(torch.tensor([2.0]))

    def forward(self, x: Tensor) -> Tensor:
        x = double_time(x)
        return mixed(self.conv(x), x, self.mix_factor)


def mixed(convolved: Tensor, plain: Tensor, mix_factor: Tensor) -> Tensor:
    """`plain` by the sigmoid of `mix_factor` and `convolved` by the rest, in the dtype of `plain`.

    Under autocast the three differ in their dtypes, which torch.lerp does not take.
    """
    return torch.lerp(convolved.to(plain.dtype), plain, torch.sigmoid(mix_factor).to(plain.dtype))


def halve_time(padded: Tensor) -> Tensor:
    """Means of three frames, every other one, of a video with two frames put in front."""
    # By slices, because torch pools no bfloat16 on CPUs.
    return (padded[:, :, :-2:2] + padded[:, :, 1:-1:2] + padded[:, :, 2::2]) / 3


def double_time(x: Tensor) -> Tensor:
    """T to 2 T - 1 frames: the first stays, the others are interpolated among themselves."""
    if x.shape[2] == 1:
        return x
    rest = F.interpolate(x[:, :, 1:], scale_factor=(2.0, 1.0, 1.0), mode="trilinear")
    return torch.cat([x[:, :, :1], rest], dim=2)


class Resampling(NamedTuple):
    """A layer that changes a video's size, made from a number of channels, and by how much along time and space."""

    make: Callable[[int], nn.Module]
    time: int
    space: int


DOWNSAMPLING = {
    "Downsample": Resampling(Downsample, 1, 2),
    "SpatialDownsample2x": Resampling(SpatialDownsample2x, 1, 2),
    "Spatial2x3DDownsample": Resampling(Spatial2x3DDownsample, 1, 2),
    "Spatial2xTime2x3DDownsample": Resampling(Spatial2xTime2x3DDownsample, 2, 2),
    "TimeDownsample2x": Resampling(TimeDownsample2x, 2, 1),
    "TimeDownsampleRes2x": Resampling(TimeDownsampleRes2x, 2, 1),
}
# The names with _GC recompute activations in the original's training: the same numbers.
UPSAMPLING = {
    "Upsample": Resampling(Upsample, 1, 2),
    "SpatialUpsample2x": Resampling(SpatialUpsample2x, 1, 2),
    "SpatialUpsample2x_GC": Resampling(SpatialUpsample2x, 1, 2),
    "Spatial2x3DUpsample": Resampling(Spatial2x3DUpsample, 1, 2),
    "Spatial2xTime2x3DUpsample": Resampling(Spatial2xTime2x3DUpsample, 2, 2),
    "TimeUpsample2x": Resampling(TimeUpsample2x, 2, 1),
    "TimeUpsampleRes2x": Resampling(TimeUpsampleRes2x, 2, 1),
}
RESNET_BLOCKS: dict[str, Callable[[int, int, float, str], nn.Module]] = {
    "ResnetBlock2D": ResnetBlock2D,
    "ResnetBlock3D": ResnetBlock3D,
    "ResnetBlock3D_GC": ResnetBlock3D,
}
ATTENTION: dict[str, Callable[[int, str], nn.Module]] = {
    "AttnBlock3D": MixedFrameAttention,
    "AttnBlock3DFix": FrameAttention,
}
CONVOLUTIONS: dict[str, type[FrameConv2d] | type[CausalConv3d]] = {
    "Conv2d": FrameConv2d,
    "CausalConv3d": CausalConv3d,
    "CausalConv3d_GC": CausalConv3d,
}
