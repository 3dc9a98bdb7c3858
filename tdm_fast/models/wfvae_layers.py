"""Layers of WF-VAE (arXiv 2411.17459): norms, residual blocks, per-frame attention, down- and upsampling.

Every layer takes `(x, stream)`, x `[B, C, T, H, W]`, stream None for a whole video or the state of a video that comes
in chunks (see `causal_conv.TemporalStream`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdm_fast.models.causal_conv import CausalConv3d, TemporalStream, double_space, to_frames, to_video

NORM_EPS = 1e-6
NORM_GROUPS = 32


class Chain(nn.ModuleList):
    """Layers one after the other; with gradient checkpointing each layer's inner activations are recomputed."""

    _gradient_checkpointing_func: Callable[..., Any]

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__(layers)
        self.gradient_checkpointing = False

    def forward(self, x: Tensor, stream: TemporalStream | None = None) -> Tensor:
        # A recomputed layer would read and write a stream twice, so chunks are never checkpointed.
        recompute = self.gradient_checkpointing and torch.is_grad_enabled() and stream is None
        for layer in self:
            x = self._gradient_checkpointing_func(layer, x) if recompute else layer(x, stream)
        return x


class ChannelLayerNorm(nn.Module):
    """LayerNorm over the channels of `[B, C, ...]`, each position for itself."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


def make_norm(channels: int, norm_type: str) -> nn.Module:
    """The norm that `norm_type` names; on a video, "groupnorm" takes its statistics over all frames.

    Raises ValueError for another name, or for channels that 32 groups do not divide.
    """
    if norm_type == "layernorm":
        return ChannelLayerNorm(channels)
    if norm_type != "groupnorm":
        raise ValueError(f"norm_type must be 'groupnorm' or 'layernorm', got {norm_type!r}")
    if channels % NORM_GROUPS:
        raise ValueError(
            f"norm_type 'groupnorm' has {NORM_GROUPS} groups and cannot take {channels} channels: choose base_channels "
            f"(hidden_size) and energy_flow_hidden_size so that all widths are multiples of {NORM_GROUPS}, or "
            "norm_type 'layernorm'"
        )
    return nn.GroupNorm(NORM_GROUPS, channels, eps=NORM_EPS)


class ResnetBlock2D(nn.Module):
    """norm, SiLU, conv, norm, SiLU, dropout, conv, added to the input; frames are independent, in the norm too."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float, norm_type: str) -> None:
        super().__init__()
        self.norm1 = make_norm(in_channels, norm_type)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = make_norm(out_channels, norm_type)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, stream: TemporalStream | None = None) -> Tensor:
        frames = to_frames(x)
        h = self.conv1(F.silu(self.norm1(frames)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        if hasattr(self, "nin_shortcut"):
            frames = self.nin_shortcut(frames)
        return to_video(frames + h, x.shape[0])


class ResnetBlock3D(nn.Module):
    """As `ResnetBlock2D`, with causal 3 x 3 x 3 convolutions."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float, norm_type: str) -> None:
        super().__init__()
        self.norm1 = make_norm(in_channels, norm_type)
        self.conv1 = CausalConv3d(in_channels, out_channels, padding=1)
        self.norm2 = make_norm(out_channels, norm_type)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = CausalConv3d(out_channels, out_channels, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = CausalConv3d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, stream: TemporalStream | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)), stream)
        h = self.conv2(self.dropout(F.silu(self.norm2(h))), stream)
        if hasattr(self, "nin_shortcut"):
            x = self.nin_shortcut(x)
        return x + h


class FrameAttention(nn.Module):
    """Single-head attention among the positions of each frame, with a residual (`AttnBlock3DFix` in configs)."""

    def __init__(self, channels: int, norm_type: str) -> None:
        super().__init__()
        self.norm = make_norm(channels, norm_type)
        self.q = CausalConv3d(channels, channels, 1)
        self.k = CausalConv3d(channels, channels, 1)
        self.v = CausalConv3d(channels, channels, 1)
        self.proj_out = CausalConv3d(channels, channels, 1)

    def forward(self, x: Tensor, stream: TemporalStream | None = None) -> Tensor:
        batch, _, frames, height, width = x.shape
        h = self.norm(x)
        # [B, C, T, H, W] -> [B, T, H * W, C]: attention takes B and T as batch dimensions.
        q, k, v = (layer(h).flatten(3).permute(0, 2, 3, 1) for layer in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)
        h = h.permute(0, 3, 1, 2).reshape(batch, -1, frames, height, width)
        return x + self.proj_out(h)


class Downsample(nn.Module):
    """Halves height and width of every frame: 3 x 3 convolution, stride 2, a row and a column of zeros at the end."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor, stream: TemporalStream | None = None) -> Tensor:
        return to_video(self.conv(F.pad(to_frames(x), (0, 1, 0, 1))), x.shape[0])


class Spatial2xTime2x3DDownsample(nn.Module):
    """Halves height, width and time (T to (T + 1) / 2): causal 3 x 3 x 3 convolution, stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, stride=2)

    def forward(self, x: Tensor, stream: TemporalStream | None = None) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)), stream)


class Upsample(nn.Module):
    """Doubles height and width of every frame: nearest neighbour, 3 x 3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, stream: TemporalStream | None = None) -> Tensor:
        frames = F.interpolate(to_frames(x), scale_factor=2.0, mode="nearest")
        return to_video(self.conv(frames), x.shape[0])


class Spatial2xTime2x3DUpsample(nn.Module):
    """Doubles height and width, and time for all frames but the first (T to 2 T - 1); causal convolution.

    `t_interpolation` "nearest" repeats a frame, "trilinear" places two frames at -1/4 and +1/4 of it between its
    neighbours. The latter looks one frame ahead, and the chunk's last new frame is only right if there is a
    look-ahead frame or the video ends.
    """

    def __init__(self, channels: int, t_interpolation: str = "trilinear") -> None:
        super().__init__()
        if t_interpolation not in ("nearest", "trilinear"):
            raise ValueError(f"t_interpolation must be 'nearest' or 'trilinear', got {t_interpolation!r}")
        self.t_interpolation = t_interpolation
        self.conv = CausalConv3d(channels, channels, padding=1)

    def forward(self, x: Tensor, stream: TemporalStream | None = None) -> Tensor:
        x = self._double_time(x, stream)
        if stream is not None:
            stream.lookahead *= 2
        return self.conv(double_space(x, "bilinear"), stream)

    def _double_time(self, x: Tensor, stream: TemporalStream | None) -> Tensor:
        if stream is not None and not stream.first:
            past = stream.recall(self)
            stream.keep(self, x[:, :, : x.shape[2] - stream.lookahead], 1)
            return self._interpolate(torch.cat([past, x], dim=2))[:, :, 2:]
        first, rest = x[:, :, :1], x[:, :, 1:]
        if not rest.shape[2]:
            return x
        if stream is not None:
            # Behind the first frame, which stays single, the second has only itself for a left neighbour.
            stream.keep(self, rest[:, :, :1], 1)
        return torch.cat([first, self._interpolate(rest)], dim=2)

    def _interpolate(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=(2.0, 1.0, 1.0), mode=self.t_interpolation)
