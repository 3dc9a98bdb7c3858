"""Every op at the latents of real models: plain torch, torch.compile and ours, beside the device's own copy.

    pytest benchmarks/ --benchmark-only --benchmark-json=results.json && python benchmarks/report results.json

bench_cases.py says what is measured and how many bytes each op must move, bench_plain.py what it is compared with,
bench_timing.py how. pytest-benchmark keeps the numbers: its clock here is advanced by what was measured.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import bench_plain
import pytest
import torch
from bench_cases import DTYPES, LATENTS, OPS, Case, prepare
from bench_timing import Settings, Timing, copy_speed, copy_timing, large_shape, measure

from tdm_fast import ops


class Clock:
    """Stands still but for what it is told."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def advance(self, seconds: float) -> None:
        self.seconds += seconds


CLOCK = Clock()
pytestmark = pytest.mark.benchmark(timer=CLOCK)


def record(benchmark: Any, timing: Timing, moved: int | None, info: dict[str, Any]) -> None:
    """Hand the rounds to pytest-benchmark, with GB/s from the median."""
    rounds = iter(timing.rounds)
    benchmark.pedantic(CLOCK.advance, setup=lambda: ((next(rounds),), {}), rounds=len(timing.rounds))
    benchmark.extra_info.update(info)
    if timing.host is not None:
        benchmark.extra_info["host_seconds"] = timing.host
    if moved is not None:
        benchmark.extra_info.update(bytes=moved, gb_per_s=moved / timing.median / 1e9)


def test_copy(benchmark: Any, copied: tuple[str, int, str], device: str, settings: Settings) -> None:
    """The yardstick, at the size of each of the latents and far beyond the last-level cache."""
    latents, batch, dtype_name = copied
    dtype = DTYPES[dtype_name]
    shape = large_shape(device, dtype) if latents == "large" else (batch, *LATENTS[latents][0])
    moved = 2 * torch.Size(shape).numel() * dtype.itemsize
    info = {"op": "copy", "mode": "forward", "latents": latents, "batch": batch, "dtype": dtype_name}
    record(benchmark, copy_timing(shape, dtype, device, settings), moved, {**info, "provider": "copy"})


def test_op(benchmark: Any, case: Case, device: str, settings: Settings) -> None:
    """An op on latents; what it computes is compared with plain torch before it is timed."""
    prepared = prepare(case, device)
    result = prepared.result().detach()
    wanted = OPS[case.op].plain(prepared.inputs, prepared.per_sample)
    wanted = (wanted[OPS[case.op].output] if isinstance(wanted, tuple) else wanted).detach()
    torch.testing.assert_close(result, wanted, rtol=1e-2, atol=1e-2)
    del result, wanted
    prepared.run()
    if benchmark.disabled:
        benchmark(lambda: None)  # to fill the compile cache is all that was asked for
        return
    timing, dtype = measure(prepared.run, device, settings), DTYPES[case.dtype]
    moved = OPS[case.op].traffic.bytes(case.mode, torch.Size(case.shape).numel(), dtype.itemsize)
    info: dict[str, Any] = {**vars(case)}
    for name, shape in (("copy", case.shape), ("large_copy", large_shape(device, dtype))):
        speed = copy_speed(shape, dtype, device, settings)
        info.update({f"{name}_gb_per_s": speed / 1e9, f"share_of_{name}": moved / timing.median / speed})
    record(benchmark, timing, moved, info)


def test_sample_intervals(benchmark: Any, draw: tuple[int, str], device: str, settings: Settings) -> None:
    """All four integers of every sample, from the call to the finished tensors, since the loop's cost is waiting.

    No memory is moved that counts, so the caches are left as they are.
    """
    batch, provider = draw

    def run() -> tuple[torch.Tensor, ...]:
        if provider == "torch":
            return bench_plain.sample_intervals(batch, 4, 900, device)
        options: dict[str, Any] = {"num_steps": 4, "total_steps": 900, "seed": 0, "iteration": 0}
        return ops.sample_intervals(batch, **options, device=device, backend=provider)

    timing = measure(run, device, replace(settings, cold=False), wall=True)
    info = {"op": "sample_intervals", "mode": "forward", "latents": "", "batch": batch, "dtype": "int64"}
    record(benchmark, timing, None, {**info, "provider": provider})
