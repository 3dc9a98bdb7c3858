"""How it is measured: every round begins with cold caches; on a GPU only what the GPU does counts.

Cold: before each round a buffer of four times the last-level cache is read, so that inputs come from memory, as they
do after a network has run. It is read, not written: written lines would have to be stored during the round.

On a CPU those reads also push Python and torch themselves out of the caches, which no trainer meets: the network that
ran before the loss was thousands of Python calls and autograd nodes. So a network of a few numbers runs forward and
backward in between, before every provider alike. It touches nothing of what is measured.

On a GPU a round is the time between two CUDA events. The reads before it last longer than the host needs to queue the
round, so that launches, which a trainer hides behind the network before them, do not count; how long the host needs
is reported beside it. `wall` measures from the call to the finished result instead.
"""

from __future__ import annotations

import functools
import gc
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WARMUP_ROUNDS, WARMUP_SECONDS = 3, 0.3
LARGE_COPY_FACTOR = 8


@dataclass(frozen=True)
class Settings:
    """Rounds of a measurement: as many as fit into `seconds`, between the two limits. `cold` empties the caches."""

    seconds: float
    min_rounds: int
    max_rounds: int
    cold: bool = True


@dataclass(frozen=True)
class Timing:
    """Seconds of every round; `host` is what the host needs to queue one on a GPU, None on a CPU."""

    rounds: list[float]
    host: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)


def last_level_cache(device: str) -> int:
    """Bytes of the device's last-level cache: L2 of a GPU, L3 of a CPU as far as the system tells, else 32 MiB."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    if sizes:
        units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
        return max(int(size[:-1]) * units[size[-1]] if size[-1] in units else int(size) for size in sizes)
    if platform.system() == "Darwin":
        names = ("hw.l3cachesize", "hw.perflevel0.l2cachesize", "hw.l2cachesize")
        asked = (subprocess.run(["sysctl", "-n", name], capture_output=True, text=True).stdout for name in names)
        return max([int(answer) for answer in asked if answer.strip()], default=32 << 20)
    return 32 << 20


@functools.cache
def _buffer(device: str) -> Tensor:
    return torch.ones(4 * last_level_cache(device) // 4, device=device)


@functools.cache
def _small_network() -> tuple[torch.nn.Module, Tensor]:
    layers = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.SiLU(), torch.nn.Linear(16, 1))
    return layers, torch.ones(1, 16)


def _run_small_network() -> None:
    network, x = _small_network()
    torch.autograd.grad(network(x).sum(), list(network.parameters()))


def measure(run: Callable[[], Any], device: str, settings: Settings, *, wall: bool = False) -> Timing:
    """Time `run` on "cpu" or "cuda"; see the module's text."""
    began = time.perf_counter()
    for _ in range(WARMUP_ROUNDS):
        run()
        if time.perf_counter() - began > WARMUP_SECONDS:
            break
    enabled = gc.isenabled()
    gc.disable()
    try:
        if device == "cuda" and not wall:
            return _measure_events(run, settings)
        return _measure_wall(run, device, settings)
    finally:
        if enabled:
            gc.enable()


def _measure_wall(run: Callable[[], Any], device: str, settings: Settings) -> Timing:
    rounds: list[float] = []
    began = time.perf_counter()
    while len(rounds) < settings.max_rounds:
        if settings.cold:
            _buffer(device).sum()
            if device == "cpu":
                _run_small_network()
        _synchronize(device)
        start = time.perf_counter()
        result = run()
        _synchronize(device)
        rounds.append(time.perf_counter() - start)
        del result  # before the next round, whose memory it is
        if len(rounds) >= settings.min_rounds and time.perf_counter() - began > settings.seconds:
            break
    return Timing(rounds)


def _measure_events(run: Callable[[], Any], settings: Settings) -> Timing:
    host, buffer = _host_seconds(run), _buffer("cuda")
    first, second = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    buffer.sum()
    first.record()
    buffer.sum()
    second.record()
    torch.cuda.synchronize()
    pause = max(first.elapsed_time(second) / 1e3, 1e-6)
    reads = 1 + int(2 * host / pause)
    count = int(settings.seconds / (reads * pause + host))
    count = max(settings.min_rounds, min(settings.max_rounds, count))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for start, end in events:
        for _ in range(reads):
            buffer.sum()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return Timing([start.elapsed_time(end) / 1e3 for start, end in events], host)


def _host_seconds(run: Callable[[], Any]) -> float:
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(times)


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@functools.cache
def copy_timing(shape: tuple[int, ...], dtype: torch.dtype, device: str, settings: Settings) -> Timing:
    """The device's own copy of a tensor, into memory that is there already; measured once a session."""
    source, destination = (torch.ones(shape, dtype=dtype, device=device) for _ in range(2))
    return measure(lambda: destination.copy_(source), device, settings)


def large_shape(device: str, dtype: torch.dtype) -> tuple[int]:
    """A tensor of eight times the last-level cache."""
    return (LARGE_COPY_FACTOR * last_level_cache(device) // dtype.itemsize,)


def copy_speed(shape: tuple[int, ...], dtype: torch.dtype, device: str, settings: Settings) -> float:
    """Bytes per second of `copy_timing`, which reads one tensor and writes one."""
    elements = torch.Size(shape).numel()
    return 2 * elements * dtype.itemsize / copy_timing(shape, dtype, device, settings).median
