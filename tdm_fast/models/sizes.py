"""Sizes of videos and of their latents: what VAE and patches divide, and whose word on the size counts."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from tdm_fast.notes import say_once

if TYPE_CHECKING:
    from tdm_fast.models.sources import Sources

AXES = ("t", "h", "w")
SIZE_FLAGS = ("num_frames", "max_height", "max_width")


class Unit(NamedTuple):
    """How an axis of a video comes: `first + n·step` frames or pixels, `stride` of them to a latent."""

    first: int
    step: int
    stride: int

    def __str__(self) -> str:
        if self.step == sys.maxsize:
            return str(self.first)
        return f"{self.first} + n·{self.step}" if self.first else f"multiples of {self.step}"

    def fits(self, length: int) -> bool:
        """Whether VAE and patches divide a video's length on this axis."""
        return length >= (self.first or self.step) and (length - self.first) % self.step == 0

    def nearest(self, length: int) -> list[int]:
        """The lengths that fit next to one that does not, ascending."""
        below = (length - self.first) // self.step * self.step + self.first
        found = [fitting for fitting in (below, below + self.step) if self.fits(fitting) and fitting < sys.maxsize]
        return found or [self.first or self.step]

    def latents(self, length: int, what: str) -> int:
        """The latents of a length. Raises ValueError, which says `what`, with the nearest that fit."""
        if not self.fits(length):
            raise ValueError(f"{what}; it comes as {self}, so {' or '.join(map(str, self.nearest(length)))} would do")
        return (length - self.first) // self.stride + self.first

    def pixels(self, latents: int) -> int:
        """The frames or pixels that so many latents are decoded to."""
        return (latents - self.first) * self.stride + self.first


STILL = Unit(1, sys.maxsize, 1)
"""The frames of an image: one."""


def units(strides: tuple[int, int, int], patch_size: int) -> tuple[Unit, Unit, Unit]:
    """How frames, height and width come for a causal VAE of these strides and patches of a single latent frame."""
    time, height, width = strides
    return Unit(1, time, time), Unit(0, height * patch_size, height), Unit(0, width * patch_size, width)


def latents_of(size: Sequence[int], axes: Sequence[Unit], what: str) -> tuple[int, ...]:
    """`(T, H, W)` of the latents of videos of a size, in frames and pixels.

    Raises ValueError, which says `what`, with the nearest size that fits, for one that does not.
    """
    if not all(unit.fits(length) for unit, length in zip(axes, size, strict=True)):
        fitting = (min(unit.nearest(n), key=lambda m: abs(m - n)) for unit, n in zip(axes, size, strict=True))
        raise ValueError(
            f"{what}: frames come as {axes[0]}, height and width as {axes[1]} and {axes[2]}; the nearest that fits is"
            f" {'x'.join(map(str, fitting))}"
        )
    return tuple(unit.latents(length, what) for unit, length in zip(axes, size, strict=True))


def latent_size(sources: Sources, config: Mapping[str, Any], strides: tuple[int, int, int]) -> dict[str, int]:
    """`sample_size_t|h|w` of a transformer with this config.

    A flag's word outranks the config's, and that the word of the preset in the transformer's name. Raises ValueError,
    with the nearest lengths that fit, for one that does not.
    """
    patch = config["patch_size"]
    preset = sources.preset or (None, None, None)
    sizes: dict[str, int] = {}
    overruled = []
    axes = zip(AXES, SIZE_FLAGS, units(strides, patch), sources.size, preset, strict=True)
    for axis, flag, unit, asked, named in axes:
        key = f"sample_size_{axis}"
        own: Any = config.get(key)
        if asked is not None:
            sizes[key] = unit.latents(asked, f"--{flag} is {asked}")
        elif own is None and named is not None:
            sizes[key] = unit.latents(named, f"--model {sources.name}: {flag} is {named}")
        elif own is None:
            raise ValueError(
                f"{sources.transformer or sources.name}: the size of its videos is not known, as its config has no"
                f" {key}; --{', --'.join(SIZE_FLAGS)} give it, or a name with a size (OpenSoraT2V_v1_3_93x640x640)"
            )
        else:
            sizes[key] = _checked(own, 1 if axis == "t" else patch, f"{sources.transformer}: {key} is {own}")
            if named is not None and unit.pixels(own) != named:
                overruled.append(f"{flag} {unit.pixels(own)}, not {named}")
    if overruled:
        say_once(
            f"{sources.transformer}: its config.json says {' and '.join(overruled)} as in {sources.name}, and counts;"
            f" --{', --'.join(SIZE_FLAGS)} would outrank it"
        )
    return sizes


def _checked(size: Any, patch: int, what: str) -> int:
    """A config's own size of latents, which has to be in whole patches."""
    if not isinstance(size, int) or size < 1 or size % patch:
        below = size // patch * patch if isinstance(size, int) else 0
        fitting = f"{below} or {below + patch}" if below > 0 else f"{patch}"
        raise ValueError(f"{what}; latents come in whole patches of {patch}, so {fitting} would do")
    return size
