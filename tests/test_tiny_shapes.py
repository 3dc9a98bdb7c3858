"""tiny-shapes: prompts, paths and pixels, measured on the pixels themselves."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tdm_fast import tiny_shapes as ts


def coverage(videos: Tensor, attributes: Tensor) -> Tensor:
    """How much of each pixel the shape covers, float64 `[B, T, H, W]`, from the strongest colour channel."""
    colours = torch.tensor(list(ts.COLOURS.values()), dtype=torch.float64)[attributes[:, 1]] - ts.BACKGROUND
    channel = colours.abs().argmax(1)
    rows = torch.arange(len(videos))
    strongest = videos.double()[rows, channel] - ts.BACKGROUND
    return strongest / colours[rows, channel].view(-1, 1, 1, 1)


def centroids(cover: Tensor) -> Tensor:
    """Centre of mass (x, y) in pixels, `[B, T, 2]`."""
    grid = torch.arange(cover.shape[-1], dtype=torch.float64) + 0.5
    total = cover.sum((2, 3))
    return torch.stack([(cover.sum(2) * grid).sum(2), (cover.sum(3) * grid).sum(2)], dim=2) / total[..., None]


def test_prompts_and_attributes_are_a_bijection() -> None:
    attributes = ts.attributes_of(torch.arange(ts.NUM_PROMPTS))
    prompts = ts.all_prompts()
    assert len(set(prompts)) == len(set(map(tuple, attributes.tolist()))) == ts.NUM_PROMPTS == 144
    assert [ts.parse_prompt(prompt) for prompt in prompts] == attributes.tolist()
    assert ts.caption(attributes) == prompts
    assert prompts[0] == "a small red circle moving left" and prompts[-1] == "a large white triangle moving down"
    assert torch.equal(ts.attributes_of(torch.arange(144, 288)), attributes)


@pytest.mark.parametrize(
    "prompt",
    ["", "a red circle moving left", "a small large red circle moving left", "a small red circle moving sideways"],
)
def test_a_prompt_without_one_value_of_each_attribute_names_nothing(prompt: str) -> None:
    assert ts.parse_prompt(prompt) is None


@pytest.mark.parametrize("offset", [0, 1, 1000])
def test_144_samples_in_a_row_hold_every_prompt_once(offset: int) -> None:
    attributes, _ = ts.sample_paths(144, seed=3, sample_offset=offset)
    assert len(set(map(tuple, attributes.tolist()))) == 144


def test_a_clip_depends_on_seed_and_index_alone() -> None:
    whole = ts.sample_clips(7, seed=5, iteration=2, sample_offset=11)
    parts = [ts.sample_clips(count, seed=5, iteration=2, sample_offset=at) for count, at in ((3, 11), (4, 14))]
    for tensor, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(tensor, torch.cat(pieces))
    for other in ({"seed": 6, "iteration": 2}, {"seed": 5, "iteration": 3}):
        starts = ts.sample_paths(7, sample_offset=11, **other)[1]
        assert (starts != whole[2]).all()


@pytest.mark.parametrize("draw", [0.0, 1.0 - 2**-24])
def test_the_shape_stays_in_the_frame_from_the_extreme_starts(draw: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ts, "uniform", lambda batch, shape, **_: torch.full((batch, *shape), draw))
    attributes = ts.attributes_of(torch.arange(0, 144, 5))
    assert {tuple(row) for row in attributes[:, [0, 2, 3]].tolist()} == {
        (size, shape, way) for size in range(2) for shape in range(3) for way in range(4)
    }
    start = ts.start_positions(attributes, seed=0)
    around = ts.render(attributes, start, origin=torch.full((len(start), 2), -8.0), size=ts.RESOLUTION + 16)
    cover = coverage(around, attributes)
    outside = torch.ones(cover.shape[2:], dtype=torch.bool)
    outside[8:-8, 8:-8] = False
    assert cover[..., outside].abs().max() < 1e-6
    assert cover.amax((2, 3)).min() > 0.99


def test_the_shape_moves_as_its_prompt_says() -> None:
    attributes = ts.attributes_of(torch.arange(0, 144, 5))
    videos = ts.render(attributes, ts.start_positions(attributes, seed=1))
    path = centroids(coverage(videos, attributes))
    velocity = torch.tensor(list(ts.DIRECTIONS.values()), dtype=torch.float64)[attributes[:, 3]] * ts.PIXELS_PER_FRAME
    # Antialiasing by a distance's first order moves a centre of mass by less than a twentieth of a pixel.
    assert (path.diff(dim=1) - velocity[:, None]).abs().max() < 0.05
    assert torch.allclose(path[:, -1] - path[:, 0], ts.travel(attributes).double(), atol=0.05)


def test_every_shape_has_the_area_of_its_disc() -> None:
    attributes = ts.attributes_of(torch.arange(0, 144, 5))
    area = coverage(ts.render(attributes, ts.start_positions(attributes, seed=2)), attributes).sum((2, 3))
    radius = torch.tensor(list(ts.SIZES.values()), dtype=torch.float64)[attributes[:, 0]]
    assert (area / (math.pi * radius**2)[:, None] - 1).abs().max() < 0.02


def test_the_shapes_differ_where_they_should() -> None:
    """Share of the bounding box that is covered: π/4 for a disc, 1 for a square, 1/2 for a triangle."""
    attributes = torch.tensor([[1, 0, shape, 1] for shape in range(3)])
    cover = coverage(ts.render(attributes, torch.full((3, 2), 32.0)), attributes)[:, 0]
    inside = cover > 0.5
    boxes = inside.any(1).sum(1) * inside.any(2).sum(1)
    share = cover.sum((1, 2)) / boxes
    assert torch.allclose(share, torch.tensor([math.pi / 4, 1.0, 0.5], dtype=torch.float64), atol=0.06)


def test_colours_and_ground() -> None:
    attributes = torch.tensor([[1, colour, 1, 0] for colour in range(len(ts.COLOURS))])
    videos = ts.render(attributes, torch.full((len(attributes), 2), 40.0))
    assert videos.shape == (6, 3, ts.NUM_FRAMES, 64, 64) and videos.dtype == torch.float32
    assert torch.allclose(videos[:, :, 0, 40, 40], torch.tensor(list(ts.COLOURS.values())))
    assert torch.allclose(videos[..., 0, 0], torch.tensor(ts.BACKGROUND))
    assert videos.abs().max() <= 1


def test_a_window_is_a_crop() -> None:
    attributes, start = ts.sample_paths(5, seed=4)
    origin = torch.tensor([[3.0, 7.0]]).expand(5, 2)
    window = ts.render(attributes, start, origin=origin, size=20)
    assert torch.allclose(window, ts.render(attributes, start)[..., 7:27, 3:23], atol=1e-4)
