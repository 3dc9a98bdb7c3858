"""Philox4x32-10 (Salmon et al., SC 2011) and Box-Muller in Triton: the integers and normals of `tdm_fast.philox`.

Counters, keys and words are uint32. The normals are float32 and within 1e-6 of float64 Box-Muller on the same words:
whatever decides their accuracy is done in integers before the first rounding, the rest is a short polynomial.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

DRAW = ("seed_low", "seed_high", "iteration", "stream", "sample_offset")
"""The kernels' arguments that `draw_words` makes; no value of theirs is worth a kernel of its own."""


def draw_words(
    seed_tensor: Tensor | None,
    iteration_tensor: Tensor | None,
    seed: int,
    iteration: int,
    stream: int,
    sample_offset: int,
) -> tuple[Tensor | None, Tensor | None, int, int, int, int, int]:
    """A kernel's arguments for its draw: both tensors, then seed (low, high), iteration, stream, offset as words.

    A word is passed as the int32 of the same bits: Triton compiles a kernel anew where an int needs another type.
    """
    low, high, iteration, sample_offset = (
        (word + (1 << 31)) % (1 << 32) - (1 << 31) for word in (seed, seed >> 32, iteration, sample_offset)
    )
    return seed_tensor, iteration_tensor, low, high, iteration, stream, sample_offset


@triton.jit
def draw_of(seed_tensor, iteration_tensor, seed_low, seed_high, iteration):
    """(seed_low, seed_high, iteration) as uint32: a tensor, where there is one, holds what counts."""
    if seed_tensor is not None:
        seed = tl.load(seed_tensor)
        low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    else:
        low, high = seed_low.to(tl.uint32), seed_high.to(tl.uint32)
    count = iteration.to(tl.uint32) if iteration_tensor is None else tl.load(iteration_tensor).to(tl.uint32)
    return low, high, count


@triton.jit
def words(block, sample, k0, k1, iteration, stream, PURPOSE: tl.constexpr):
    """The four words of each block, which belong to elements 4 * block and on; `sample` int64, the key uint32."""
    c0 = block.to(tl.uint32)
    c1 = sample.to(tl.uint32)
    c2 = iteration
    c3 = (stream | PURPOSE << 16).to(tl.uint32)
    for _ in tl.static_range(10):
        # 64-bit products: one wide multiplication each, where high and low words apart would be two.
        left, right = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1 = (right >> 32).to(tl.uint32) ^ c1 ^ k0, right.to(tl.uint32)
        c2, c3 = (left >> 32).to(tl.uint32) ^ c3 ^ k1, left.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def bounded(word, bound):
    """Integers in [0, bound), int64, for a bound below 2^31: the high word of word * bound."""
    return (word.to(tl.int64) * bound) >> 32


@triton.jit
def _minus_log(word):
    """-ln u for u = (word + 0.5) / 2^32, relative error a few 2^-24 everywhere."""
    # At and above sqrt(1/2) the distance of u to 1 is taken in integers: in float32, u itself would have lost it.
    near_one = word >= 0xB504F334
    distance = ((word ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * -2.3283064365386963e-10
    # Else u = m * 2^-e with m in [sqrt(1/2), sqrt(2)), from the bits of word + 0.5.
    bits = (word.to(tl.float32) + 0.5).to(tl.uint32, bitcast=True)
    shifted = bits - 0x3F3504F3
    e = tl.where(near_one, 0, 32 - (shifted.to(tl.int32, bitcast=True) >> 23)).to(tl.float32)
    m = ((shifted & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True)
    f = tl.where(near_one, distance, m - 1.0)
    # log(1 + f) = f - f^2 / 2 + f^3 P(f).
    p = tl.fma(f, -0.07634492963552475, 0.12761574983596802)
    p = tl.fma(f, p, -0.13160182535648346)
    p = tl.fma(f, p, 0.14201758801937103)
    p = tl.fma(f, p, -0.16623356938362122)
    p = tl.fma(f, p, 0.20001226663589478)
    p = tl.fma(f, p, -0.2500081956386566)
    p = tl.fma(f, p, 0.3333333134651184)
    square = f * f
    tail = tl.fma(square * f, p, square * -0.5)
    # ln 2 in two parts, the first short enough for e times it to be exact.
    return tl.fma(e, 0.693145751953125, tl.fma(e, 1.42860682030941723212e-6, -tail) - f)


@triton.jit
def box_muller(radius_word, angle_word):
    """(r cos a, r sin a) with r = sqrt(-2 ln u), a = 2 pi u', u and u' the words plus 0.5 over 2^32."""
    r = tl.sqrt_rn(2.0 * _minus_log(radius_word))
    # The angle as an octant and x in (0, 1), a = (octant + x) pi / 4; odd octants are mirrored. All in integers.
    octant = angle_word >> 29
    rest = tl.where((octant & 1) != 0, angle_word ^ 0xFFFFFFFF, angle_word) & 0x1FFFFFFF
    x = (rest.to(tl.float32) + 0.5) * 1.862645149230957e-09
    z = x * x
    p = tl.fma(z, 3.0910652526472404e-07, -3.657263732748106e-05)
    p = tl.fma(z, p, 0.002490393351763487)
    p = tl.fma(z, p, -0.08074551075696945)
    # pi / 4 in two parts: rounding it alone would cost half an ulp.
    sine = tl.fma(x, 0.7853981852531433, x * tl.fma(z, p, -2.1855695031547384e-08))
    p = tl.fma(z, 3.5313346415932756e-06, -0.00032594200456514955)
    p = tl.fma(z, p, 0.015854327008128166)
    p = tl.fma(z, p, -0.3084251284599304)
    cosine = tl.fma(z, p, 1.0)
    swap = ((octant + 1) & 2) != 0
    cos_a = tl.where(swap, sine, cosine)
    sin_a = tl.where(swap, cosine, sine)
    cos_a = tl.where(((octant + 2) & 4) != 0, -cos_a, cos_a)
    sin_a = tl.where((octant & 4) != 0, -sin_a, sin_a)
    return r * cos_a, r * sin_a


@triton.jit
def normals(start, sample, k0, k1, iteration, stream, PURPOSE: tl.constexpr, BLOCK: tl.constexpr):
    """Standard normals, float32 `[BLOCK]`, of the elements from `start` on, a multiple of 4."""
    block = start // 4 + tl.arange(0, BLOCK // 4)
    w0, w1, w2, w3 = words(block, sample, k0, k1, iteration, stream, PURPOSE)
    n0, n1 = box_muller(w0, w1)
    n2, n3 = box_muller(w2, w3)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))
