"""tiny-shapes: a procedural captioned video set, small enough to train a whole text-to-video teacher on a CPU.

A clip shows one shape on a dark ground, moving at constant speed: `a small red circle moving left`. Four attributes
(size, colour, shape, direction) make 144 prompts; the start position is the only other degree of freedom. Clips are
drawn from counter-based random numbers, so clip n of a seed is the same wherever and however it is asked for.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tdm_fast.philox import Purpose, uniform

SIZES = {"small": 6.0, "large": 10.0}
COLOURS = {
    "red": (0.90, -0.75, -0.75),
    "green": (-0.70, 0.60, -0.60),
    "blue": (-0.65, -0.35, 0.95),
    "yellow": (0.95, 0.80, -0.70),
    "purple": (0.40, -0.70, 0.80),
    "white": (0.90, 0.90, 0.90),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "size": tuple(SIZES),
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "direction": tuple(DIRECTIONS),
}
CARDINALITIES = tuple(len(values) for values in ATTRIBUTES.values())
NUM_PROMPTS = math.prod(CARDINALITIES)

NUM_FRAMES = 17
RESOLUTION = 64
BACKGROUND = -0.85
PIXELS_PER_FRAME = 1.25
# A triangle of a disc's area reaches 1.56 disc radii from its centre; every shape keeps that distance from the border.
REACH = 1.56
# Sample n shows prompt 89·n: prime to 144 and near 144 / golden ratio, which spreads neighbours over the attributes.
PROMPT_STRIDE = 89


def attributes_of(index: Tensor) -> Tensor:
    """Prompt indices int64 `[B]` (any integer, taken modulo 144) to attribute indices int64 `[B, 4]`."""
    index = index % NUM_PROMPTS
    digits = []
    for cardinality in reversed(CARDINALITIES):
        digits.append(index % cardinality)
        index = index // cardinality
    return torch.stack(digits[::-1], dim=1)


def caption(attributes: Tensor) -> list[str]:
    """Attribute indices int64 `[B, 4]` to prompts such as `a small red circle moving left`."""
    rows = []
    for row in attributes.tolist():
        size, colour, shape, direction = (values[i] for values, i in zip(ATTRIBUTES.values(), row, strict=True))
        rows.append(f"a {size} {colour} {shape} moving {direction}")
    return rows


def all_prompts() -> list[str]:
    """The 144 prompts; prompt n has the attributes `attributes_of(n)`."""
    return caption(attributes_of(torch.arange(NUM_PROMPTS)))


def parse_prompt(prompt: str) -> list[int] | None:
    """The attribute indices that a prompt names, or None unless it names exactly one value of each attribute."""
    words = prompt.lower().split()
    found = [[i for i, value in enumerate(values) if value in words] for values in ATTRIBUTES.values()]
    return [hits[0] for hits in found] if all(len(hits) == 1 for hits in found) else None


def travel(attributes: Tensor) -> Tensor:
    """How far (x, y) the shape moves from the first to the last frame, in pixels, `[B, 2]`."""
    return torch.tensor(list(DIRECTIONS.values()))[attributes[:, 3]] * (PIXELS_PER_FRAME * (NUM_FRAMES - 1))


def start_positions(attributes: Tensor, *, seed: int, iteration: int = 0, sample_offset: int = 0) -> Tensor:
    """Start positions (x, y) of the centre in pixels, float32 `[B, 2]`; from there the shape stays in the frame."""
    radius = torch.tensor(list(SIZES.values()))[attributes[:, 0]]
    border, path = (REACH * radius + 1)[:, None], travel(attributes)
    low = border - path.clamp(max=0)
    high = RESOLUTION - border - path.clamp(min=0)
    draw = uniform(
        len(attributes), (2,), seed=seed, iteration=iteration, purpose=Purpose.DATA, sample_offset=sample_offset
    )
    return low + (high - low) * draw


def render(attributes: Tensor, start: Tensor, *, origin: Tensor | None = None, size: int = RESOLUTION) -> Tensor:
    """Clips float32 `[B, 3, 17, size, size]` in [-1, 1] for attribute indices `[B, 4]` and start positions `[B, 2]`.

    `origin` `[B, 2]` moves the window: its top left corner (x, y) in pixels of the full frame. Edges are antialiased: a
    pixel's coverage is its signed distance to the outline, clamped to one pixel.
    """
    centre = start if origin is None else start - origin
    time = torch.arange(NUM_FRAMES)[:, None] * PIXELS_PER_FRAME
    grid = torch.arange(size) + 0.5
    radii, colours, velocities = (torch.tensor(list(d.values())) for d in (SIZES, COLOURS, DIRECTIONS))
    videos = torch.empty(len(attributes), 3, NUM_FRAMES, size, size)
    # Clip by clip, because one clip fits the cache and a batch does not.
    for video, (i, j, k, m), position in zip(videos, attributes.tolist(), centre, strict=True):
        path = position + time * velocities[m]
        x = (grid - path[:, :1]).unsqueeze(1)
        y = (grid - path[:, 1:]).unsqueeze(2)
        coverage = (0.5 - _signed_distance(SHAPES[k], x, y, float(radii[i]))).clamp_(0, 1)
        torch.mul(coverage, (colours[j] - BACKGROUND).view(3, 1, 1, 1), out=video).add_(BACKGROUND)
    return videos


def _signed_distance(shape: str, x: Tensor, y: Tensor, radius: float) -> Tensor:
    """Signed distance in pixels to an outline around 0; square and triangle have that circle's area."""
    if shape == "circle":
        return torch.hypot(x, y) - radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - radius * math.sqrt(math.pi) / 2
    slanted = x.abs() * (math.sqrt(3) / 2) - y / 2
    return torch.maximum(slanted, y) - radius * math.sqrt(math.pi / (3 * math.sqrt(3)))


def sample_paths(batch_size: int, *, seed: int, iteration: int = 0, sample_offset: int = 0) -> tuple[Tensor, Tensor]:
    """What a clip shows and where it starts: attribute indices `[B, 4]` and start positions `[B, 2]`.

    Any 144 samples in a row hold every prompt once, in an order that mixes the attributes of neighbours; only the start
    position is random, a function of (seed, iteration, global sample index).
    """
    attributes = attributes_of(PROMPT_STRIDE * torch.arange(sample_offset, sample_offset + batch_size))
    return attributes, start_positions(attributes, seed=seed, iteration=iteration, sample_offset=sample_offset)


def sample_clips(batch_size: int, *, seed: int, iteration: int = 0, sample_offset: int = 0) -> tuple[Tensor, ...]:
    """Fresh real clips: videos `[B, 3, 17, 64, 64]` in [-1, 1], attributes and starts as in `sample_paths`."""
    attributes, start = sample_paths(batch_size, seed=seed, iteration=iteration, sample_offset=sample_offset)
    return render(attributes, start), attributes, start
