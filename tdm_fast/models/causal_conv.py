"""Causal convolutions over video, and the state that lets them run over a video in pieces.

Tensors are `[B, C, T, H, W]`. A causal convolution sees the present and the past only: the first frame is repeated
`kernel - 1` times in front of the video, so a single frame is a valid video and T frames never depend on frame T + 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TemporalStream:
    """What the layers remember between consecutive pieces ("chunks") of one video.

    `first` says that the present chunk opens the video. `lookahead` counts the frames at the end of the present
    activation that belong to the next chunk and are processed for interpolation only: nothing behind them may be
    remembered. Layers that double the frame rate double it, so it is right for whichever layer runs next.
    """

    def __init__(self) -> None:
        self.first = True
        self.lookahead = 0
        self._kept: dict[nn.Module, Tensor] = {}

    def start_chunk(self, *, first: bool, lookahead: int = 0) -> None:
        """Tells the layers where the chunk that comes now lies."""
        self.first = first
        self.lookahead = lookahead

    def keep(self, layer: nn.Module, x: Tensor, frames: int) -> None:
        """Remembers for `layer` the last `frames` frames of `x`, which must not hold look-ahead frames."""
        # A clone, because a view would hold on to the whole activation.
        self._kept[layer] = x[:, :, x.shape[2] - frames :].clone()

    def recall(self, layer: nn.Module) -> Tensor:
        """What `layer` kept in the chunk before."""
        return self._kept[layer]


def to_frames(x: Tensor) -> Tensor:
    """`[B, C, T, H, W]` to `[B * T, C, H, W]`; free for what `to_video` returned."""
    return x.transpose(1, 2).flatten(0, 1)


def to_video(frames: Tensor, batch: int) -> Tensor:
    """`[B * T, C, H, W]` to a `[B, C, T, H, W]` view."""
    return frames.unflatten(0, (batch, -1)).transpose(1, 2)


class FrameConv2d(nn.Conv2d):
    """A 2-D convolution applied to every frame: `[B, C, T, H, W]` to `[B, C_out, T, H', W']`."""

    def forward(self, x: Tensor, stream: TemporalStream | None = None) -> Tensor:
        return to_video(super().forward(to_frames(x)), x.shape[0])


class CausalConv3d(nn.Module):
    """A 3-D convolution, causal in time and zero-padded by `padding` in space; kernel and stride of one size or three.

    With a stream, the frames in front of a chunk are the last `kernel - stride` inputs of the chunk before, so chunks
    give what the whole video gives as long as each chunk's length is a multiple of the stride (the first: 1 more).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int, int] = 3,
        stride: int | tuple[int, int, int] = 1,
        padding: int = 0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv3d(
            in_channels, out_channels, kernel_size, stride=stride, padding=(0, padding, padding), bias=bias
        )

    def forward(self, x: Tensor, stream: TemporalStream | None = None) -> Tensor:
        return self.conv(causal_pad(self, x, self.conv.kernel_size[0], self.conv.stride[0], stream))


def causal_pad(layer: nn.Module, x: Tensor, kernel: int, stride: int, stream: TemporalStream | None) -> Tensor:
    """Puts in front of `x` the frames that a causal window of `kernel` frames needs, on behalf of `layer`."""
    if kernel == 1:
        return x
    if stream is None or stream.first:
        x = torch.cat([x[:, :, :1].expand(-1, -1, kernel - 1, -1, -1), x], dim=2)
    elif kernel > stride:
        x = torch.cat([stream.recall(layer), x], dim=2)
    if stream is not None and kernel > stride:
        stream.keep(layer, x[:, :, : x.shape[2] - stream.lookahead], kernel - stride)
    return x


def double_space(x: Tensor, mode: str) -> Tensor:
    """Doubles height and width of every frame, `mode` "nearest" or "bilinear" (pixel centres, edges clamped)."""
    frames = F.interpolate(x.flatten(1, 2), scale_factor=2.0, mode=mode)
    return frames.unflatten(1, x.shape[1:3])
