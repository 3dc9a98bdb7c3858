"""Counter-based random numbers: Philox4x32-10 (Salmon et al., SC 2011) in plain torch integer arithmetic.

A number is a function of (seed, purpose, stream, iteration, global sample index, element) and of nothing else: not of
the rank, the batch split, the device or what was drawn before. The key is the 64-bit seed (low word, high word); the
four counter words are

    c0 = element // 4      c1 = global sample index      c2 = iteration      c3 = stream | purpose << 16

and the four output words of one counter belong to elements 4*c0 ... 4*c0 + 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


class Purpose(IntEnum):
    """What a draw is for; draws of different purposes never share a counter."""

    NOISE = 0
    RENOISE = 1
    INTERVALS = 2
    DATA = 3
    SPLIT = 4


def philox4x32(counter: Tensor, key: tuple[int | Tensor, int | Tensor], rounds: int = 10) -> Tensor:
    """Philox4x32: int64 `counter` `[..., 4]` of words in [0, 2^32) and a two-word key to int64 words `[..., 4]`."""
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key
    for _ in range(rounds):
        # int64 products wrap modulo 2^64, so all 64 bits of the unsigned product are there; the mask drops the sign.
        left, right = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = ((right >> 32) & _MASK) ^ c1 ^ k0, ((left >> 32) & _MASK) ^ c3 ^ k1
        c1, c3 = right & _MASK, left & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return torch.stack((c0, c1, c2, c3), dim=-1)


def random_integers(
    shape_per_sample: Sequence[int],
    batch_size: int,
    *,
    seed: int | Tensor,
    iteration: int | Tensor = 0,
    stream: int = 0,
    purpose: int = Purpose.NOISE,
    sample_offset: int | Tensor = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Words in [0, 2^32), int64 `[batch_size, *shape_per_sample]`.

    `seed` and `iteration` are ints or 0-d int64 tensors on `device`; `sample_offset` is the global index of the first
    sample. Raises ValueError for a negative size, or a `stream` or `purpose` that does not fit 16 bits.
    """
    shape = tuple(shape_per_sample)
    words = _words(shape, batch_size, seed, iteration, stream, purpose, sample_offset, device)
    return words.reshape(batch_size, words.shape[1] * 4)[:, : math.prod(shape)].reshape(batch_size, *shape)


def randn(
    batch_size: int,
    sample_shape: Sequence[int],
    *,
    seed: int | Tensor,
    iteration: int | Tensor = 0,
    stream: int = 0,
    purpose: int = Purpose.NOISE,
    sample_offset: int | Tensor = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normals `[batch_size, *sample_shape]` in `dtype`; arguments as in `random_integers`.

    Box-Muller in float64 on the words (0, 1) for elements 4i and 4i+1 and on (2, 3) for 4i+2 and 4i+3.
    """
    shape = tuple(sample_shape)
    words = _words(shape, batch_size, seed, iteration, stream, purpose, sample_offset, device)
    unit = (words.to(torch.float64) + 0.5) * 2.0**-32
    radius, angle = (-2 * unit[..., 0::2].log()).sqrt(), 2 * math.pi * unit[..., 1::2]
    normals = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).to(dtype)
    return normals.reshape(batch_size, words.shape[1] * 4)[:, : math.prod(shape)].reshape(batch_size, *shape)


def uniform(
    batch_size: int,
    sample_shape: Sequence[int],
    *,
    seed: int | Tensor,
    iteration: int | Tensor = 0,
    stream: int = 0,
    purpose: int = Purpose.NOISE,
    sample_offset: int | Tensor = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Uniform numbers in [0, 1), `[batch_size, *sample_shape]` in `dtype`; arguments as in `random_integers`."""
    words = random_integers(
        sample_shape,
        batch_size,
        seed=seed,
        iteration=iteration,
        stream=stream,
        purpose=purpose,
        sample_offset=sample_offset,
        device=device,
    )
    # Narrower dtypes would round the last values up to 1.
    return ((words.to(torch.float64) + 0.5) * 2.0**-32).to(dtype).clamp(max=1 - torch.finfo(dtype).eps / 2)


def bounded(words: Tensor, bound: int | Tensor) -> Tensor:
    """Words in [0, 2^32) to integers in [0, bound), for a bound below 2^31: the high word of words * bound."""
    return (words * bound) >> 32


def check_stream(value: int, name: str = "stream") -> None:
    """Raise ValueError unless a stream (or a purpose) fits its 16 bits of the counter."""
    if not 0 <= value < 1 << 16:
        raise ValueError(f"{name} is {value}; it must be in [0, 65536)")


def _words(
    shape: tuple[int, ...],
    batch_size: int,
    seed: int | Tensor,
    iteration: int | Tensor,
    stream: int,
    purpose: int,
    sample_offset: int | Tensor,
    device: torch.device | str,
) -> Tensor:
    """All words of the blocks that cover `shape`: int64 `[batch_size, ceil(elements / 4), 4]`."""
    if batch_size < 0 or any(size < 0 for size in shape):
        raise ValueError(f"batch_size is {batch_size} and the sample's shape {shape}; sizes must be 0 or more")
    check_stream(stream)
    check_stream(purpose, "purpose")
    blocks = torch.arange(-(-math.prod(shape) // 4), device=device).expand(batch_size, -1)
    samples = (torch.arange(batch_size, device=device)[:, None] + sample_offset) & _MASK
    counter = torch.zeros(*blocks.shape, 4, dtype=torch.int64, device=device)
    counter[..., 0] = blocks
    counter[..., 1] = samples
    counter[..., 2] = iteration & _MASK
    counter[..., 3] = stream | int(purpose) << 16
    return philox4x32(counter, (seed & _MASK, (seed >> 32) & _MASK))
