"""sample_intervals in Triton: every sample's step, interval and timestep in one launch (arXiv 2503.06674)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tdm_fast.kernels._latents import on_device
from tdm_fast.kernels._philox import DRAW, bounded, draw_of, draw_words, words
from tdm_fast.philox import Purpose

_BLOCK = 128


@triton.jit(do_not_specialize=[*DRAW, "total_steps", "min_timestep", "margin", "mid_gap", "batch"])
def _sample_intervals_kernel(
    ks,
    t_gens,
    t_mids,
    ts,
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
    tl.store(ks + index, k, mask=mask)
    tl.store(t_gens + index, t_gen, mask=mask)
    tl.store(t_mids + index, t_mid, mask=mask)
    tl.store(ts + index, t, mask=mask)


def sample_intervals(
    like: Tensor,
    nodes: list[int],
    total_steps: int,
    stream: int,
    separate: bool,
    randmid: bool,
    min_timestep: int,
    margin: int,
    mid_gap: int,
    seed_tensor: Tensor | None,
    iteration_tensor: Tensor | None,
    seed: int,
    iteration: int,
    batch_size: int,
    sample_offset: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """k, t_gen, t_mid and t, int64 `[B]` each, on the device of `like`.

    `nodes` are the trajectory's timesteps, descending; one kernel is compiled per trajectory. `seed_tensor` and
    `iteration_tensor`, 0-d int64 on that device, stand in place of the ints where given.
    """
    k, t_gen, t_mid, t = (torch.empty(batch_size, dtype=torch.int64, device=like.device) for _ in range(4))
    if batch_size > 0:
        with on_device(like):
            _sample_intervals_kernel[(triton.cdiv(batch_size, _BLOCK),)](
                k, t_gen, t_mid, t, *draw_words(seed_tensor, iteration_tensor, seed, iteration, stream, sample_offset),
                total_steps, min_timestep, margin, mid_gap, batch_size, tuple(nodes), separate, randmid,
                int(Purpose.INTERVALS), _BLOCK,
            )  # fmt: skip
    return k, t_gen, t_mid, t
