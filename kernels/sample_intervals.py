"""sample_intervals in Triton: every sample's step, interval and timestep in one launch (arXiv 2503.06674)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tdm_fast.kernels._latents import on_device
from tdm_fast.kernels._philox import DRAW, bounded, draw_of, draw_words, words
from tdm_fast.philox import Purpose

_BLOCK = 128


@triton.jit(do_not_specialize=[*DRAW, "total_steps", "min_timestep", "margin", "mid_gap", "batch"])
def _sample_intervals_kernel(
    out,
    seed_tensor,
    iteration_tensor,
    seed_low,
    seed_high,
    iteration,
    stream,
    sample_offset,
    total_steps,
    min_timestep,
    margin,
    mid_gap,
    batch,
    NODES: tl.constexpr,
    SEPARATE: tl.constexpr,
    RANDMID: tl.constexpr,
    PURPOSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of the sample's first Philox block word 0 gives k, word 1 t_mid and word 2 t."""
    k0, k1, count = draw_of(seed_tensor, iteration_tensor, seed_low, seed_high, iteration)
    index = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    mask = index < batch
    first, second, third, _ = words(index * 0, sample_offset + index, k0, k1, count, stream, PURPOSE)
    COUNT: tl.constexpr = len(NODES)
    k = 1 + bounded(first, COUNT)
    # Selecting among constants: a table would have to be copied to the device first.
    t_gen, t_mid = index * 0, index * 0
    for step in tl.static_range(COUNT):
        t_gen = tl.where(k == COUNT - step, NODES[step], t_gen)
        t_mid = tl.where(k == COUNT + 1 - step, NODES[step] + 1, t_mid)
    if RANDMID:
        t_mid = t_mid + bounded(second, t_gen - mid_gap - t_mid)
    low = tl.where(t_mid < min_timestep, min_timestep, t_mid)
    high = (t_gen if SEPARATE else total_steps) - margin
    t = low + bounded(third, high - low)
    tl.store(out + index, k, mask=mask)
    tl.store(out + batch + index, t_gen, mask=mask)
    tl.store(out + 2 * batch + index, t_mid, mask=mask)
    tl.store(out + 3 * batch + index, t, mask=mask)


def sample_intervals(
    out: Tensor,
    seed_tensor: Tensor | None,
    iteration_tensor: Tensor | None,
    seed: int,
    iteration: int,
    nodes: list[int],
    total_steps: int,
    stream: int,
    sample_offset: int,
    separate: bool,
    randmid: bool,
    min_timestep: int,
    margin: int,
    mid_gap: int,
) -> None:
    """Fill `out`, contiguous int64 `[4, B]`, with k, t_gen, t_mid and t.

    `nodes` are the trajectory's timesteps, descending; one kernel is compiled per trajectory. `seed_tensor` and
    `iteration_tensor`, 0-d int64 on out's device, stand in place of the ints where given.
    """
    batch = out.shape[1]
    if batch == 0:
        return
    with on_device(out):
        _sample_intervals_kernel[(triton.cdiv(batch, _BLOCK),)](
            out, *draw_words(seed_tensor, iteration_tensor, seed, iteration, stream, sample_offset),
            total_steps, min_timestep, margin, mid_gap, batch, tuple(nodes), separate, randmid,
            int(Purpose.INTERVALS), _BLOCK,
        )  # fmt: skip
