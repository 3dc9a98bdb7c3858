"""Clips to files and back."""

from __future__ import annotations

import os
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tdm_fast.tiny_shapes import sample_clips
from tdm_fast.video import captioned, enlarge, enlargement, grid, to_uint8, write_video


@pytest.fixture(scope="module")
def frames() -> Tensor:
    return to_uint8(sample_clips(1, seed=0, sample_offset=3)[0][0].transpose(0, 1))


def read(path: Path) -> np.ndarray:
    if path.suffix == ".gif":
        with Image.open(path) as image:
            shown = []
            for i in range(image.n_frames):
                image.seek(i)
                shown.append(np.array(image.convert("RGB")))
        return np.stack(shown)
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_pixels_are_rounded_and_clamped() -> None:
    video = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.999, 1.0, 3.0]).view(7, 1, 1, 1).expand(7, 3, 2, 4)
    pixels = to_uint8(video)
    assert pixels.shape == (7, 2, 4, 3) and pixels.dtype == torch.uint8
    assert pixels[:, 0, 0, 0].tolist() == [0, 0, 64, 128, 255, 255, 255]


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_a_video_comes_back(tmp_path: Path, frames: Tensor, suffix: str) -> None:
    path = tmp_path / "deep" / f"clip{suffix}"
    write_video(path, frames)
    back = read(path)
    assert back.shape == tuple(frames.shape) == (17, 64, 64, 3)
    # Lossy formats, but no frame may be another frame, upside down or of other colours.
    error = np.abs(back[:, None].astype(float) - frames.numpy()[None]).mean((2, 3, 4))
    assert (error.argmin(1) == np.arange(17)).all() and error.diagonal().max() < 4


def test_a_picture_shows_the_frames_side_by_side(tmp_path: Path, frames: Tensor) -> None:
    write_video(tmp_path / "clip.png", frames)
    picture = np.array(Image.open(tmp_path / "clip.png"))
    assert picture.shape == (64, 17 * 64, 3)
    assert (picture[:, 5 * 64 : 6 * 64] == frames[5].numpy()).all()


def test_odd_sizes_are_padded_for_h264(tmp_path: Path, frames: Tensor) -> None:
    write_video(tmp_path / "clip.mp4", frames[:3, :33, :51])
    back = read(tmp_path / "clip.mp4")
    assert back.shape == (3, 34, 52, 3)
    assert np.abs(back[:, :33, :51].astype(float) - frames[:3, :33, :51].numpy()).mean() < 6


def test_a_single_frame_can_be_written(tmp_path: Path, frames: Tensor) -> None:
    for suffix in (".mp4", ".gif"):
        write_video(tmp_path / f"one{suffix}", frames[:1])
        assert len(read(tmp_path / f"one{suffix}")) == 1


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".png"])
def test_a_file_is_whole_or_what_it_was(
    tmp_path: Path, frames: Tensor, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    path = tmp_path / f"clip{suffix}"
    path.write_text("old")

    def full(partial: Path, path: Path) -> None:
        assert partial.stat().st_size > 0
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, "replace", full)
        write_video(path, frames)
    assert path.read_text() == "old"
    write_video(path, frames)
    assert path.read_bytes() != b"old" and [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("name", ["clip", "clip.avi", "clip.MP4"])
def test_another_suffix_is_refused(tmp_path: Path, frames: Tensor, name: str) -> None:
    with pytest.raises(ValueError, match=r"--output .*clip.* ends in \.mp4, \.gif, \.png"):
        write_video(tmp_path / name, frames)
    assert not any(tmp_path.iterdir())


def test_enlarging_repeats_pixels(frames: Tensor) -> None:
    large = enlarge(frames, 3)
    assert large.shape == (17, 192, 192, 3)
    for i in range(3):
        for j in range(3):
            assert torch.equal(large[:, i::3, j::3], frames)


def test_only_what_is_small_is_enlarged() -> None:
    sizes = {(64, 64): (3, 4), (32, 200): (2, 2), (640, 64): (1, 1), (513, 1): (1, 1), (8, 8): (3, 4)}
    for size, factors in sizes.items():
        frames = torch.zeros(2, *size, 3, dtype=torch.uint8)
        assert tuple(enlargement(frames, most) for most in (3, 4)) == factors


def test_a_caption_stands_above_the_frames(frames: Tensor) -> None:
    shown = captioned(frames, "a circle", height=18)
    assert shown.shape == (17, 64 + 18, 64, 3)
    assert torch.equal(shown[:, 18:], frames)
    band = shown[:, :18]
    assert (band == 255).float().mean() > 0.5 and (band < 128).any() and torch.equal(band[0], band[16])
    assert (captioned(frames, "", height=9)[:, :9] == 255).all()


def test_a_long_caption_is_made_to_fit() -> None:
    wide, text = torch.zeros(1, 2, 192, 3, dtype=torch.uint8), "a large purple triangle moving right"
    band = captioned(wide, text)[0, :20]
    assert (band[:, -4:] == 255).all() and (band[:, 96:] < 128).any()


def test_a_grid_keeps_every_clip(frames: Tensor) -> None:
    other = 255 - frames
    shown = grid([[frames, other, frames], [other, frames, other]], gap=4)
    assert shown.shape == (17, 2 * 68, 3 * 68, 3)
    for row in range(2):
        for column in range(3):
            clip = shown[:, 68 * row : 68 * row + 64, 68 * column : 68 * column + 64]
            assert torch.equal(clip, frames if (row + column) % 2 == 0 else other)
    assert (shown[:, 64:68] == 255).all() and (shown[:, :, 64:68] == 255).all()
