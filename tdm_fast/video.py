"""Clips to files: mp4, gif, and png strips."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SUFFIXES = (".mp4", ".gif", ".png")


def to_uint8(video: Tensor) -> Tensor:
    """A clip `[T, 3, H, W]` in [-1, 1] (clamped) to uint8 `[T, H, W, 3]`."""
    return ((video.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


def write_video(path: Path, frames: Tensor, *, frames_per_second: int = 8) -> None:
    """Write frames uint8 `[T, H, W, 3]`: .mp4 (H.264), .gif (endless), or .png (the frames side by side).

    The file appears when it is whole. Raises ValueError for another suffix.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"--output {path}: it takes a name that ends in {', '.join(SUFFIXES)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        if path.suffix == ".png":
            Image.fromarray(torch.cat(tuple(frames), dim=1).numpy()).save(partial)
        elif path.suffix == ".gif":
            first, *rest = (Image.fromarray(frame) for frame in frames.numpy())
            first.save(partial, save_all=True, append_images=rest, duration=1000 // frames_per_second, loop=0)
        else:
            _write_mp4(partial, frames.numpy(), frames_per_second)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _write_mp4(path: Path, frames: np.ndarray, frames_per_second: int) -> None:
    # H.264 stores colour at half resolution, so both sides have to be even.
    frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=frames_per_second, options={"crf": "16"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def enlarge(frames: Tensor, factor: int) -> Tensor:
    """Repeat every pixel of uint8 frames `[T, H, W, 3]` `factor` times in both directions."""
    return frames.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)


def enlargement(frames: Tensor, most: int) -> int:
    """How many times to `enlarge` frames `[T, H, W, 3]` to be seen well: up to `most`, and to 512 pixels."""
    return max(1, min(most, 512 // max(frames.shape[1:3])))


def captioned(frames: Tensor, text: str, *, height: int = 20) -> Tensor:
    """Put a line of text on a white band above frames uint8 `[T, H, W, 3]`, as large as fits across."""
    band = Image.new("RGB", (frames.shape[2], height), "white")
    fonts = (ImageFont.load_default(size=size) for size in range(13, 5, -1))
    font = next((font for font in fonts if font.getlength(text) <= frames.shape[2] - 8), ImageFont.load_default(size=6))
    ImageDraw.Draw(band).text((4, height // 2), text, fill="black", font=font, anchor="lm")
    strip = torch.from_numpy(np.array(band)).expand(len(frames), -1, -1, -1)
    return torch.cat([strip, frames], dim=1)


def grid(rows: Sequence[Sequence[Tensor]], *, gap: int = 4) -> Tensor:
    """Rows of equally sized clips uint8 `[T, H, W, 3]` to one clip, white between them."""
    padded = [[torch.nn.functional.pad(clip, (0, 0, 0, gap, 0, gap), value=255) for clip in row] for row in rows]
    return torch.cat([torch.cat(row, dim=2) for row in padded], dim=1)
